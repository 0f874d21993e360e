"""The rows of a tar shard: one per sample, with where its video or image is, and what its other members say.

Columns: offset and size of the bytes, key and extension (together the member's name), and the columns of a table
(num_frames, height, width, fps, text, label, split, start, end) that its .json, .txt and .cls members give.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vae3d.data.decoding.readers import is_media
from vae3d.data.media import DataError
from vae3d.data.table.probe import read_metadata
from vae3d.data.table.rows import SPLITS
from vae3d.data.table.segments import SEGMENT_ERROR
from vae3d.data.tars.samples import SIDECARS, Member, Sample, Shard, samples_of
from vae3d.text import is_utf8, one_line

KEY = b"vae3d"  # of the schema's metadata
NAME = "__name__"  # key of a .json member: the sample's name in the source that it was written from
INTEGERS = ("num_frames", "height", "width")
FLOATS = ("fps", "start", "end")
TEXTS = ("text", "label", "split", "name", "error")
SCHEMA = pa.schema(
    [("offset", pa.int64()), ("size", pa.int64()), ("key", pa.string()), ("extension", pa.string())]
    + [(name, pa.int32()) for name in INTEGERS]
    + [(name, pa.float64()) for name in FLOATS]
    + [(name, pa.string()) for name in TEXTS]
)


def media_rows(shard: Shard, media: str | None = None, probe: bool = False) -> pa.Table:
    """One row per sample, with one video or image each.

    media: extension of the member to take where a sample has several, such as mp4. probe: open the samples whose size,
    frames or rate are not given. Raises DataError.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    kinds = set()
    for sample in samples_of(shard):
        member = media_member(shard.path, sample, media)
        extension = member.name[len(sample.key) + 1 :]
        values, error = values_of(sample)
        kinds |= {type(values["label"])} if "label" in values else set()
        row = {"offset": member.offset, "size": member.size, "key": sample.key, "extension": extension}
        row |= values | {"error": error}
        if member.size == 0:
            row["error"] = row["error"] or "is empty (0 bytes)"
        for name, column in columns.items():
            column.append(row.get(name))
    columns["label"] = [label if label is None else str(label) for label in columns["label"]]
    table = pa.table(columns, SCHEMA)
    if probe:
        table = _probed(shard, table)
    return table.replace_schema_metadata({KEY: json.dumps({"integer_labels": kinds <= {int}})})


def media_member(path: str, sample: Sample, media: str | None) -> Member:
    """The video or image of a sample, or its member with the extension `media`. Raises DataError."""
    found = [name for name, member in sample.members.items() if is_media(member.name)]
    if media is not None:
        found = [name for name in found if name == media.lower().lstrip(".")]
    if len(found) == 1:
        return sample.members[found[0]]
    has = ", ".join(member.name for member in sample.members.values())
    if found:
        extension = found[0]
        raise DataError(
            f"{path}: the sample {sample.key} has {len(found)} videos or images ({', '.join(found)}); choose one with "
            f"--media {extension}, in a configuration data.source.media={extension}"
        )
    what = "video or image" if media is None else f"member .{media.lstrip('.')}"
    hint = "; the members of a sample must follow each other (tar --sort=name)" if len(sample.members) == 1 else ""
    raise DataError(f"{path}: the sample {sample.key} has no {what}, only {has}{hint}")


def values_of(sample: Sample) -> tuple[dict[str, Any], str | None]:
    """Columns of the .json, .txt and .cls members, and what is wrong with them, if anything."""
    texts = {}
    for extension in SIDECARS:
        if (member := sample.members.get(extension)) is not None:
            try:
                texts[extension] = member.content.decode("utf-8-sig")  # as Windows writes it
            except UnicodeDecodeError:
                return {}, f"{member.name} is not UTF-8 text"
    values: dict[str, Any] = {}
    if "json" in texts:
        name = sample.members["json"].name
        try:
            content = json.loads(texts["json"])
        except (ValueError, RecursionError) as error:
            return {}, f"{name} is not JSON: {one_line(error, 100)}"
        if not isinstance(content, dict):
            return {}, f"{name} is {texts['json']:.40}, not an object"
        values = {key: value for key, value in content.items() if value is not None and key in SCHEMA.names[4:]}
        values.pop("name", None)
        values.pop("error", None)
        for other, column in (("caption", "text"), ("frames", "num_frames"), (NAME, "name")):
            if content.get(other) is not None:
                values.setdefault(column, content[other])
        for column, value in values.items():
            if why := _wrong(column, value):
                return {}, f"`{column}` of {name} is {json.dumps(value):.40}, {why}"
        if values.get("end", math.inf) <= values.get("start", 0.0):
            return {}, SEGMENT_ERROR
    if "txt" in texts:
        values.setdefault("text", texts["txt"])
    if "cls" in texts:
        label = texts["cls"].strip()
        values.setdefault("label", int(label) if re.fullmatch(r"-?[0-9]{1,18}", label) else label)
    return values, None


def _wrong(column: str, value: Any) -> str | None:
    """Why a value of a .json member cannot be in this column; None if it can."""
    if column in INTEGERS + FLOATS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "which is not a number"
        if not abs(value) <= 2**53:  # NaN and infinity too; larger integers are no floats
            return "which is not a number of seconds, frames or pixels"
        if column in INTEGERS and not (1 <= value < 2**31 and value == int(value)):
            return "which is not a positive whole number"
        return "which is below 0" if value < 0 else None
    if column == "label" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return None
    if not isinstance(value, str) or not is_utf8(value):
        return "which is not a text"
    return f"which is none of {', '.join(SPLITS)}" if column == "split" and value not in SPLITS else None


def _probed(shard: Shard, table: pa.Table) -> pa.Table:
    """The table with all sizes, counts and rates; what does not open gets an error."""
    names = (*INTEGERS, "fps")
    columns = {name: table[name].to_pylist() for name in (*names, "error")}
    for row, path in enumerate(member_paths(table, pa.array([shard.path] * len(table), pa.large_string()))):
        if columns["error"][row] is None and any(columns[name][row] is None for name in names):
            found = read_metadata(path)
            for name in found:  # "error" alone, or the others
                columns[name][row] = found[name] if columns[name][row] is None else columns[name][row]
    for name, values in columns.items():
        position = SCHEMA.get_field_index(name)
        table = table.set_column(position, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    return table


def member_paths(table: pa.Table, shards: pa.Array) -> list[str]:
    """The path of each row's video or image, as storage.member_path writes it: TAR@OFFSET+SIZE/MEMBER."""
    # Through string, since Arrow casts no dictionary to large_string.
    names = ("offset", "size", "key", "extension")
    offset, size, key, extension = (table[name].cast(pa.string()).cast(pa.large_string()) for name in names)
    # One expression for all rows: storage.member_path of a million rows takes a second.
    at, plus, slash, dot, nothing = (pa.scalar(text, pa.large_string()) for text in ("@", "+", "/", ".", ""))
    found = pc.binary_join_element_wise(shards, at, offset, plus, size, slash, key, dot, extension, nothing)
    return found.to_pylist()

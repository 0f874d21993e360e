"""Write the files of a table into tar shards, in the layout of webdataset. Nothing is decoded or encoded."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vae3d.data.decoding.images import IMAGE_SUFFIXES, image_info, is_sequence
from vae3d.data.decoding.readers import VIDEO_SUFFIXES
from vae3d.data.media import DataError, MediaError
from vae3d.data.storage.files import local_range
from vae3d.data.storage.paths import HF_IMAGE, HF_VIDEO, suffix_of
from vae3d.data.table.probe import probe
from vae3d.data.table.rows import NUMBERS
from vae3d.data.table.segments import SEGMENT
from vae3d.data.table.versions import file_stamps
from vae3d.data.tars.index import INDEX, Settings, build_index
from vae3d.data.tars.rows import NAME
from vae3d.data.tars.samples import find_shard
from vae3d.hashing import json_hash
from vae3d.io import atomic_write, naming
from vae3d.progress import progress
from vae3d.text import plural

BLOCK = 512  # bytes of a tar: of a header, and to which contents are padded
TEXTS = ("text", "label", "split")
VIDEO_STARTS = {  # first bytes of a container -> its extension
    rb"....ftyp": "mp4",
    rb"....(?:moov|mdat|wide|free|skip|pnot)": "mov",  # QuickTime from before `ftyp`
    rb"\x1aE\xdf\xa3.{0,60}webm": "webm",
    rb"\x1aE\xdf\xa3": "mkv",
    rb"RIFF....AVI ": "avi",
    rb"GIF8": "gif",
    rb"FLV": "flv",
    rb"OggS": "ogv",
    rb"G.{187}G": "ts",
    rb".{4}G.{191}G": "m2ts",
    rb"\0\0\x01[\xba\xb3]": "mpg",
    rb"0&\xb2u": "wmv",
}
SHOWN = 10


@dataclass(frozen=True)
class Entry:
    """A sample to write. size: bytes of the file. json: its .json member."""

    path: str
    size: int
    stamp: list[int]
    json: dict[str, Any]


def entries_of(
    table: pd.DataFrame, *, shuffle: int | None = None, with_probe: bool = False
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """What to write for each row, in order, and (path, reason) of the rows that cannot be written.

    shuffle: seed of a random order. with_probe: open the files whose size, frames or rate are not given.
    """
    if shuffle is not None:
        table = table.iloc[np.random.default_rng(shuffle).permutation(len(table))]
    usable = [path for path, error in zip(table["path"], table["error"], strict=True) if error is None]
    stamps = file_stamps(usable)
    unknown = table["error"].isna() & table[list(NUMBERS)].isna().any(axis=1)
    found = probe([path for path in table.loc[unknown, "path"] if stamps[path]]) if with_probe and unknown.any() else {}
    entries, errors = [], []
    columns = ["path", "name", "error", *NUMBERS, *SEGMENT, *TEXTS]
    for path, name, error, *values in table[columns].itertuples(index=False):
        row = {column: value for column, value in zip(columns[3:], values, strict=True) if not pd.isna(value)}
        metadata = found.get(path, {})
        reason = error or metadata.get("error") or _obstacle(path, stamps.get(path))
        if reason:
            errors.append((path, str(reason)))
            continue
        row = {column: value for column, value in metadata.items() if column in NUMBERS} | row
        content = {column: _plain(column, value) for column, value in row.items()} | {NAME: name}
        entries.append(Entry(path, stamps[path][0], stamps[path], content))
    return entries, errors


def _obstacle(path: str, stamp: list[int] | None) -> str | None:
    """Why a file cannot be a member of a shard; None if it can."""
    if is_sequence(path):
        return "is numbered images; a sample of a shard is one file: make a video of them"
    if stamp is None:
        return "no such file"
    if stamp[0] == 0:
        return "is empty (0 bytes)"
    suffix = suffix_of(path)
    if suffix not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, HF_IMAGE, HF_VIDEO):
        return f"unknown extension {suffix!r}"
    return None


def _plain(column: str, value: Any) -> int | float | str:
    """A value for JSON that tars/rows.py reads: whole numbers as integers; texts, and labels other than these, which a
    table may have as dates or fractions, as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_class = column == "label" and type(value) is int and abs(value) < 2**63
    return str(value) if column in TEXTS and not is_class else value


def plan_shards(entries: Sequence[Entry], size: int | None, samples: int | None) -> list[range]:
    """The entries of each shard. size: at most so many bytes of a tar, unless one sample is larger; samples: at most so
    many samples."""
    spans, first, total = [], 0, 0
    for number, entry in enumerate(entries):
        needed = _tar_bytes(entry.size) + _tar_bytes(len(_json_text(entry.json)))
        full = (size is not None and total + needed > size) or (samples is not None and number - first >= samples)
        if full and number > first:
            spans.append(range(first, number))
            first, total = number, 0
        total += needed
    return [*spans, range(first, len(entries))]


def plan_record(entries: Sequence[Entry], spans: Sequence[range]) -> dict[str, Any]:
    """What shards.json keeps: shards with the same record have the same bytes."""
    lengths = [len(span) for span in spans]
    return {"samples": len(entries), "shards": len(spans), "hash": json_hash([lengths, list(map(asdict, entries))])}


def _tar_bytes(size: int) -> int:
    """Bytes that a member takes in a tar."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def write_shards(entries: Sequence[Entry], spans: Sequence[range], out: Path, workers: int = 4) -> list[Path]:
    """Write the shards of all entries that are not in the folder `out` yet, and their index. Returns the shards.

    The same entries and spans give the same bytes. Shards are written atomically, so a killed run goes on where it was.
    Raises DataError or MediaError if a file changed since it was listed, or cannot be read.
    """
    files = [out / f"{number:06d}.tar" for number in range(len(spans))]
    todo = [number for number, file in enumerate(files) if not file.is_file()]
    pool = ThreadPoolExecutor(workers)
    with progress(total=len(files), unit="shard", desc="writing") as bar:
        bar.update(len(files) - len(todo))
        try:
            for _ in pool.map(lambda number: _write_shard(files[number], entries, spans[number]), todo):
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, those that have not begun
    build_index([find_shard(str(file)) for file in files], out / INDEX, Settings(), workers=workers)
    return files


def _write_shard(file: Path, entries: Sequence[Entry], span: range) -> None:
    from webdataset import TarWriter  # slow to import

    # PAX: members of more than 8 GiB. A fixed time and owner, so that the same content gives the same bytes.
    fixed = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "format": "PAX_FORMAT", "encoder": False}
    with naming(file), atomic_write(file) as stream, TarWriter(stream, **fixed) as tar:
        for number in span:
            entry = entries[number]
            content, extension = read_file(entry.path)
            if len(content) != entry.size:
                raise DataError(f"{entry.path} changed while it was read: {len(content)} bytes, not {entry.size}")
            tar.write({"__key__": f"{number:09d}", extension: content, "json": _json_text(entry.json)})


def _json_text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def read_file(path: str) -> tuple[bytes, str]:
    """All bytes of a video or image, and its extension without a dot: of the rows of a Hugging Face dataset, which have
    none, by the first bytes. Raises MediaError."""
    try:
        content = local_range(path).read()
    except OSError as error:
        raise MediaError(path, f"cannot be read: {error.strerror or error}") from error
    suffix = suffix_of(path)
    if suffix == HF_IMAGE:
        kind = image_info(Path(path), io.BytesIO(content)).codec
        suffix = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)
    elif suffix == HF_VIDEO:
        found = [suffix for start, suffix in VIDEO_STARTS.items() if re.match(start, content, re.DOTALL)]
        if not found:
            raise MediaError(path, f"begins with {content[:8]!r}, which is no video that a shard could name")
        suffix = found[0]
    return content, suffix.lstrip(".")


def check_broken(errors: Sequence[tuple[str, str]], rows: int, max_broken: float) -> list[str]:
    """Lines about the files that are left out. Raises DataError if they are more than the share `max_broken`."""
    if not errors:
        return []
    shown = [f"  {path}: {reason}" for path, reason in errors[:SHOWN]]
    shown += [f"  ... and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
    if len(errors) > max_broken * rows:
        listed = "\n".join(shown)
        raise DataError(
            f"{len(errors)} of {plural(rows, 'row')} cannot be written, more than --max_broken {max_broken:g} "
            f"(0.1 leaves out up to a tenth):\n{listed}"
        )
    return [f"left out: {len(errors)} of {plural(rows, 'row')}", *shown]

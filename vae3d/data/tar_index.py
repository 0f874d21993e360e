"""Index of tar shards in the layout of webdataset: where each sample's bytes are, and what its other members say.

An index is an Arrow file, memory-mapped, with one row per sample: shard (dictionary), offset and size of its video or
image, key and extension (together the member's name), and the columns of a table (num_frames, height, width, fps, text,
label, split, start, end) that its .json, .txt and .cls members give; columns without a value are left out. Its metadata
holds the list of shards with sizes and stamps (modification time, or ETag), so a changed shard is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, BinaryIO, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from vae3d.arguments import Range, check_fields
from vae3d.data.images import IMAGE_SUFFIXES
from vae3d.data.media import DataError, MediaError, one_line
from vae3d.data.paths import cache_folder, is_url, local_name, member_path
from vae3d.data.probe import read_metadata
from vae3d.data.readers import VIDEO_SUFFIXES
from vae3d.data.rows import SPLITS
from vae3d.data.segments import SEGMENT_ERROR
from vae3d.data.storage import local_copy, open_range, size_and_version
from vae3d.data.stores import StorageError
from vae3d.hashing import json_hash
from vae3d.io import atomic_write, naming
from vae3d.progress import progress
from vae3d.text import plural

INDEX = "index.arrow"
VERSION = 1  # of the index
KEY = b"vae3d"  # of the schema's metadata
NAME = "__name__"  # key of a .json member: the sample's name in the source that it was written from
SHOWN = 10  # errors in a message
REMOTE_BLOCK = 2**19  # bytes of a range read of headers
MAX_PADDING = 2**20  # zero bytes after the end of a tar
MAX_HEADER = 2**20  # bytes of a member's name, and of others that a header declares
MAX_SIDECAR = 2**24  # bytes of a .json, .txt or .cls member
ROWS_PER_BATCH = 2**20
THREADS = 16  # of remote shards, which wait for the network
SIDECARS = ("json", "txt", "cls")
INTEGERS = ("num_frames", "height", "width")
FLOATS = ("fps", "start", "end")
INTEGER_TYPES = ((pa.int8(), 7), (pa.int16(), 15), (pa.int32(), 31), (pa.int64(), 63))
LATENTS = ("mean", "std", "sample")  # columns of an index of latents
TEXTS = ("text", "label", "split", "name", "error")
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# As webdataset splits a name: up to the first dot of its last component.
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
METADATA_NAME = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
SCHEMA = pa.schema(
    [("offset", pa.int64()), ("size", pa.int64()), ("key", pa.string()), ("extension", pa.string())]
    + [(name, pa.int32()) for name in INTEGERS]
    + [(name, pa.float64()) for name in FLOATS]
    + [(name, pa.string()) for name in TEXTS]
)
Scan = Callable[["Shard"], pa.Table]  # the rows of a shard


@dataclass(frozen=True)
class Shard:
    """A tar file. path: absolute, or a URL. stamp: its modification time or ETag; "" if the server gives neither."""

    path: str
    bytes: int
    stamp: str


class Member(NamedTuple):
    """offset, size: bytes of its content within the tar. content: of small text members, else None."""

    name: str
    offset: int
    size: int
    content: bytes | None


class Sample(NamedTuple):
    """key, and members by extension in lower case."""

    key: str
    members: dict[str, Member]


# ---- one shard


def find_shard(path: str) -> Shard:
    """A tar file as it is now. Raises DataError if it does not exist."""
    if path.lower().endswith(COMPRESSED_TAR):
        raise DataError(f"{path} is compressed; single samples can be read of plain tars only: decompress it")
    member_path(path, 0, 0, "x")  # raises for a name that paths of members cannot have
    if is_url(path):
        try:
            size, stamp = size_and_version(path)
        except MediaError as error:
            raise DataError(str(error)) from error
        return Shard(path, size, f"version:{stamp}")
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}"
        ) from error
    if not S_ISREG(stat.st_mode):  # to open a pipe would wait for ever
        raise DataError(f"{path} is no file, but a folder, a pipe or a device")
    return Shard(os.path.abspath(path), stat.st_size, f"mtime:{stat.st_mtime_ns}")


class RangeReader(io.RawIOBase):
    """A remote file for tarfile, read in ranges of at least REMOTE_BLOCK bytes."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.length = url, size
        self._position, self._start, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        first = self._position - self._start
        if not 0 <= first <= first + size <= len(self._block):
            wanted = min(left, max(size, REMOTE_BLOCK))
            self._start, first = self._position, 0
            self._block = open_range(self.url, self._start, wanted) if wanted else b""
        self._position += size
        return self._block[first : first + size]


@contextmanager
def open_shard(shard: Shard) -> Iterator[BinaryIO]:
    if is_url(shard.path):
        yield RangeReader(shard.path, shard.bytes)
    else:
        with open(shard.path, "rb") as stream:
            yield stream


def samples_of(shard: Shard, with_content: Callable[[int, str], bool] = lambda *_: False) -> Iterator[Sample]:
    """The samples of a tar in their order: consecutive members whose names are equal up to the first dot.

    with_content: (number of the sample, extension) -> whether to read the member, as .json, .txt and .cls always are.
    Skips folders, hidden files, and names that webdataset skips: without an extension, and __NAME__.
    Raises DataError, naming the member, for a tar that is truncated, damaged or compressed, and for links, sparse
    members, and names that are not UTF-8 or occur twice.
    """
    try:
        with open_shard(shard) as stream:
            yield from _samples(shard.path, stream, with_content)
    except DataError:  # a ValueError, too
        raise
    except MediaError as error:
        raise DataError(str(error)) from error
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise DataError(f"{shard.path} is damaged or truncated: {one_line(error)}") from error
    except OSError as error:
        raise DataError(f"{shard.path} cannot be read: {error.strerror or one_line(error)}") from error


class _HeaderReader:
    """A tar for tarfile, which reads no more than headers: they may declare names of any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _samples(path: str, stream: BinaryIO, with_content: Callable[[int, str], bool]) -> Iterator[Sample]:
    start = stream.read(max(map(len, COMPRESSED)))
    if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
        raise DataError(f"{path} is compressed ({kind}); single samples can be read of plain tars only: decompress it")
    if not start:
        raise DataError(f"{path} is empty (0 bytes)")
    stream.seek(0)
    sample: Sample | None = None
    number = -1  # of the sample
    # Strict UTF-8: else a name that is none would become one that no other program can read.
    headers = _HeaderReader(stream)
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them all
            if info.size < 0 or tar.offset < info.offset_data:  # it would go in circles
                raise DataError(f"{path} is damaged: {info.name} has {info.size} bytes")
            parts = _name_parts(path, info)
            if parts is None:
                continue
            key, extension = parts
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample, number = Sample(key, {}), number + 1
            if extension in sample.members:
                raise DataError(f"{path}: has the member {info.name} twice")
            content = None
            if extension in SIDECARS and info.size > MAX_SIDECAR:
                raise DataError(f"{path}: {info.name} has {info.size} bytes, more than {MAX_SIDECAR}")
            if extension in SIDECARS or with_content(number, extension):
                stream.seek(info.offset_data)  # not by extractfile, which reads many small pieces
                content = stream.read(info.size)
                if len(content) != info.size:
                    raise DataError(f"{path} is truncated: it ends within {info.name}")
            sample.members[extension] = Member(info.name, info.offset_data, info.size, content)
        _check_end(path, stream, tar.offset)
    if sample is not None:
        yield sample


def _name_parts(path: str, info: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and extension of a member; None for one that is skipped. Raises DataError."""
    found = None if info.isdir() or METADATA_NAME.match(info.name) else MEMBER_NAME.fullmatch(info.name)
    if found is None or os.path.basename(info.name).startswith("."):  # such as d/._a.jpg, which macOS adds to d/a.jpg
        return None
    try:
        info.name.encode()
    except UnicodeEncodeError as error:
        name = info.name.encode("utf-8", "surrogateescape")
        raise DataError(f"{path}: the name of the member {name!r} is not UTF-8; rename it") from error
    if info.issparse():
        raise DataError(f"{path}: {info.name} is a sparse member; make the tar without --sparse")
    if not info.isreg():
        kind = "a link" if info.islnk() or info.issym() else "no file"
        hint = "; make the tar with --dereference --hard-dereference" if kind == "a link" else ""
        raise DataError(f"{path}: {info.name} is {kind}{hint}")
    return found[1], found[2].lower()


def _check_end(path: str, stream: BinaryIO, end: int) -> None:
    """tarfile ends without an error at a header that is damaged or missing."""
    stream.seek(end)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is truncated: it ends at byte {end} without the mark of a tar's end")
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged: it has no header of a member at byte {end}")
    rest = stream.seek(0, os.SEEK_END) - end
    if rest > MAX_PADDING:
        raise DataError(f"{path} ends at byte {end}, and {rest} bytes follow; are several tars joined in one file?")


# ---- the rows of a shard


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
    found = [name for name in sample.members if is_media(name)]
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


def is_media(extension: str) -> bool:
    """Whether a member with this extension is a video or an image."""
    return os.path.splitext(f"x.{extension}")[1] in VIDEO_SUFFIXES + IMAGE_SUFFIXES


def values_of(sample: Sample) -> tuple[dict[str, Any], str | None]:
    """Columns of the .json, .txt and .cls members, and what is wrong with them, if anything."""
    texts = {}
    for extension in SIDECARS:
        if (member := sample.members.get(extension)) is not None:
            try:
                texts[extension] = member.content.decode()
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
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
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


# ---- the index of many shards


@dataclass(frozen=True)
class Settings:
    """What an index depends on beside its shards. kind: media or latents. media: see media_rows."""

    kind: str = "media"
    media: str | None = None


def build_index(
    shards: Sequence[Shard],
    out: Path,
    settings: Settings,
    *,
    scan: Scan | None = None,
    probe: bool = False,
    workers: int = 1,
) -> pa.Table:
    """Read the headers of all shards and write their index, atomically. One process of a machine at a time writes an
    index; others of the same wait.

    scan: gives the rows of a shard; None: media_rows, with `probe`.
    The rows of each shard are kept in the cache folder until the index is written, so what was killed goes on. An index
    that is there already gives the rows of the shards that have not changed.
    Raises DataError that names every shard that cannot be indexed, and for a key that occurs twice.
    """
    # Of this machine, not beside the index: another machine may write the same one now.
    parts = cache_folder() / "shards" / f"{json_hash(os.path.abspath(out))[:24]}.parts"
    with naming(parts):
        parts.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parts.with_suffix(".lock")).acquire()
    with lock:
        return _build(shards, out, settings, scan, probe, workers, parts)


def _build(
    shards: Sequence[Shard], out: Path, settings: Settings, scan: Scan | None, probe: bool, workers: int, parts: Path
) -> pa.Table:
    """build_index with a folder for the rows of each shard, which no other process uses meanwhile."""
    with naming(parts):
        parts.mkdir(exist_ok=True)
    tables = {} if probe else _kept(out, shards, settings)
    todo = [shard for shard in shards if shard.path not in tables]
    scan = scan or partial(media_rows, media=settings.media, probe=probe)
    work = partial(_index_shard, folder=parts, settings=settings, probe=probe, scan=scan)
    errors = []
    with _executor(todo, workers) as pool, progress(total=len(shards), unit="shard", desc="indexing") as bar:
        bar.update(len(tables))
        futures: dict[Future[pa.Table], Shard] = {pool.submit(work, shard): shard for shard in todo}
        for future in as_completed(futures):
            try:
                tables[futures[future].path] = future.result()
            except DataError as error:
                errors.append(str(error))
            bar.update()
    if errors:
        more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise DataError(
            f"{len(errors)} of {plural(len(shards), 'shard')} cannot be indexed:\n  "
            + "\n  ".join(sorted(errors)[:SHOWN])
            + more
        )
    table = _joined([tables[shard.path] for shard in shards], shards, out, settings)
    if not len(table):
        raise DataError(f"{shards[0].path}{' and all others have' if len(shards) > 1 else ' has'} no samples")
    check_unique(table, [shard.path for shard in shards])
    with naming(out), atomic_write(out) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
    shutil.rmtree(parts, ignore_errors=True)
    return table


def _executor(todo: Sequence[Shard], workers: int) -> Executor:
    """Threads for remote shards, which wait for the network; processes for local ones, which keep a core busy."""
    if any(is_url(shard.path) for shard in todo):
        return ThreadPoolExecutor(max(workers, THREADS))
    if min(workers, len(todo)) > 1:
        return ProcessPoolExecutor(min(workers, len(todo)))
    return ThreadPoolExecutor(1)


def _index_shard(shard: Shard, folder: Path, settings: Settings, probe: bool, scan: Scan) -> pa.Table:
    """The rows of a shard: from the file that an earlier run left, or read now and kept in such a file."""
    name = hashlib.blake2b(shard.path.encode(), digest_size=12).hexdigest()
    file, made = folder / f"{name}.arrow", {"version": VERSION, "probe": probe, **asdict(settings), **asdict(shard)}
    with suppress(OSError, pa.ArrowException, KeyError, ValueError):  # of no file, or a damaged one
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)
        if json.loads(table.schema.metadata[KEY])["made"] == made:
            return table
    table = scan(shard)
    metadata = {KEY: json.dumps({**json.loads(table.schema.metadata[KEY]), "made": made})}
    table = table.replace_schema_metadata(metadata)
    with naming(file), atomic_write(file) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    return table


def _kept(out: Path, shards: Sequence[Shard], settings: Settings) -> dict[str, pa.Table]:
    """The rows of an older index, by shard, of the shards that are unchanged. Empty if there is none."""
    try:
        table, header = read_index(out)
    except DataError:
        return {}
    if header["settings"] != asdict(settings) or settings.kind != "media":
        return {}
    now = {shard.path: shard for shard in shards}
    kept, first = {}, 0
    for entry in header["shards"]:
        old = Shard(_absolute(entry["name"], out), entry["bytes"], entry["stamp"])
        if now.get(old.path) == old:
            rows = table.slice(first, entry["rows"])
            columns = [
                rows[field.name].cast(field.type)
                if field.name in rows.column_names
                else pa.nulls(len(rows), field.type)
                for field in SCHEMA
            ]
            metadata = {KEY: json.dumps({"integer_labels": header["integer_labels"]})}
            kept[old.path] = pa.table(columns, SCHEMA).replace_schema_metadata(metadata)
        first += entry["rows"]
    return kept


def _joined(tables: Sequence[pa.Table], shards: Sequence[Shard], out: Path, settings: Settings) -> pa.Table:
    headers = [json.loads(table.schema.metadata[KEY]) for table in tables]
    integer_labels = all(header.get("integer_labels", True) for header in headers)
    names = [_relative(shard.path, out) for shard in shards]
    entries = [
        {"name": name, "bytes": shard.bytes, "stamp": shard.stamp, "rows": len(table)}
        for name, shard, table in zip(names, shards, tables, strict=True)
    ]
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    numbers = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    table = table.add_column(0, "shard", _narrow(pa.DictionaryArray.from_arrays(numbers, pa.array(names, pa.string()))))
    for number, name in enumerate(table.column_names):
        column = table[name]
        if name == "label" and integer_labels:
            column = column.cast(pa.int64())
        elif name in ("extension", "split", "label"):
            column = pc.dictionary_encode(column).unify_dictionaries().combine_chunks()
        table = table.set_column(number, name, _narrow(column))
    empty = [name for name in table.column_names if len(table) and table[name].null_count == len(table)]
    table = table.drop_columns(empty).combine_chunks()
    header = {"version": VERSION, "settings": asdict(settings), "integer_labels": integer_labels, "shards": entries}
    return table.replace_schema_metadata({KEY: json.dumps(header)})


def _narrow(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Integers, and the numbers of a dictionary, in the smallest type that holds them: an index of a million samples
    has 50 MiB instead of 70."""
    if pa.types.is_dictionary(column.type):
        values = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
        kind = _narrowest(0, len(values.dictionary) if len(column) else 0)
        return column.cast(pa.dictionary(kind, column.type.value_type))
    if not pa.types.is_integer(column.type) or column.null_count == len(column):
        return column
    return column.cast(_narrowest(*pc.min_max(column).as_py().values()))


def _narrowest(smallest: int, largest: int) -> pa.DataType:
    return next(kind for kind, bits in INTEGER_TYPES if -(2**bits) <= smallest <= largest < 2**bits)


def check_unique(table: pa.Table, shards: Sequence[str]) -> None:
    """Raise DataError that names a key which two samples have, and their shards. shards: their paths, by number."""
    keys = table["key"].to_pandas()
    repeated = keys.duplicated(keep="first").to_numpy()
    if not repeated.any():
        return
    second = int(repeated.argmax())
    first = int((keys == keys.iloc[second]).to_numpy().argmax())
    numbers = table["shard"].combine_chunks().indices
    one, other = (shards[numbers[row].as_py()] for row in (first, second))
    if one == other:
        raise DataError(
            f"{one} has the key {keys.iloc[second]} twice; the members of a sample must follow each other "
            "(tar --sort=name)"
        )
    raise DataError(
        f"{one} and {other} both have the key {keys.iloc[second]} ({plural(int(repeated.sum()), 'key')} in "
        "all); is a shard there twice? Keys identify samples; vae3d make-shards writes shards with keys of their "
        "own"
    )


def _relative(path: str, out: Path) -> str:
    """The name of a shard in the index at `out`: relative if it is beside or below."""
    folder = os.path.join(os.path.dirname(os.path.abspath(out)), "")
    return path.removeprefix(folder)


def _absolute(name: str, index: str | Path) -> str:
    if is_url(name) or os.path.isabs(name):
        return name
    if is_url(str(index)):
        return f"{str(index).rpartition('/')[0]}/{name}"
    return os.path.join(os.path.dirname(os.path.abspath(index)), name)


# ---- reading an index


def read_index(file: str | Path) -> tuple[pa.Table, dict[str, Any]]:
    """An index, memory-mapped, and its header. A remote one is copied to the cache of remote objects. Raises DataError
    if it is none, damaged, or of another version."""
    version = VERSION
    try:
        with local_copy(file) if is_url(str(file)) else nullcontext(file) as local:
            if not os.path.isfile(local):
                raise FileNotFoundError
            table = pa.ipc.open_file(pa.memory_map(str(local))).read_all()
        table.validate(full=True)  # wrong offsets would end the process
        header = json.loads(table.schema.metadata[KEY])
        version = header["version"]
        if version == VERSION:
            _check_index(table, header)
    except StorageError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        raise DataError(f"{file} is no index of shards: {reason}; make it with: vae3d index SHARDS") from error
    if version != VERSION:
        raise DataError(f"{file} is an index of version {version}; make it again with: vae3d index SHARDS")
    return table, header


Whole = Annotated[int, Range(0, 2**62)]


class ShardEntry(TypedDict):
    """What is read of a shard in the header of an index. rows: how many samples it has."""

    name: str
    bytes: Whole
    stamp: str
    rows: Whole


class Header(TypedDict):
    """What is read of the header of an index."""

    settings: Mapping[str, str | None]
    integer_labels: bool
    shards: Sequence[Any]


def _check_index(table: pa.Table, header: Mapping[str, Any]) -> None:
    """Raise ValueError, or KeyError for a missing column, for what build_index does not write: a stranger may have
    written the file."""
    check_fields(header, Header)
    entries = header["shards"]
    for number, entry in enumerate(entries):
        check_fields(entry, ShardEntry, key=f"shards.{number}")
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        is_number = name in ("offset", "size", *INTEGERS, *LATENTS) or (name == "label" and header["integer_labels"])
        sound = pa.types.is_integer if is_number else pa.types.is_floating if name in FLOATS else pa.types.is_string
        if not sound(kind):
            raise ValueError(f"its column {name} is of {column.type}")
    own = {"media": "extension", "latents": "row"}.get(header["settings"].get("kind"))
    if own is None or "media" not in header["settings"]:
        raise ValueError("its settings lack kind and media")
    for name in ("shard", "offset", "size", "key", own):
        if table[name].null_count:
            raise ValueError(f"its column {name} has missing values")
    counts = [entry["rows"] for entry in entries]
    if not pa.types.is_dictionary(table["shard"].type) or sum(counts) != len(table):
        raise ValueError(f"it has {len(table)} rows of shards of {sum(counts)}")
    names = [entry["name"] for entry in entries]
    ends, sizes = np.cumsum(counts), np.array([entry["bytes"] for entry in entries], np.int64)
    for first in range(0, len(table), ROWS_PER_BATCH):  # in little memory
        piece = table.slice(first, ROWS_PER_BATCH)
        shard = piece["shard"].combine_chunks()
        numbers = np.searchsorted(ends, np.arange(first, first + len(piece)), side="right")
        if not np.array_equal(shard.indices.to_numpy(), numbers):
            raise ValueError("its rows are not those of its shards in their order")
        if shard.dictionary.to_pylist() != names:
            raise ValueError("its shards have two names")
        offset, size = (piece[name].to_numpy().astype(np.int64) for name in ("offset", "size"))
        total = sizes[numbers]
        outside = (offset < 0) | (size < 0) | (size > total) | (offset > total - size)
        if outside.any():
            row = int(outside.argmax())
            raise ValueError(
                f"{piece['key'][row]} is at bytes {offset[row]} + {size[row]} of {names[numbers[row]]}, which has "
                f"{total[row]}"
            )


def shard_paths(header: Mapping[str, Any], index: str | Path) -> list[str]:
    """Absolute paths or URLs of the shards of an index, in order. Raises DataError for an index from a store with local
    shards: it would choose files of this machine."""
    paths = [_absolute(entry["name"], index) for entry in header["shards"]]
    if local_name(str(index)) is None and (local := [path for path in paths if local_name(path) is not None]):
        raise DataError(f"{index} lists a file of this machine, {local[0]}; make it again with: vae3d index SHARDS")
    return paths


def check_shards(header: Mapping[str, Any], index: str | Path, wanted: Sequence[str] | None = None) -> None:
    """Raise DataError that names each shard that is missing, truncated or changed since the index was made.

    wanted: only these shards. A shard that is read by URL while the index was made of files, or the other way round,
    is compared by its size.
    """
    entries = dict(zip(shard_paths(header, index), header["shards"], strict=True))
    names = list(entries if wanted is None else wanted)
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = pool.map(lambda name: _change(name, entries[name]), names)
        wrong = [f"{name} {reason}" for name, reason in zip(names, reasons, strict=True) if reason]
    if wrong:
        shown = "\n  ".join(wrong[:SHOWN])
        folder = str(index).rpartition("/")[0] or "."
        raise DataError(
            f"{plural(len(wrong), 'shard')} changed since {index} was made; if that is right, run vae3d index {folder} "
            f"again:\n  {shown}"
        )


def _change(path: str, entry: Mapping[str, Any]) -> str | None:
    try:
        shard = find_shard(path)
    except DataError as error:
        reason = str(error)
        return reason.removeprefix(f"{path}: ") if reason.startswith(path) else reason
    if shard.bytes != entry["bytes"]:
        return f"has {shard.bytes} bytes; it had {entry['bytes']}"
    same_kind = shard.stamp.partition(":")[0] == entry["stamp"].partition(":")[0]
    return "has another modification time" if same_kind and shard.stamp != entry["stamp"] else None

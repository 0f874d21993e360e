"""Index of tar shards (see samples.py), so that every sample is one range read.

An index is an Arrow file, memory-mapped, with one row per sample: shard (dictionary) and the columns of rows.py;
columns without a value are left out. Its metadata holds the list of shards with sizes and stamps (modification time, or
ETag), so a changed shard is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vae3d.arguments import Range, check_fields
from vae3d.data.media import DataError
from vae3d.data.storage.cache import alone, cache_folder
from vae3d.data.storage.files import local_copy
from vae3d.data.storage.paths import is_url, local_name
from vae3d.data.storage.stores import StorageError
from vae3d.data.tars.rows import FLOATS, INTEGERS, KEY, SCHEMA, media_rows
from vae3d.data.tars.samples import Shard, find_shard
from vae3d.data.workers import pool_errors
from vae3d.hashing import json_hash
from vae3d.io import atomic_write, naming
from vae3d.progress import progress
from vae3d.text import one_line, plural

INDEX = "index.arrow"
VERSION = 1  # of the index
SHOWN = 10  # errors in a message
ROWS_PER_BATCH = 2**20
THREADS = 16  # of remote shards, which wait for the network
INTEGER_TYPES = ((pa.int8(), 7), (pa.int16(), 15), (pa.int32(), 31), (pa.int64(), 63))
LATENTS = ("mean", "std", "sample")  # columns of an index of latents
Scan = Callable[[Shard], pa.Table]  # the rows of a shard


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
    with alone(parts, "rows of shards that are being indexed"):
        return _build(shards, out, settings, scan, probe, workers, parts)


def _build(
    shards: Sequence[Shard], out: Path, settings: Settings, scan: Scan | None, probe: bool, workers: int, parts: Path
) -> pa.Table:
    """build_index with a folder for the rows of each shard, which no other process uses meanwhile."""
    with naming(out):  # tried before shards are read, which may take hours
        out.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out.parent).close()
    with naming(parts):
        parts.mkdir(exist_ok=True)
    tables = {} if probe else _kept(out, shards, settings)
    todo = [shard for shard in shards if shard.path not in tables]
    scan = scan or partial(media_rows, media=settings.media, probe=probe)
    work = partial(_index_shard, folder=parts, settings=settings, probe=probe, scan=scan)
    errors = []
    bar = progress(total=len(shards), unit="shard", desc="indexing")
    with pool_errors("indexes shards"), _executor(todo, workers) as pool, bar:
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
        folder = shlex.quote(str(index).rpartition("/")[0] or ".")
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

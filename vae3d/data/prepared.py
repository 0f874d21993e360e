"""Large tables, prepared once: read, checked and hashed into $VAE3D_CACHE/tables/KEY, then mapped into memory.

    KEY/table.arrow             every row of the source, with hashes; KEY: of the settings of the source, and path, size
                                and time of its files
    KEY/about.json              notes of the source, and other files that the rows lie in, with size and time
    KEY/missing.npy             rows whose file was not there, of sources that look for their files
    KEY/selection-SETTINGS/     rows to train on and rows held out, for settings that choose them
        train.arrow, val.arrow  columns row (in table.arrow), num_frames, height, width, fps, length (frames of the
                                longest clip) and by_length (rows in a stable order of their lengths)
        errors.arrow, skipped.arrow, fingerprint.npz, about.json

A run starts by opening these files, which takes no longer for more rows. The first process to need one makes it; others
wait. Folders that no run has opened for KEPT_DAYS days are deleted when another table is prepared, and those opened
longest ago if all together have more than KEPT_BYTES.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock

from vae3d.data.file_table import (
    CHUNK,
    NAMES,
    TEXT,
    ArrowFile,
    FileTable,
    clip_rule,
    compact,
    take,
    text_array,
    write_arrow,
)
from vae3d.data.fingerprint import GroupedFingerprint, fact_hashes, grouped, row_hashes
from vae3d.data.hugging_face import HuggingFace
from vae3d.data.image_folder import ImageFolder
from vae3d.data.json_clips import JsonClips, read_list
from vae3d.data.media import DataError
from vae3d.data.parts import path_hash
from vae3d.data.probe import (
    PART,
    Metadata,
    ProbeResults,
    Ranks,
    fill_metadata,
    probe,
    read_files,
    read_metadata,
    results_for_paths,
    results_for_table,
)
from vae3d.data.readers import is_image
from vae3d.data.rows import (
    NUMBERS,
    SPLITS,
    TEXTS,
    Listing,
    exists,
    in_threads,
    invalid_rows,
    mark_missing_files,
    normalise_rows,
)
from vae3d.data.segments import SEGMENT, count_frames
from vae3d.data.selection import (
    PROBED_IMAGES,
    SHOWN,
    check_broken_share,
    evenly_spaced,
    is_held_out,
    skipped_note,
    too_small,
    upscaled_notes,
    why_too_small,
)
from vae3d.data.sources import Folder, Source, Table
from vae3d.data.storage import cache_folder, is_stored, is_url, size_and_version
from vae3d.data.tables import count_rows, of_copy, table_pieces
from vae3d.data.versions import file_stamp
from vae3d.data.webdataset import WebDataset
from vae3d.hashing import json_hash
from vae3d.io import TMP_NAME, FileError, atomic_dir, naming, remove, write_json
from vae3d.progress import progress
from vae3d.seeding import seed_of

if TYPE_CHECKING:
    import pandas as pd

    from vae3d.data.clips import ClipSettings

Preparable = Table | JsonClips | HuggingFace | WebDataset | Folder | ImageFolder
LARGE = 100_000  # rows; every process reads a smaller table itself
SMALL_FILE = 2**20  # bytes; a smaller file is not worth counting its rows
KEPT_DAYS = 30
KEPT_BYTES = 50 * 2**30  # on disk, of all tables, before another one is prepared
VERSION = 2
WORKERS = 8
LABEL_IS_NUMBER = "label_is_number"  # labels are stored as texts, and hashed as what they were
LISTED = 1000  # files that a run names one by one


@dataclass(frozen=True)
class Selection:
    """Rows chosen from a prepared table. errors: (path, reason) of the first LISTED that cannot be used. skipped:
    likewise of files that are too small. notes: lines for the log."""

    train: FileTable
    val: FileTable
    fingerprint: GroupedFingerprint
    errors: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    notes: list[str]


class Large(NamedTuple):
    """A source of many rows. folder: of its prepared table. listing: what a Folder or ImageFolder lists; None: another
    process has it, or it is another source."""

    source: Preparable
    folder: Path
    listing: Listing | None = None


def find_large(source: Source, ranks: Ranks) -> tuple[Large | None, Listing | None]:
    """A source with more than LARGE rows, or that was prepared before, of those that can be prepared; else what was
    listed of it, if anything was.

    Folders are listed by the main process alone. All ranks must call it at the same time. Raises DataError.
    """
    if isinstance(source, Folder) or (isinstance(source, ImageFolder) and source.is_folder()):
        listing: Listing | None = None
        found: str | DataError | None = None
        if ranks.rank == 0:
            try:
                listing = source.listing()
                found = folder_of(source, listing).name if len(listing.names) > LARGE else None
            except DataError as error:
                found = error
        name = ranks.of_main(found)
        return (None, listing) if name is None else (Large(source, _tables() / name, listing), None)
    folder = _folder_if_large(source)
    return None if folder is None else Large(source, folder), None


def _folder_if_large(source: Source) -> Path | None:
    if isinstance(source, Table | JsonClips):
        file = _file(source)
        if not file.is_file() or file.stat().st_size < SMALL_FILE:
            return None
        folder, count = folder_of(source), lambda: count_rows(file)
    elif isinstance(source, WebDataset):
        folder, count = folder_of(source), lambda: sum(len(opened.table) for opened in source.indices())
    elif isinstance(source, HuggingFace) and os.path.isdir(source.path) and not source.streaming:
        folder, count = folder_of(source), lambda: sum(source.open().counts.values())
    else:  # if it cannot be read, its method `table` says why
        return None
    return folder if (folder / "table.arrow").is_file() or count() > LARGE else None


def _tables() -> Path:
    return cache_folder() / "tables"


def _file(source: Table | JsonClips) -> Path:
    """The source's file; of one in a store, its copy in the cache."""
    return of_copy(Path, source.path) if is_stored(source.path) else Path(source.path)


def _top(source: Folder | ImageFolder) -> str:
    return str(source.path) if is_stored(source.path) else os.path.abspath(source.path)


def _root(source: Table | JsonClips) -> str:
    return str(source.root) if is_url(source.root) else os.path.abspath(source.root)


def folder_of(source: Preparable, listing: Listing | None = None) -> Path:
    """Where its prepared table is. listing: of a Folder or ImageFolder."""
    return _tables() / json_hash([*_versions(source, listing), VERSION])


def _versions(source: Preparable, listing: Listing | None) -> list[Any]:
    """What a source's table depends on."""
    if isinstance(source, Folder | ImageFolder):
        digest = hashlib.sha256()
        for name in listing.names:
            digest.update(os.fsencode(name) + b"\0")
        return [type(source).__name__, _top(source), digest.hexdigest()]
    if isinstance(source, WebDataset):
        files = [[opened.file, size_and_version(opened.file), opened.split] for opened in source.indices()]
        return [source.paths, source.val_paths, files]
    if isinstance(source, HuggingFace):
        return ["dataset", *source.versions()]
    file = _file(source)
    stat = file.stat()
    version = str(file) if is_stored(source.path) else stat.st_mtime_ns  # a copy is named by the version of the object
    path = str(source.path) if is_stored(source.path) else os.path.abspath(source.path)
    rule = ["list", source.val_share] if isinstance(source, JsonClips) else []
    return [path, _root(source), stat.st_size, version, *rule]


# --- the table


def prepare(large: Large) -> FileTable:
    """The rows of a source, mapped into memory; prepared now if they are not yet. Sets the notes of the source. Raises
    DataError as `table` of the source does, and FileError if the cache folder cannot be written."""
    source, folder, _ = large
    if not _is_current(folder):
        with _alone(folder):
            if not _is_current(folder):
                delete_unused(folder.parent)
                with naming(folder), atomic_dir(folder) as tmp:
                    _convert(large, tmp)
    with suppress(OSError):  # of a folder that others wrote
        os.utime(folder)  # when it was last used
    if (notes := json.loads((folder / "about.json").read_text()).get("notes")) is not None:
        source.notes = notes
    return FileTable(ArrowFile(folder / "table.arrow"))


def _is_current(folder: Path) -> bool:
    """Whether a prepared table is there, the files that its rows lie in are as they were, and those that were not there
    are still missing."""
    if not (folder / "table.arrow").is_file():
        return False
    about = json.loads((folder / "about.json").read_text())
    if any(file_stamp(file) != stamp for file, stamp in about.get("files", ())):
        return False
    if not (folder / "missing.npy").is_file():
        return True
    missing = FileTable(ArrowFile(folder / "table.arrow")).paths(np.load(folder / "missing.npy"))
    return not any(in_threads(exists, missing).values())


def delete_unused(folder: Path) -> None:
    """Delete prepared tables that no run has opened for KEPT_DAYS days, those opened longest ago if they have more than
    KEPT_BYTES together, and what killed processes left."""
    total = 0
    folders = sorted(((path.stat().st_mtime, path) for path in folder.iterdir() if path.is_dir()), reverse=True)
    for opened, table in folders:  # the last opened first
        days = (time.time() - opened) / 86400
        if TMP_NAME.fullmatch(table.name):  # another process may be writing it now
            unwanted = days > 1
        else:
            total += sum(file.stat().st_size for file in table.rglob("*"))
            unwanted = total > KEPT_BYTES or days > KEPT_DAYS
        if unwanted:
            remove(table)
            table.with_name(f"{table.name}.lock").unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process of all is inside; the others wait. Raises FileError if the cache folder cannot be written."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise FileError(
            f"{folder.parent} cannot be written ({error.strerror}); tables of more than {LARGE:,} rows are prepared "
            "there; set VAE3D_CACHE to a writable folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _convert(large: Large, folder: Path) -> None:
    """Write table.arrow, about.json and missing.npy."""
    source = large.source
    if isinstance(source, Folder | ImageFolder):
        _convert_listing(large, folder)
    elif isinstance(source, Table):
        _convert_file(source, folder)
    elif isinstance(source, JsonClips):
        _convert_list(source, folder)
    elif isinstance(source, HuggingFace):
        _convert_dataset(source, folder)
    else:
        _convert_index(source, folder)


def _convert_file(table: Table, folder: Path) -> None:
    file, root = _file(table), _root(table)
    pieces = table_pieces(file)
    first = next(pieces)
    table.check_columns(first.column_names, len(first))
    schema = _schema(first.column_names, root)
    batches = _in_processes(chain([first], pieces), root, schema)
    rows, styles = _write(folder / "table.arrow", schema, batches, count_rows(file), Path(table.path).name)
    write_json(folder / "about.json", {"table": str(table.path), "rows": rows, "one_name_per_file": len(styles) <= 1})


def _convert_list(source: JsonClips, folder: Path) -> None:
    """The split by hashes needs all files: rows are written without it first."""
    root, listed = _root(source), read_list(source.path, by_line=True)
    names = ["num_frames" if name == "frames" else name for name in listed.given]
    by_hash = source.splits_by_hash(listed)
    schema = _schema([*names, *["split"] * by_hash], root)
    files, named, missing = [], [], []

    def looked_for() -> Iterator[pd.DataFrame]:
        for piece in source.pieces(listed, CHUNK):
            sound = piece["error"].isna()
            mark_missing_files(piece)
            missing.append(piece["row"][sound & piece["error"].notna()].to_numpy() - 1)
            files.append(_path_hashes(piece["path"]))
            named.append(np.array([seed_of(name) for name in piece["name"]], np.int64))
            yield piece

    unsplit = pa.schema(
        [field for field in schema if field.name not in ("identity", "facts", "split")], schema.metadata
    )
    first, first_schema = (folder / "unsplit.arrow", unsplit) if by_hash else (folder / "table.arrow", schema)
    batches = (_arrays(piece, root, first_schema) for piece in looked_for())
    rows, styles = _write(first, first_schema, batches, listed.rows, Path(source.path).name)
    hashes, files = np.concatenate(named), np.concatenate(files)
    table = FileTable(ArrowFile(first))
    if by_hash:
        everything = np.arange(rows)
        hashes = _equal_in_a_file(table, everything, hashes, files)
        split = np.where(source.held_out(hashes, table.missing("error")), "val", "train")

        def with_split() -> Iterator[tuple[pa.RecordBatch, set[str]]]:
            for begin in range(0, rows, CHUNK):
                piece = everything[begin : begin + CHUNK]
                yield _arrays(_typed(table, piece).assign(split=split[piece]), root, schema)
                table.base.release()

        _write(folder / "table.arrow", schema, with_split(), rows, f"the split of {Path(source.path).name}")
        first.unlink()
        table = FileTable(ArrowFile(folder / "table.arrow"))
    np.save(folder / "missing.npy", np.concatenate(missing))
    of_split = {name: table.equals("split", name) for name in SPLITS}
    notes = source.notes_of(listed, files, table.missing("error"), of_split)
    about = {"table": str(source.path), "rows": rows, "one_name_per_file": len(styles) <= 1, "notes": notes}
    write_json(folder / "about.json", about)


def _convert_dataset(source: HuggingFace, folder: Path) -> None:
    opened = source.open()
    rows = sum(opened.counts.values())
    files = [[file, file_stamp(file)] for file in opened.files()]
    _write_rows(folder / "table.arrow", opened.given(), source.pieces(CHUNK), rows, "the dataset")
    about = {"table": opened.folder, "rows": rows, "one_name_per_file": False, "notes": opened.notes(), "files": files}
    write_json(folder / "about.json", about)


def _convert_listing(large: Large, folder: Path) -> None:
    source, listing = large.source, large.listing
    if listing is None:  # the main process is another machine, with a cache of its own
        listing = source.listing()
        if folder_of(source, listing) != large.folder:
            raise DataError(f"{source.path} does not hold the same files on all machines, or they change now")
    rows = len(listing.names)
    given = [*["split"] * (listing.splits is not None), *listing.numbers]
    pieces = (listing.table(slice(first, first + CHUNK)) for first in range(0, rows, CHUNK))
    _write_rows(folder / "table.arrow", given, pieces, rows, "the files of the folder")
    about = {"table": str(source.path), "rows": rows, "one_name_per_file": True, "notes": getattr(source, "notes", [])}
    write_json(folder / "about.json", about)


def _convert_index(source: WebDataset, folder: Path) -> None:
    given = [name for opened in source.indices() for name in opened.table.column_names]
    given += ["split"] * any(opened.split is not None for opened in source.indices())
    count = sum(len(opened.table) for opened in source.indices())
    _write_rows(folder / "table.arrow", given, source.pieces(CHUNK), count, "the index")
    about = {"table": [opened.file for opened in source.indices()], "rows": count, "one_name_per_file": True}
    write_json(folder / "about.json", about)


def _write_rows(file: Path, given: Sequence[str], pieces: Iterable[pd.DataFrame], count: int, name: str) -> None:
    """Write rows whose paths do not follow from their names."""
    schema = _schema(given, "").insert(0, pa.field("path", NAMES))
    _write(file, schema, (_arrays(piece, "", schema) for piece in pieces), count, name)


def _write(
    file: Path, schema: pa.Schema, batches: Iterable[tuple[pa.RecordBatch, set[str]]], count: int, name: str
) -> tuple[int, set[str]]:
    """Write batches with a bar of the progress. Returns how many rows there were, and how files are named."""
    styles: set[str] = set()
    rows = 0
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
        progress(total=count, desc=f"preparing {name}", unit="row", unit_scale=True) as bar,
    ):
        for batch, style in batches:
            writer.write_batch(batch)
            styles |= style
            rows += batch.num_rows
            bar.update(batch.num_rows)
    return rows, styles


def _schema(given: Sequence[str], root: str) -> pa.Schema:
    texts = [name for name in TEXTS if name in given or name == "error"]
    fields = [("name", NAMES), *((name, TEXT) for name in texts)]
    fields += [(LABEL_IS_NUMBER, pa.bool_())] if "label" in given else []
    fields += [(name, pa.float64()) for name in (*NUMBERS, *SEGMENT) if name in given]
    fields += [("identity", pa.int64()), ("facts", pa.int64())]  # hashes
    fields += [] if "split" in given else [("file", pa.int64())]
    return pa.schema(fields, {b"root": os.fsencode(root)})


def _in_processes(
    pieces: Iterable[pa.Table], root: str, schema: pa.Schema
) -> Iterator[tuple[pa.RecordBatch, set[str]]]:
    """_converted of every piece, in order; of a few at a time, in processes."""
    workers = min(WORKERS, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1
    if workers == 1:
        yield from (_converted(_known(piece), root, schema) for piece in pieces)
        return
    waiting: deque[Future] = deque()
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:  # as the workers of a DataLoader
        for piece in pieces:
            waiting.append(pool.submit(_converted, _known(piece), root, schema))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _known(piece: pa.Table) -> pa.Table:
    """The columns that a table of files may have."""
    return piece.select([name for name in piece.column_names if name in ("path", *TEXTS, *NUMBERS, *SEGMENT)])


def _converted(raw: pa.Table, root: str, schema: pa.Schema) -> tuple[pa.RecordBatch, set[str]]:
    """The rows of table.arrow of a piece of the file, and how its names are given: relative, absolute, other."""
    return _arrays(normalise_rows(raw.to_pandas(use_threads=False, integer_object_nulls=True), root), root, schema)


def _arrays(table: pd.DataFrame, root: str, schema: pa.Schema) -> tuple[pa.RecordBatch, set[str]]:
    """_converted of rows as normalise_rows gives them."""
    arrays: dict[str, pa.Array] = {"name": pa.array([os.fsencode(name) for name in table["name"]], NAMES)}
    for name in schema.names:
        if name == "path":
            arrays[name] = pa.array(list(map(os.fsencode, table["path"])), NAMES)
        elif name == LABEL_IS_NUMBER:
            arrays[name] = pa.array([_is_number(label) for label in table["label"].tolist()], pa.bool_())
        elif name in TEXTS:
            given = table[name].where(table[name].isin(SPLITS), None) if name == "split" else table[name]
            arrays[name] = text_array(given)
        elif name in (*NUMBERS, *SEGMENT):
            arrays[name] = pa.array(table[name].to_numpy(dtype=float))
    if "facts" in schema.names:
        arrays["identity"], arrays["facts"] = pa.array(row_hashes(table)), pa.array(fact_hashes(table))
    if "file" in schema.names:
        arrays["file"] = pa.array([seed_of(name) for name in table["name"]], pa.int64())
    sound = table[table["error"].isna()]
    names, paths = sound["name"].to_numpy(), sound["path"].to_numpy()
    prefix = os.path.join(root, "")
    relative, absolute = paths == np.array([prefix + name for name in names], object), paths == names
    style = {"relative"} if relative.all() else {"absolute"} if absolute.all() else {"relative", "other"}
    return pa.record_batch([arrays[name] for name in schema.names], schema=schema), style if len(sound) else set()


def _is_number(label: Any) -> bool:
    return isinstance(label, int | float | np.number) and not isinstance(label, bool) and label == label


def _number(text: str) -> int | float:
    return int(text) if text.removeprefix("-").isdigit() else float(text)


def _typed(table: FileTable, rows: np.ndarray) -> pd.DataFrame:
    """table.to_pandas(rows), with those labels as numbers that were numbers, for their hashes."""
    found = table.to_pandas(rows)
    if LABEL_IS_NUMBER in table.base.table.column_names:
        numbers = take(table.base.table[LABEL_IS_NUMBER], rows).to_numpy()
        found.loc[numbers, "label"] = found.loc[numbers, "label"].map(_number)
    return found


# --- a selection of its rows


def select(
    large: Large,
    table: FileTable,
    settings: ClipSettings,
    needed: Sequence[str],
    num_val_files: int,
    max_broken: float,
    ranks: Ranks,
) -> Selection:
    """Rows to train on and rows held out, as loader.read_tables chooses them from a small table. needed: columns that
    every row must have. Files that did not open when the selection was made are tried again.

    All ranks must call it at the same time. Raises DataError if more than the share `max_broken` cannot be used, or if
    nothing is left to train on.
    """
    chosen_by = [needed, num_val_files, settings.stride, settings.fps, settings.min_side]
    sizes = [settings.height, settings.width, settings.short_side]  # of which a note depends
    folder = large.folder / f"selection-{json_hash([chosen_by, sizes])}"
    made = _time_of(folder)
    if not ranks.all(made is not None and not _opens_now(folder, ranks)):
        results = _results(large)
        probe_unknown(table, needed, results, ranks)
        with _alone(folder.parent):
            if _time_of(folder) == made:  # else another process has just made it again
                with naming(folder), atomic_dir(folder) as tmp:
                    _choose(tmp, folder, table, settings, needed, num_val_files, max_broken, results)
    about = json.loads((folder / "about.json").read_text())
    errors, skipped = (ArrowFile(folder / f"{name}.arrow").table for name in ("errors", "skipped"))
    check_broken_share(_pairs(errors, SHOWN), len(errors), about["rows"], max_broken)
    train, val = (FileTable(table.base, ArrowFile(folder / f"{name}.arrow")) for name in ("train", "val"))
    with np.load(folder / "fingerprint.npz") as arrays:
        fingerprint = GroupedFingerprint(arrays["groups"], arrays["order"])
    notes = list(about["notes"])
    for name, listed, what in (("errors", errors, "cannot be used"), ("skipped", skipped, "are too small")):
        if len(listed) > LISTED:
            notes.append(f"{folder / name}.arrow lists all {len(listed)} files that {what}")
    return Selection(train, val, fingerprint, _pairs(errors, LISTED), _pairs(skipped, LISTED), notes)


def _results(large: Large) -> ProbeResults:
    """Where the probe's results of a source are kept: of a dataset, whose Arrow files may be written again with other
    rows at the same places, apart for each version."""
    source = large.source
    if isinstance(source, HuggingFace):
        return results_for_paths([str(large.folder)])
    if isinstance(source, Folder | ImageFolder):
        return results_for_paths([_top(source)])
    return results_for_table(source.indices()[0].file if isinstance(source, WebDataset) else source.path)


def _time_of(folder: Path) -> int | None:
    """When a selection was made; None: it is not there."""
    try:
        return (folder / "about.json").stat().st_mtime_ns
    except OSError:
        return None


def _opens_now(folder: Path, ranks: Ranks) -> bool:
    """Whether a file opens that did not when the selection was made, of this rank's share of such files."""
    errors = ArrowFile(folder / "errors.arrow").table
    paths = errors.filter(errors["opened"])["path"].to_pylist()[ranks.rank :: ranks.world_size]
    return any("error" not in metadata for metadata in in_threads(read_metadata, map(os.fsdecode, paths)).values())


def _pairs(errors: pa.Table, count: int) -> list[tuple[str, str]]:
    return [(os.fsdecode(row["path"]), row["reason"]) for row in errors.slice(0, count).to_pylist()]


def probe_unknown(table: FileTable, needed: Sequence[str], results: ProbeResults, ranks: Ranks) -> None:
    """Read this rank's share of the files that nothing is known of, and wait for the other ranks."""
    rows = np.concatenate([np.empty(0, np.int64), *(piece[unknown] for piece, unknown in _pieces(table, needed))])
    with progress(total=len(rows), desc="probing files", unit="row", hidden=ranks.rank > 0 or not len(rows)) as bar:
        for first in range(0, len(rows), PART):
            paths = list(dict.fromkeys(table.paths(rows[first : first + PART])))
            known = results.knows(paths)
            mine = [path for path, found in zip(paths, known, strict=True) if not found and ranks.has(path)]
            read_files(mine, results, hidden=True)
            bar.update(min(PART, len(rows) - first))
    ranks.wait()
    if len(rows):
        results.merge()


def _pieces(table: FileTable, needed: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the rows without an error, and which of them lack a number or are a part of their file."""
    for first in range(0, len(table), CHUNK):
        piece = np.arange(first, min(first + CHUNK, len(table)))
        sound = piece[table.missing("error", piece)]
        lacking = [np.isnan(table.numbers(name, sound)) for name in needed]
        yield sound, np.logical_or.reduce([*lacking, *(~np.isnan(table.numbers(name, sound)) for name in SEGMENT)])
        table.base.release()


def _choose(
    folder: Path,
    final: Path,
    table: FileTable,
    settings: ClipSettings,
    needed: Sequence[str],
    num_val_files: int,
    max_broken: float,
    results: ProbeResults,
) -> None:
    """Write a selection, in memory of about 70 bytes per row. final: where its folder will be. Raises DataError."""
    errors = _Errors(folder / "errors.arrow")
    columns = _filled(table, needed, results, errors)
    errors.close()
    check_broken_share(errors.first, errors.count, len(table), max_broken)
    smaller = too_small(columns["height"], columns["width"], settings.min_side)
    _write_skipped(folder / "skipped.arrow", table, columns, smaller, settings.min_side)
    if smaller.any():
        columns = {name: values[~smaller] for name, values in columns.items()}
    is_val, is_train = _splits(table, columns["row"], num_val_files, final.parent)
    probed = [[m["height"], m["width"]] for m in _some_images(table, columns, results).values() if "error" not in m]
    notes = upscaled_notes(columns["height"], columns["width"], probed, settings)
    if smaller.any():
        notes.append(skipped_note(int(smaller.sum()), settings.min_side))
    if not is_train.any():
        raise DataError("no rows are left to train on; is the `split` column `val` or `test` throughout?")
    order = [np.flatnonzero(is_train).astype(np.int32), np.flatnonzero(is_val).astype(np.int32)]
    pa.default_memory_pool().release_unused()
    for name, rows in (("val", order[1]), ("train", order[0])):
        view = _view(columns, rows, settings, last=name == "train")
        write_arrow(folder / f"{name}.arrow", view.replace_schema_metadata(clip_rule(settings)))
    del view
    rows = np.concatenate(order)
    files = columns["stamp"][rows] if "stamp" in columns else None
    identities = table.numbers("identity", columns["row"][rows])
    fingerprint = grouped(identities, columns["facts"][rows], files)
    np.savez(folder / "fingerprint.npz", groups=fingerprint.groups, order=fingerprint.order)
    write_json(folder / "about.json", {"rows": len(table), "notes": notes})


def _view(columns: dict[str, np.ndarray], rows: np.ndarray, settings: ClipSettings, last: bool) -> pa.Table:
    """The columns of train.arrow or val.arrow. last: the columns of NUMBERS are dropped from `columns`."""
    length = np.empty(len(rows), np.int32)
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        length[first : first + CHUNK] = settings.length(columns["num_frames"][part], columns["fps"][part])
    known = {}
    for name in NUMBERS:
        values = columns.pop(name) if last else columns[name]
        if not np.isnan(values).all():
            known[name] = values[rows]
    del values
    by_length = np.argsort(length, kind="stable").astype(np.int32)
    return pa.table({"row": columns["row"][rows], **known, "length": length, "by_length": by_length})


def _filled(table: FileTable, needed: Sequence[str], results: ProbeResults, errors: _Errors) -> dict[str, np.ndarray]:
    """The usable rows: `row`, the columns of NUMBERS, `facts` (hash) and, if files were probed, `stamp` [rows, 2]."""
    count, place = len(table), 0
    columns: dict[str, np.ndarray] = {"row": np.empty(count, np.int32), "facts": np.empty(count, np.int64)}
    columns |= {name: np.full(count, np.nan, np.float32) for name in NUMBERS}
    errors.add_rows(table, np.concatenate([np.empty(0, np.int64), *_invalid(table)]))
    for piece, unknown in _pieces(table, needed):
        complete = piece[~unknown]
        found = {"row": complete, "facts": table.numbers("facts", complete)}
        found |= {name: table.numbers(name, complete) for name in NUMBERS}
        if unknown.any():
            probed, unread = fill_metadata(_typed(table, piece[unknown]), needed, results, trusted=True)
            probed, outside = count_frames(probed)
            errors.add(unread, opened=True)
            errors.add(outside, opened=False)
            if "stamp" not in columns:
                columns["stamp"] = np.full((count, 2), -1, np.int64)
            new = {"row": probed["row"].to_numpy() - 1, "facts": fact_hashes(probed)}
            new |= {name: probed[name].to_numpy(dtype=float) for name in NUMBERS}
            order = np.argsort(np.concatenate([complete, new["row"]]), kind="stable")
            found = {name: np.concatenate([found[name], new[name]])[order] for name in found}
            stamps = np.concatenate([np.full((len(complete), 2), -1), results.stamps(probed["path"].tolist())])[order]
            columns["stamp"][place : place + len(stamps)] = stamps
        for name, values in found.items():
            if name in NUMBERS and compact(values).dtype == np.float64:
                columns[name] = columns[name].astype(np.float64, copy=False)
            columns[name][place : place + len(values)] = values
        place += len(found["row"])
    return {name: values[:place] for name, values in columns.items()}


def _invalid(table: FileTable) -> Iterator[np.ndarray]:
    for first in range(0, len(table), CHUNK):
        piece = np.arange(first, min(first + CHUNK, len(table)))
        yield piece[~table.missing("error", piece)]


class _Errors:
    """Writes errors.arrow: (path, reason) of rows that cannot be used, and whether the file was opened in vain."""

    def __init__(self, path: Path) -> None:
        self.count, self.first = 0, []
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, ERRORS)

    def add(self, errors: list[tuple[str, str]], opened: bool) -> None:
        self.count += len(errors)
        self.first += errors[: SHOWN - len(self.first)]
        self._writer.write_table(_errors_table(errors, opened))

    def add_rows(self, table: FileTable, rows: np.ndarray) -> None:
        """Add rows with an error of their own."""
        for first in range(0, len(rows), CHUNK):
            self.add(invalid_rows(table.to_pandas(rows[first : first + CHUNK])), opened=False)

    def close(self) -> None:
        self._writer.close()
        self._sink.close()


def _errors_table(errors: list[tuple[str, str]], opened: bool) -> pa.Table:
    rows = [{"path": os.fsencode(path), "reason": reason, "opened": opened} for path, reason in errors]
    return pa.Table.from_pylist(rows, ERRORS)


ERRORS = pa.schema([("path", NAMES), ("reason", TEXT), ("opened", pa.bool_())])


def _write_skipped(
    path: Path, table: FileTable, columns: dict[str, np.ndarray], smaller: np.ndarray, min_side: int | None
) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ERRORS) as writer:
        places = np.flatnonzero(smaller)
        for first in range(0, len(places), CHUNK):
            part = places[first : first + CHUNK]
            paths = table.paths(columns["row"][part])
            reasons = [
                why_too_small(height, width, min_side)
                for height, width in zip(columns["height"][part], columns["width"][part], strict=True)
            ]
            writer.write_table(_errors_table(list(zip(paths, reasons, strict=True)), opened=False))


def _splits(table: FileTable, rows: np.ndarray, num_val_files: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are held out, and which are trained on."""
    if "file" not in table.base.table.column_names:
        if not table.missing("split", rows).all():
            return table.equals("split", "val", rows), table.equals("split", "train", rows)
        hashes = _hashes_of_names(table, rows)
    else:
        hashes = table.numbers("file", rows)
    if not json.loads((folder / "about.json").read_text())["one_name_per_file"]:
        parts = (table.paths(rows[first : first + CHUNK]) for first in range(0, len(rows), CHUNK))
        files = np.concatenate([_path_hashes(part) for part in parts])
        hashes = _equal_in_a_file(table, rows, hashes, files)
    is_val = is_held_out(hashes, num_val_files)
    return is_val, ~is_val


def _hashes_of_names(table: FileTable, rows: np.ndarray) -> np.ndarray:
    parts = (table.names(rows[first : first + CHUNK]) for first in range(0, len(rows), CHUNK))
    return np.concatenate([np.array([seed_of(name) for name in part], np.int64) for part in parts])


def _path_hashes(paths: Iterable[str]) -> np.ndarray:
    return np.array([path_hash(os.fsencode(path)) for path in paths], np.int64)


def _equal_in_a_file(table: FileTable, rows: np.ndarray, hashes: np.ndarray, files: np.ndarray) -> np.ndarray:
    """Hashes of names such that rows of one file have the same, though they name it differently: as file_hashes.
    files: [rows] hashes of the paths."""
    _, file = np.unique(files, return_inverse=True)
    lowest, highest = np.full(len(rows), np.iinfo(np.int64).max), np.full(len(rows), -1)
    np.minimum.at(lowest, file, hashes)
    np.maximum.at(highest, file, hashes)
    several = np.flatnonzero((lowest != highest)[file])
    names: dict[int, str] = {}
    for name, number in zip(table.names(rows[several]), file[several].tolist(), strict=True):
        names[number] = min(name, names.get(number, name))
    hashes = hashes.copy()
    hashes[several] = [seed_of(names[number]) for number in file[several].tolist()]
    return hashes


def _some_images(table: FileTable, columns: dict[str, np.ndarray], results: ProbeResults) -> dict[str, Metadata]:
    """Metadata of up to PROBED_IMAGES images without a size, evenly spaced."""
    unknown = columns["row"][np.isnan(columns["height"]) | np.isnan(columns["width"])]
    images = [
        part[np.fromiter(map(is_image, table.names(part)), bool, len(part))]
        for part in (unknown[first : first + CHUNK] for first in range(0, len(unknown), CHUNK))
    ]
    rows = np.concatenate([np.empty(0, np.int32), *images])
    chosen = table.paths(rows[evenly_spaced(len(rows), PROBED_IMAGES)])
    return probe(chosen, results, trusted=True) if chosen else {}

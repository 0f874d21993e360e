"""The rows of a large source, as prepared.py keeps them: one class per kind of source, in the order of rows_of.

    TableRows     CSV, TSV, parquet; converted in processes
    ListRows      JSON lists, whose split may need all files
    IndexRows     indices of tar shards
    DatasetRows   datasets of Hugging Face
    FolderRows    files of a folder, which only the main process lists

Each is a `Rows`, and writes what it has piece by piece.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cached_property
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from vae3d.data.file_table import CHUNK, NAMES, TEXT, ArrowFile, FileTable, take, text_array
from vae3d.data.fingerprint import fact_hashes, row_hashes
from vae3d.data.hugging_face import HuggingFace
from vae3d.data.image_folder import ImageFolder
from vae3d.data.json_clips import JsonClips, read_list
from vae3d.data.parts import path_hash
from vae3d.data.paths import is_stored, is_url
from vae3d.data.probe import ProbeResults, results_for_paths, results_for_table
from vae3d.data.rows import NUMBERS, SPLITS, TEXTS, Listing, mark_missing_files, normalise_rows
from vae3d.data.segments import SEGMENT
from vae3d.data.sources import Folder, Source, Table
from vae3d.data.storage import size_and_version
from vae3d.data.tables import count_rows, of_copy, table_pieces
from vae3d.data.versions import file_stamp
from vae3d.data.webdataset import WebDataset
from vae3d.progress import progress
from vae3d.seeding import seed_of

if TYPE_CHECKING:
    import pandas as pd

SMALL_FILE = 2**20  # bytes; a smaller file is not worth counting its rows
WORKERS = 8
LABEL_IS_NUMBER = "label_is_number"  # labels are stored as texts, and hashed as what they were


class Rows(Protocol):
    """The rows of a source. name: of the source, for messages. All methods raise DataError as its `table` does."""

    source: Any
    name: str

    def versions(self) -> list[Any]:
        """What they depend on: settings of the source, and path, size and time of its files."""

    def count(self) -> int:
        """About how many there are."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write table.arrow into a folder, and missing.npy if files were looked for. Returns what about.json says:
        one_name_per_file (whether all rows of a file name it alike), notes of the source, and files: other files that
        the rows lie in, with their stamps."""

    def results(self, folder: Path) -> ProbeResults:
        """What was probed before of their files. folder: where the table is kept."""


def rows_of(source: Source) -> Rows | None:
    """The rows of a source but a folder; None if it cannot be prepared, or is too small for it."""
    if isinstance(source, Table | JsonClips):
        if not (file := _file(source)).is_file() or file.stat().st_size < SMALL_FILE:
            return None
        return TableRows(source) if isinstance(source, Table) else ListRows(source)
    if isinstance(source, WebDataset):
        return IndexRows(source)
    if isinstance(source, HuggingFace) and os.path.isdir(source.path) and not source.streaming:
        return DatasetRows(source)
    return None  # if it cannot be read, its method `table` says why


def is_folder(source: Source) -> bool:
    """Whether a source must be listed, for FolderRows."""
    return isinstance(source, Folder) or (isinstance(source, ImageFolder) and source.is_folder())


def _file(source: Table | JsonClips) -> Path:
    """The source's file; of one in a store, its copy in the cache."""
    return of_copy(Path, source.path) if is_stored(source.path) else Path(source.path)


class TableRows:
    def __init__(self, source: Table | JsonClips) -> None:
        self.source, self.name, self.file = source, str(source.path), _file(source)
        self.root = str(source.root) if is_url(source.root) else os.path.abspath(source.root)

    def versions(self) -> list[Any]:
        stat = self.file.stat()
        if is_stored(self.source.path):  # the name of the copy has the version of the object
            return [str(self.source.path), self.root, stat.st_size, str(self.file)]
        return [os.path.abspath(self.source.path), self.root, stat.st_size, stat.st_mtime_ns]

    def count(self) -> int:
        return count_rows(self.file)

    def write(self, folder: Path) -> dict[str, Any]:
        pieces = table_pieces(self.file)
        first = next(pieces)
        self.source.check_columns(first.column_names, len(first))
        schema = _schema(first.column_names, self.root)
        batches = _in_processes(chain([first], pieces), self.root, schema)
        _, styles = _write(folder / "table.arrow", schema, batches, self.count(), Path(self.name).name)
        return {"one_name_per_file": len(styles) <= 1}

    def results(self, folder: Path) -> ProbeResults:
        return results_for_table(self.source.path)


class ListRows(TableRows):
    def versions(self) -> list[Any]:
        return [*super().versions(), "list", self.source.val_share]

    def write(self, folder: Path) -> dict[str, Any]:
        """The split by hashes needs all files: rows are written without it first."""
        source, root, listed = self.source, self.root, read_list(self.source.path, by_line=True)
        names = ["num_frames" if name == "frames" else name for name in listed.given]
        by_hash = source.splits_by_hash(listed)
        schema = _schema([*names, *["split"] * by_hash], root)
        files, named, missing = [], [], []

        def looked_for() -> Iterator[pd.DataFrame]:
            for piece in source.pieces(listed, CHUNK):
                sound = piece["error"].isna()
                mark_missing_files(piece)
                missing.append(piece["row"][sound & piece["error"].notna()].to_numpy() - 1)
                files.append(path_hashes(piece["path"]))
                named.append(np.array([seed_of(name) for name in piece["name"]], np.int64))
                yield piece

        unsplit = pa.schema(
            [field for field in schema if field.name not in ("identity", "facts", "split")], schema.metadata
        )
        first, first_schema = (folder / "unsplit.arrow", unsplit) if by_hash else (folder / "table.arrow", schema)
        batches = (_arrays(piece, root, first_schema) for piece in looked_for())
        rows, styles = _write(first, first_schema, batches, listed.rows, Path(self.name).name)
        hashes, files = np.concatenate(named), np.concatenate(files)
        table = FileTable(ArrowFile(first))
        if by_hash:
            everything = np.arange(rows)
            hashes = equal_in_a_file(table, everything, hashes, files)
            split = np.where(source.held_out(hashes, table.missing("error")), "val", "train")

            def with_split() -> Iterator[tuple[pa.RecordBatch, set[str]]]:
                for begin in range(0, rows, CHUNK):
                    piece = everything[begin : begin + CHUNK]
                    yield _arrays(with_labels(table, piece).assign(split=split[piece]), root, schema)
                    table.base.release()

            _write(folder / "table.arrow", schema, with_split(), rows, f"the split of {Path(self.name).name}")
            first.unlink()
            table = FileTable(ArrowFile(folder / "table.arrow"))
        np.save(folder / "missing.npy", np.concatenate(missing))
        of_split = {name: table.equals("split", name) for name in SPLITS}
        notes = source.notes_of(listed, files, table.missing("error"), of_split)
        return {"one_name_per_file": len(styles) <= 1, "notes": notes}


class IndexRows:
    def __init__(self, source: WebDataset) -> None:
        self.source, self.indices = source, source.indices()
        self.name = ", ".join(opened.file for opened in self.indices)

    def versions(self) -> list[Any]:
        """The shards that are used too: there may be more of them at the next start, of the same pattern and index."""
        files = [[opened.file, size_and_version(opened.file), opened.used(), opened.split] for opened in self.indices]
        return [self.source.paths, self.source.val_paths, files]

    def count(self) -> int:
        return sum(len(opened.table) for opened in self.indices)

    def write(self, folder: Path) -> dict[str, Any]:
        given = [name for opened in self.indices for name in opened.table.column_names]
        given += ["split"] * any(opened.split is not None for opened in self.indices)
        _write_rows(folder, given, self.source.pieces(CHUNK), self.count(), "the index")
        return {"one_name_per_file": True}

    def results(self, folder: Path) -> ProbeResults:
        return results_for_table(self.indices[0].file)


class DatasetRows:
    def __init__(self, source: HuggingFace) -> None:
        self.source, self.name = source, str(source.path)

    def versions(self) -> list[Any]:
        return ["dataset", *self.source.versions()]

    def count(self) -> int:
        return sum(self.source.open().counts.values())

    def write(self, folder: Path) -> dict[str, Any]:
        opened = self.source.open()
        files = [[file, file_stamp(file)] for file in opened.files()]
        _write_rows(folder, opened.given(), self.source.pieces(CHUNK), self.count(), "the dataset")
        return {"one_name_per_file": False, "notes": opened.notes(), "files": files}

    def results(self, folder: Path) -> ProbeResults:
        """Apart for each version: Arrow files may be written again with other rows at the same places."""
        return results_for_paths([str(folder)])


class FolderRows:
    """Lists the folder when it is first asked for its files."""

    def __init__(self, source: Folder | ImageFolder) -> None:
        self.source = source
        self.name = str(source.path) if is_stored(source.path) else os.path.abspath(source.path)

    @cached_property
    def listing(self) -> Listing:
        return self.source.listing()

    def versions(self) -> list[Any]:
        digest = hashlib.sha256()
        for name in self.listing.names:
            digest.update(os.fsencode(name) + b"\0")
        return [type(self.source).__name__, self.name, digest.hexdigest()]

    def count(self) -> int:
        return len(self.listing.names)

    def write(self, folder: Path) -> dict[str, Any]:
        listing, rows = self.listing, self.count()
        given = [*["split"] * (listing.splits is not None), *listing.numbers]
        pieces = (listing.table(slice(first, first + CHUNK)) for first in range(0, rows, CHUNK))
        _write_rows(folder, given, pieces, rows, "the files of the folder")
        return {"one_name_per_file": True, "notes": getattr(self.source, "notes", [])}

    def results(self, folder: Path) -> ProbeResults:
        return results_for_paths([self.name])


def _write_rows(folder: Path, given: Sequence[str], pieces: Iterable[pd.DataFrame], count: int, name: str) -> None:
    """Write table.arrow of rows whose paths do not follow from their names."""
    schema = _schema(given, "").insert(0, pa.field("path", NAMES))
    _write(folder / "table.arrow", schema, (_arrays(piece, "", schema) for piece in pieces), count, name)


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


def with_labels(table: FileTable, rows: np.ndarray) -> pd.DataFrame:
    """table.to_pandas(rows), with those labels as numbers that were numbers, for their hashes."""
    found = table.to_pandas(rows)
    if LABEL_IS_NUMBER in table.base.table.column_names:
        numbers = take(table.base.table[LABEL_IS_NUMBER], rows).to_numpy()
        found.loc[numbers, "label"] = found.loc[numbers, "label"].map(_number)
    return found


def path_hashes(paths: Iterable[str]) -> np.ndarray:
    return np.array([path_hash(os.fsencode(path)) for path in paths], np.int64)


def equal_in_a_file(table: FileTable, rows: np.ndarray, hashes: np.ndarray, files: np.ndarray) -> np.ndarray:
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

"""The rows of a large source, as table.py keeps them: one class per kind of source, in the order of open_rows.

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

from vae3d.data.sources.folder import Folder
from vae3d.data.sources.hugging_face import HuggingFace
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.sources.json_clips import JsonClips, read_list
from vae3d.data.sources.open_source import Source
from vae3d.data.sources.table import Table
from vae3d.data.sources.table_files import count_rows, of_copy, table_pieces
from vae3d.data.sources.webdataset import WebDataset
from vae3d.data.storage.files import size_and_version
from vae3d.data.storage.paths import is_stored, is_url
from vae3d.data.table.file_table import CHUNK, ArrowFile, FileTable
from vae3d.data.table.probe import ProbeResults, results_for_paths, results_for_table
from vae3d.data.table.row_arrays import equal_in_a_file, path_hashes, row_arrays, schema_of, with_labels
from vae3d.data.table.rows import NUMBERS, SPLITS, TEXTS, Listing, mark_missing_files, normalise_rows
from vae3d.data.table.segments import SEGMENT
from vae3d.data.table.versions import file_stamp
from vae3d.data.workers import pool_errors, processor_count
from vae3d.progress import progress
from vae3d.seeding import seed_of

if TYPE_CHECKING:
    import pandas as pd

SMALL_FILE = 2**20  # bytes; a smaller file is not worth counting its rows
WORKERS = 8


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


def open_rows(source: Source) -> Rows | None:
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


def results_of(source: Source, prepared: Path | None = None) -> ProbeResults | None:
    """What was probed before of the files of a source: beside its table, list or index, if it has one; else in the
    cache folder. prepared: of its prepared table; None: it is small. None: by the paths of the files, see probe."""
    if isinstance(source, Table | JsonClips):
        return results_for_table(source.path)
    if isinstance(source, WebDataset):
        return results_for_table(source.indices()[0].file)
    if is_folder(source):
        return results_for_paths([_name_of_folder(source)])
    # Of each version of a dataset apart: Arrow files may be written again with other rows at the same places.
    return None if prepared is None else results_for_paths([str(prepared)])


def _name_of_folder(source: Folder | ImageFolder) -> str:
    return str(source.path) if is_stored(source.path) else os.path.abspath(source.path)


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
        schema = schema_of(first.column_names, self.root)
        batches = _in_processes(chain([first], pieces), self.root, schema)
        _, styles = _write(folder / "table.arrow", schema, batches, self.count(), Path(self.name).name)
        return {"one_name_per_file": len(styles) <= 1}


class ListRows(TableRows):
    def versions(self) -> list[Any]:
        return [*super().versions(), "list", self.source.val_share]

    def write(self, folder: Path) -> dict[str, Any]:
        """The split by hashes needs all files: rows are written without it first."""
        source, root, listed = self.source, self.root, read_list(self.source.path, by_line=True)
        names = ["num_frames" if name == "frames" else name for name in listed.given]
        by_hash = source.splits_by_hash(listed)
        schema = schema_of([*names, *["split"] * by_hash], root)
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


class FolderRows:
    """Lists the folder when it is first asked for its files."""

    def __init__(self, source: Folder | ImageFolder) -> None:
        self.source = source
        self.name = _name_of_folder(source)

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


def _write_rows(folder: Path, given: Sequence[str], pieces: Iterable[pd.DataFrame], count: int, name: str) -> None:
    """Write table.arrow of rows whose paths do not follow from their names."""
    schema = schema_of(given, "", with_path=True)
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


def _in_processes(
    pieces: Iterable[pa.Table], root: str, schema: pa.Schema
) -> Iterator[tuple[pa.RecordBatch, set[str]]]:
    """_converted of every piece, in order; of a few at a time, in processes."""
    workers = min(WORKERS, processor_count()) if sys.platform == "linux" else 1
    if workers == 1:
        yield from (_converted(_known(piece), root, schema) for piece in pieces)
        return
    waiting: deque[Future] = deque()
    pool = ProcessPoolExecutor(workers, get_context("fork"))  # as the workers of a DataLoader
    with pool_errors("prepares a table"), pool:
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
    sound = table[table["error"].isna()]
    names, paths = sound["name"].to_numpy(), sound["path"].to_numpy()
    prefix = os.path.join(root, "")
    relative, absolute = paths == np.array([prefix + name for name in names], object), paths == names
    style = {"relative"} if relative.all() else {"absolute"} if absolute.all() else {"relative", "other"}
    return row_arrays(table, schema), style if len(sound) else set()

"""FileTable: the table of files (see rows.py) for training, in Arrow.

A large table lies in a file that is mapped into memory (see prepared/table.py): ranks and worker processes share
its pages, pickling passes only the file's name, and nothing in a process grows with the number of rows. A small one is
held in memory, in the same form.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vae3d.data.table.rows import NUMBERS, TEXTS, absolute_paths
from vae3d.data.table.segments import SEGMENT, WHOLE, Bounds

if TYPE_CHECKING:
    import pandas as pd

NAMES = pa.large_binary()  # of paths and names: a file system takes any bytes
TEXT = pa.large_string()
COLUMNS = ("path", "name", "row", *TEXTS, *NUMBERS, *SEGMENT)  # of to_pandas
OBJECTS = ("path", "name", *TEXTS)
STORED = ("length", "by_length")
RELEASE_EVERY = 1000  # rows read at random
CHUNK = 100_000  # rows that are in memory at a time


class ArrowFile:
    """An Arrow IPC file, mapped into memory; pickles by name. table: its columns."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with open(self.path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.table: pa.Table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()

    def __reduce__(self) -> tuple[type[ArrowFile], tuple[str]]:
        return ArrowFile, (self.path,)

    def release(self) -> None:
        """Unmap the pages read so far from this process; they stay in the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class ArrowMemory:
    """An Arrow table in memory, in place of an ArrowFile."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def release(self) -> None:
        """Nothing to do."""


class FileTable:
    """Rows of files. len(table) rows; columns as in rows.py.

    base: one row per row of the source, in its order, without a column `row`. Without a column `path`, its schema's
    metadata has the `root` that the names are relative to. view: column `row`, which rows of `base` are in the table
    and in which order, and columns that replace those of `base`; None: all.
    """

    def __init__(self, base: ArrowFile | ArrowMemory, view: ArrowFile | ArrowMemory | None = None) -> None:
        self.base, self.view = base, view
        metadata = base.table.schema.metadata or {}
        self.root = os.fsdecode(metadata.get(b"root", b""))
        self._rows = None if view is None else view.table["row"].chunk(0).to_numpy() if len(view.table) else np.empty(0)
        self._columns = {name: base.table[name] for name in base.table.column_names}
        self._of_view = set() if view is None else set(view.table.column_names)
        self._columns |= {name: view.table[name] for name in self._of_view}
        self._pieces: dict[str, tuple[list[int], list[pa.Array]]] = {}  # of a column: its first rows, its arrays
        self._since_release = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTable, (self.base, self.view)

    def __len__(self) -> int:
        return len(self.base.table if self.view is None else self.view.table)

    def path(self, row: int) -> str:
        """The absolute path of a row, counted from 0."""
        self._count_read()
        column = self._column("path")
        if column is None:
            return absolute_paths(self.root, [os.fsdecode(self._value("name", row))])[0]
        return os.fsdecode(self._value("path", row))

    def bounds(self, row: int) -> Bounds:
        """`start` and `end` of a row, in seconds; NaN: of the file."""
        if self._column("start") is None and self._column("end") is None:
            return WHOLE
        self._count_read()
        start, end = (np.nan if self._column(name) is None else self._value(name, row) for name in SEGMENT)
        return start, end

    def numbers(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """[rows] a column of numbers, read-only, of all rows or of some; NaN: unknown. Not copied if it lies in one
        piece, as the columns of a large table that is ready for training do."""
        if self._column(name) is None:
            return np.broadcast_to(np.nan, len(self) if rows is None else len(rows))
        return _values(self._taken(name, rows))

    def missing(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """[rows] whether a column of texts has no value, of all rows or of some."""
        if self._column(name) is None:
            return np.ones(len(self) if rows is None else len(rows), dtype=bool)
        return pc.is_null(self._taken(name, rows)).to_numpy()

    def equals(self, name: str, text: str, rows: np.ndarray | None = None) -> np.ndarray:
        """[rows] whether a column of texts has this value, of all rows or of some."""
        if self._column(name) is None:
            return np.zeros(len(self) if rows is None else len(rows), dtype=bool)
        return pc.fill_null(pc.equal(self._taken(name, rows), text), False).to_numpy()

    def paths(self, rows: np.ndarray) -> list[str]:
        """The absolute paths of some rows."""
        return self._objects("path", np.asarray(rows))

    def names(self, rows: np.ndarray) -> list[str]:
        """The names of some rows, as the source gives them."""
        return self._objects("name", np.asarray(rows))

    def stored(self, name: str, settings: Any = None) -> np.ndarray | None:
        """A column that prepare added, `length` or `by_length`; None: there is none, or of other settings."""
        if name not in self._of_view:
            return None
        made_for = self.view.table.schema.metadata or {}
        if settings is not None and not clip_rule(settings).items() <= made_for.items():
            return None
        return _values(self._taken(name))

    def select(self, rows: np.ndarray) -> FileTable:
        """The table of some rows, by index, in that order. Its indices are held in memory."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        if self.view is None:
            return FileTable(self.base, ArrowMemory(pa.table({"row": rows})))
        kept = self.view.table.drop_columns([name for name in STORED if name in self.view.table.column_names])
        return FileTable(self.base, ArrowMemory(kept.take(pa.array(rows)).combine_chunks()))

    def column_chunks(self, name: str) -> Iterator[Sequence[Any]]:
        """The values of a column, CHUNK rows at a time."""
        for first in range(0, len(self), CHUNK):
            yield self._objects(name, np.arange(first, min(first + CHUNK, len(self))))
            self._release()

    def to_pandas(self, rows: np.ndarray | None = None) -> pd.DataFrame:
        """All columns of the rows with these indices (None: of all rows) as pandas objects, in memory."""
        import pandas as pd

        return pd.DataFrame({
            name: pd.Series(self._objects(name, rows), dtype=object if name in OBJECTS else None) for name in COLUMNS
        })  # fmt: skip

    def __getitem__(self, name: str) -> pd.Series:
        """A column in memory, for small tables."""
        import pandas as pd

        return pd.Series(self._objects(name, None), name=name, dtype=object if name in OBJECTS else None)

    def _objects(self, name: str, rows: np.ndarray | None) -> Any:
        count = len(self) if rows is None else len(rows)
        if name == "row":
            return self._source_rows(rows) + 1
        if name == "path" and self._column("path") is None:
            return absolute_paths(self.root, self._objects("name", rows))
        column = self._column(name)
        if name in (*NUMBERS, *SEGMENT):
            return np.full(count, np.nan) if column is None else self._taken(name, rows).to_numpy().astype(float)
        if column is None:
            return np.full(count, None)
        values = self._taken(name, rows).to_pylist()
        return list(map(os.fsdecode, values)) if name in ("path", "name") else np.array(values, dtype=object)

    def _source_rows(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Rows of `base`, counted from 0."""
        if "number" in self.base.table.column_names:
            return self._taken("number", rows).to_numpy()
        if self._rows is None:
            return np.arange(len(self)) if rows is None else np.asarray(rows)
        return self._rows if rows is None else self._rows[rows]

    def _column(self, name: str) -> pa.ChunkedArray | None:
        return self._columns.get(name)

    def _value(self, name: str, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        if self._rows is not None and name not in self._of_view:
            row = int(self._rows[row])
        if name not in self._pieces:
            arrays = self._columns[name].chunks
            self._pieces[name] = list(accumulate([0, *map(len, arrays[:-1])])), arrays
        starts, arrays = self._pieces[name]
        piece = bisect_right(starts, row) - 1
        return arrays[piece][row - starts[piece]].as_py()

    def _taken(self, name: str, rows: np.ndarray | None = None) -> pa.ChunkedArray:
        """A column of the given rows, or of all."""
        column = self._column(name)
        if self._rows is not None and name not in self._of_view:
            rows = self._rows if rows is None else self._rows[rows]
        if rows is None:
            return column
        return take(column, np.asarray(rows))

    def _count_read(self) -> None:
        """Every so many reads, give their pages back, so that a process stays as small as it was."""
        self._since_release += 1
        if self._since_release >= RELEASE_EVERY:
            self._release()

    def _release(self) -> None:
        self._since_release = 0
        for file in (self.base, self.view):
            if file is not None:
                file.release()


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Not copied if they lie in one piece; of no rows, there is none."""
    return column.chunk(0).to_numpy(zero_copy_only=False) if column.num_chunks == 1 else column.to_numpy()


def take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """column.take(rows), which for texts would first join all pieces of the column in memory."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return column.slice(int(rows[0]), len(rows))
    starts = np.cumsum([0, *(len(piece) for piece in column.chunks)])
    order = None if (np.diff(rows) >= 0).all() else np.argsort(rows, kind="stable")
    ascending = rows if order is None else rows[order]
    places = np.searchsorted(ascending, starts)
    pieces = [
        piece.take(pa.array(ascending[first:last] - start))
        for piece, start, first, last in zip(column.chunks, starts[:-1], places[:-1], places[1:], strict=True)
        if first < last
    ]
    if order is None:
        return pa.chunked_array(pieces, column.type)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.chunked_array([pa.concat_arrays(pieces).take(pa.array(back))], column.type)


def as_file_table(table: pd.DataFrame | FileTable) -> FileTable:
    """The FileTable of a table in pandas, which needs the column `path` alone, in memory. Columns without a value are
    left out."""
    if isinstance(table, FileTable):
        return table
    columns: dict[str, pa.Array] = {}
    for name in ("path", "name"):
        if name in table.columns:
            columns[name] = pa.array([os.fsencode(value) for value in table[name]], NAMES)
    if "row" in table.columns:
        columns["number"] = pa.array(table["row"].to_numpy(np.int64) - 1)  # of the source, from 0
    for name in TEXTS:
        if name in table.columns and table[name].notna().any():
            columns[name] = text_array(table[name])
    for name in (*NUMBERS, *SEGMENT):
        if name in table.columns and table[name].notna().any():
            columns[name] = pa.array(table[name].to_numpy(dtype=float))
    return FileTable(ArrowMemory(pa.table(columns)))


def sizes_of(table: pd.DataFrame | FileTable) -> tuple[np.ndarray, np.ndarray]:
    """[rows] heights and widths."""
    table = as_file_table(table)
    return table.numbers("height"), table.numbers("width")


def text_array(values: pd.Series) -> pa.Array:
    """Texts; numbers, as labels may be, as str() writes them; None for missing values."""
    missing = values.isna().to_numpy()
    if missing.all():
        return pa.nulls(len(values), TEXT)
    return pa.array([None if no else str(value) for value, no in zip(values, missing, strict=True)], TEXT)


def clip_rule(settings: Any) -> dict[bytes, bytes]:
    """The ClipSettings that the length of a row's longest clip depends on, as metadata of a schema."""
    return {b"stride": str(settings.stride).encode(), b"fps": str(settings.fps).encode()}


def compact(values: np.ndarray) -> np.ndarray:
    """float32 if that loses nothing, else float64."""
    small = values.astype(np.float32)
    return small if np.array_equal(small, values, equal_nan=True) else np.asarray(values, dtype=np.float64)


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as an Arrow IPC file of one record batch."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        whole = all(column.num_chunks == 1 for column in table.columns)  # else join them, which copies
        for batch in (table if whole else table.combine_chunks()).to_batches():
            writer.write_batch(batch)

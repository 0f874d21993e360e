"""Parsing of table and list files: CSV, TSV, JSON and JSON Lines, also gzipped, and parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from vae3d.data.media import DataError, MediaError
from vae3d.data.storage.files import local_copy
from vae3d.data.storage.paths import is_stored, is_url
from vae3d.text import one_line

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

T = TypeVar("T")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
QUOTED = {mark: rb'(?<![^%b\n])"(?:[^"\r\n]|"")*"(?=[%b\r\n])' % (2 * (mark.encode(),)) for mark in (",", "\t")}
SEPARATORS = {",": "commas", "\t": "tabs"}
JSON = (".json", ".jsonl")
NUMBER_COLUMNS = ("num_frames", "height", "width", "fps", "start", "end")
TEXT_COLUMNS = ("path", "split", "text", "label")
ERROR = "error"  # column that is added; one that a file has is ignored
MAX_LINE = 2**24  # bytes of a line; a file with longer lines is no table
# Bytes of a gzipped file, or so many times its own if that is more. JSON in indented lines has 70 times.
MAX_UNPACKED, MAX_RATIO = 2**26, 200
BLOCK = 2**24  # bytes that are read at a time
CHUNK = 100_000  # rows that are held at a time
ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # by byte-order mark


def kind_of(path: str | Path) -> str | None:
    """File type by name: .csv, .tsv, .parquet, .json or .jsonl; None for others. .csv.gz and .CSV count as .csv."""
    name = Path(urlsplit(str(path)).path.lower() if is_url(path) else str(path).lower())
    if name.suffix == ".parquet":
        return name.suffix
    kind = Path(name.stem).suffix if name.suffix == ".gz" else name.suffix
    return kind if kind in (*DELIMITERS, *JSON) else None


def read_table(path: str | Path) -> pd.DataFrame:
    """The rows of a CSV, TSV or parquet file, or of a stored one (see storage/paths.py). Text columns stay text; an
    empty field is None.

    The column `error` marks rows with more or fewer fields than the first line; one that the file has is left out. No
    text means "missing": a label may be None or NA. Raises DataError with the line if the file is no table.
    """
    kind = kind_of(path)
    if kind in JSON:
        raise DataError(f"{path} is a JSON list, not a table; use data=json_clips")
    if is_stored(path):
        return of_copy(read_table, path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a table; use data=folder, or data=image_folder for images by class")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a CSV, TSV or parquet file")
    return _parquet(path) if kind == ".parquet" else _csv(path, DELIMITERS.get(str(kind), ","))


def of_copy(read: Callable[[Path], T], path: str | Path) -> T:
    """read(local copy of a stored path). Raises DataError also for an object that is not there."""
    try:
        with local_copy(path) as file:
            return read(file)
    except MediaError as error:
        raise DataError(str(error)) from error


def _parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa  # a quarter of a second with pandas, which paths and videos alone do not need

    # Objects: pandas makes 3.0 of a label 3 where another row has none.
    table = pa.concat_tables(_parquet_pieces(path)).to_pandas(integer_object_nulls=True)
    for column in TEXT_COLUMNS:
        if column in table.columns:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
    return table


def _csv(path: Path, delimiter: str) -> pd.DataFrame:
    import pandas as pd

    reader = _CsvReader(path, delimiter)
    frames = list(reader.frames(CHUNK))
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


class _CsvReader:
    """A CSV or TSV file. header: the names of its columns. Raises DataError with the line if it is no table."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self.delimiter = path, delimiter
        self._lines = csv.reader(_lines(path), delimiter=delimiter, strict=True)
        with self._naming_the_line(self._lines):
            self.header = [name.strip() for name in next((line for line in self._lines if line), [])]
        self.header_lines = self._lines.line_num
        if not self.header:
            raise DataError(f"{path} is empty")
        _check_names(path, self.header)
        if len(self.header) == 1 and (others := [mark for mark in (",", ";", "\t") if mark in self.header[0]]):
            raise DataError(
                f"{path}: its fields are separated by {others[0]!r}; expected {delimiter!r}: commas in .csv, tabs in "
                ".tsv"
            )

    def frames(self, size: int) -> Iterator[pd.DataFrame]:
        """The rows, `size` at a time; at least one table, which may be empty."""
        return self._frames(self._lines, 0, size)

    def frames_from(self, position: int, line: int, size: int) -> Iterator[pd.DataFrame]:
        """The rows from a byte of the file on, at which line number `line` begins, counted from 1."""
        lines = csv.reader(_lines(self.path, start=position, first=line), delimiter=self.delimiter, strict=True)
        return self._frames(lines, line - 1, size)

    def _frames(self, lines: Any, before: int, size: int) -> Iterator[pd.DataFrame]:
        import pandas as pd

        header, rows, errors, made = self.header, [], [], False

        def frame() -> pd.DataFrame:
            return pd.DataFrame(rows, columns=header, dtype=object).assign(**{ERROR: pd.Series(errors, dtype=object)})

        with self._naming_the_line(lines, before):
            for fields in lines:
                if not fields:  # an empty line
                    continue
                extra = len(fields) - len(header)
                hint = f'; put "..." around a value that has {SEPARATORS[self.delimiter]} in it' if extra > 0 else ""
                counts = f"{len(fields)} fields in line {before + lines.line_num}, where the first line names"
                errors.append(f"has {counts} {len(header)} columns{hint}" if extra else None)
                rows.append([field or None for field in (fields + [""] * len(header))[: len(header)]])
                if len(rows) == size:
                    yield frame()
                    rows, errors, made = [], [], True
        if rows or not made:
            yield frame()

    @contextmanager
    def _naming_the_line(self, lines: Any, before: int = 0) -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            hint = "; is a quotation mark never closed?" if "end of data" in str(error) else ""
            line = before + lines.line_num
            raise DataError(f"{self.path}, line {line}: is not a readable table: {error}{hint}") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise DataError for two columns of one name. Columns without a name are left out, and may be many."""
    if duplicates := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise DataError(f"{path} has two columns `{duplicates[0]}`; keep one")


# --- large tables, in pieces


def count_rows(path: Path) -> int:
    """About how many rows a table file has: of text, its lines; of a JSON list, how often it says "path". Raises
    DataError."""
    if kind_of(path) == ".parquet":
        import pyarrow.parquet as pq

        with _reading_parquet(path):
            return pq.read_metadata(path).num_rows
    mark = b'"path"' if kind_of(path) == ".json" else b"\n"
    try:
        with _opened(path) as stream:
            return sum(block.count(mark) for block in iter(lambda: stream.read(BLOCK), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


def table_pieces(path: Path) -> Iterator[pa.Table]:
    """The rows of read_table(path) in pieces of about CHUNK rows, in bounded memory, and much faster where a file has
    neither quotes nor errors. Raises DataError as read_table does."""
    kind = kind_of(path)
    return _parquet_pieces(path) if kind == ".parquet" else _csv_pieces(path, DELIMITERS.get(str(kind), ","))


def _parquet_pieces(path: Path) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _reading_parquet(path):
        file = pq.ParquetFile(path, memory_map=True)
        _check_names(path, file.schema_arrow.names)
        pandas_index = (file.schema_arrow.pandas_metadata or {}).get("index_columns", [])
        names = [name for name in file.schema_arrow.names if name not in (*pandas_index, ERROR)]
        for name in {*TEXT_COLUMNS, *NUMBER_COLUMNS} & set(names):
            if pa.types.is_nested(kind := file.schema_arrow.field(name).type):
                raise DataError(f"{path}: its column `{name}` is of {kind}; it must have one value per row")
        made = False
        for batch in file.iter_batches(CHUNK, columns=names):
            made = True
            yield _plain_columns(path, pa.Table.from_batches([batch]).replace_schema_metadata())
        if not made:
            yield file.schema_arrow.empty_table().select(names).replace_schema_metadata()


def _plain_columns(path: Path, table: pa.Table) -> pa.Table:
    """The table with values in place of dictionaries, as of categories of pandas, and texts in place of bytes, as older
    writers store them. Raises DataError if they are not UTF-8."""
    import pyarrow as pa

    for name in {*TEXT_COLUMNS, *NUMBER_COLUMNS} & set(table.column_names):
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            try:
                column = column.cast(pa.large_string())
            except pa.ArrowInvalid as error:
                raise DataError(f"{path}: its column `{name}` holds bytes that are not UTF-8 text") from error
        table = table.set_column(table.column_names.index(name), name, column)
    return table


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError) as error:
        raise DataError(f"{path} is not a readable parquet file: {one_line(error)}") from error


def _csv_pieces(path: Path, delimiter: str) -> Iterator[pa.Table]:
    """Blocks of plain lines by Arrow; from the first block with anything else on, by the csv module."""
    import pyarrow as pa

    reader = _CsvReader(path, delimiter)

    def careful(position: int, line: int) -> Iterator[pa.Table]:
        for frame in reader.frames_from(position, line, CHUNK):
            named = frame.drop(columns="", errors="ignore")  # Arrow takes no two columns of one name, not even of none
            yield pa.Table.from_pandas(named, preserve_index=False)

    made = False
    with _opened(path) as stream:
        header = [stream.readline(MAX_LINE) for _ in range(reader.header_lines)]
        position, line, block = sum(map(len, header)), 1 + len(header), b""
        while new := stream.read(BLOCK):
            block += new
            whole = block[: block.rfind(b"\n") + 1]
            table = _plain_rows(whole, reader.header, delimiter)
            if table is None:
                yield from careful(position, line)
                return
            position, line, block = position + len(whole), line + whole.count(b"\n"), block[len(whole) :]
            for first in range(0, len(table), CHUNK):
                made = True
                yield table.slice(first, CHUNK)
        if block or not made:  # a last line without an end
            yield from careful(position, line)


def _plain_rows(block: bytes, header: list[str], delimiter: str) -> pa.Table | None:
    """The rows of a block of whole lines; None if it has a quotation mark other than around a field of one line, a
    stray carriage return, an odd number of fields, bytes that are no text, a very long line, or a byte-order mark at
    its begin, which Arrow would drop. Columns of numbers are numbers if all their values are."""
    import pyarrow as pa
    import pyarrow.csv

    if not block or b"\0" in block or block.startswith(codecs.BOM_UTF8) or block.count(b"\r") != block.count(b"\r\n"):
        return None
    if b'"' in block and b'"' in re.sub(QUOTED[delimiter], b"", block):
        return None
    for number in (pa.float64(), pa.large_string()):
        types = [number if name in NUMBER_COLUMNS else pa.large_string() for name in header]
        try:
            table = pa.csv.read_csv(
                io.BytesIO(block),
                pa.csv.ReadOptions(column_names=[str(place) for place in range(len(header))], block_size=2**22),
                pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=False),
                pa.csv.ConvertOptions(
                    column_types={str(place): kind for place, kind in enumerate(types)},
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
        except pa.ArrowInvalid:
            continue
        table = table.rename_columns(header)
        table = table.drop_columns(ERROR) if ERROR in header else table
        return table.append_column(ERROR, pa.nulls(len(table), pa.large_string()))
    return None


def read_entries(path: str | Path) -> Any:
    """The value of a JSON file, or the list of values of a JSON Lines file. Raises DataError with the line."""
    if is_stored(path):
        return of_copy(read_entries, path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}; data.source.path takes a JSON file")
    if kind_of(path) == ".jsonl":
        return list(JsonLines(path))
    return _json("".join(_lines(path, limit=-1)), path)


class JsonLines:
    """The values of a JSON Lines file, read line by line each time they are iterated over. Raises DataError with the
    line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        for number, line in enumerate(_lines(self.path), 1):
            if line.strip():
                yield _json(line, self.path, number)


def _json(text: str, path: Path, line: int | None = None) -> Any:
    """line: number of the line, if `text` is one line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file of one object per line is called .jsonl" if line is None and "Extra data" in error.msg else ""
        raise DataError(
            f"{path}, line {line or error.lineno}, column {error.colno}: is not JSON: {error.msg}{hint}"
        ) from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        where = f", line {line}" if line else ""
        raise DataError(f"{path}{where}: is not a readable JSON file: {one_line(error)}") from error


def _lines(path: Path, limit: int = MAX_LINE, start: int = 0, first: int = 1) -> Iterator[str]:
    """The lines of a UTF-8 file, without byte-order mark. start: byte to begin at, where line number `first` begins.
    Raises DataError with the line that is no text."""
    try:
        with _opened(path) as stream:
            stream.seek(start)
            for number, line in enumerate(iter(lambda: stream.readline(limit), b""), first):
                if number == 1 and (encoding := ENCODINGS.get(line[:2])):
                    raise DataError(f"{path} is {encoding} text; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW")
                if len(line) == limit:
                    raise DataError(f"{path}, line {number}: has more than {limit} bytes; is it a table?")
                yield _text(line, f"{path}, line {number}").removeprefix("\ufeff" if number == 1 else "")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


def _opened(path: Path) -> BinaryIO:
    """The bytes of a file, of a gzipped one unpacked."""
    if path.suffix.lower() != ".gz":
        return open(path, "rb")
    return io.BufferedReader(_Unpacked(path), 2**17)


class _Unpacked(io.RawIOBase):
    """A gzipped file, for reading. Raises DataError if it has more than MAX_UNPACKED: it could fill the memory."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path, "rb")  # noqa: SIM115
        self._path, self._max = path, max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        if self._file.tell() > self._max:
            raise DataError(f"{self._path} has more than {self._max:,} bytes when it is unpacked; is it a table?")
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _text(line: bytes, where: str) -> str:
    if b"\0" in line:
        raise DataError(f"{where}: is not text; is the file damaged, or another kind of file?")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if any(byte < 32 and byte not in b"\t\r\n" for byte in line):
            raise DataError(f"{where}: is not text; is the file damaged, or another kind of file?") from error
        seen = line[max(0, error.start - 10) : error.start + 10].decode("cp1252", errors="replace")
        raise DataError(
            f"{where}: is not UTF-8 text (byte 0x{line[error.start]:02x}, in Windows-1252 {seen!r}); convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        ) from error

"""Parsing of table and list files: CSV, TSV, JSON and JSON Lines, also gzipped, and parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from vae3d.data.media import DataError, MediaError, one_line
from vae3d.data.storage import is_stored, is_url, local_copy

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SEPARATORS = {",": "commas", "\t": "tabs"}
JSON = (".json", ".jsonl")
TEXT_COLUMNS = ("path", "split", "text", "label")
MAX_LINE = 2**24  # bytes of a line; a file with longer lines is no table
ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # by byte-order mark


def kind_of(path: str | Path) -> str | None:
    """File type by name: .csv, .tsv, .parquet, .json or .jsonl; None for others. .csv.gz and .CSV count as .csv."""
    name = Path(urlsplit(str(path)).path.lower() if is_url(path) else str(path).lower())
    if name.suffix == ".parquet":
        return name.suffix
    kind = Path(name.stem).suffix if name.suffix == ".gz" else name.suffix
    return kind if kind in (*DELIMITERS, *JSON) else None


def read_table(path: str | Path) -> pd.DataFrame:
    """The rows of a CSV, TSV or parquet file, or of a stored one (see storage.py). Text columns stay text; an empty
    field is None.

    The column `error` marks rows with more or fewer fields than the first line. No text means "missing": a label may be
    None or NA. Raises DataError with the line if the file is no table.
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
    import pandas as pd  # a quarter of a second, which paths and videos alone do not need

    try:
        table = pd.read_parquet(path).reset_index(drop=True)  # the file may have an index
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError) as error:
        raise DataError(f"{path} is not a readable parquet file: {one_line(error)}") from error
    for column in TEXT_COLUMNS:
        if column in table.columns:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
    return table


def _csv(path: Path, delimiter: str) -> pd.DataFrame:
    import pandas as pd

    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    rows, errors = [], []
    try:
        header = [name.strip() for name in next((line for line in reader if line), [])]
        for fields in reader:
            if not fields:  # an empty line
                continue
            extra = len(fields) - len(header)
            hint = f'; put "..." around a value that has {SEPARATORS[delimiter]} in it' if extra > 0 else ""
            counts = f"{len(fields)} fields in line {reader.line_num}, where the first line names {len(header)} columns"
            errors.append(f"has {counts}{hint}" if extra else None)
            rows.append([field or None for field in (fields + [""] * len(header))[: len(header)]])
    except csv.Error as error:
        hint = "; is a quotation mark never closed?" if "end of data" in str(error) else ""
        raise DataError(f"{path}, line {reader.line_num}: is not a readable table: {error}{hint}") from error
    if not header:
        raise DataError(f"{path} is empty")
    if duplicates := [name for name, count in Counter(header).items() if count > 1 and name]:
        raise DataError(f"{path} has two columns `{duplicates[0]}`; keep one")
    if len(header) == 1 and (others := [mark for mark in (",", ";", "\t") if mark in header[0]]):
        raise DataError(
            f"{path}: its fields are separated by {others[0]!r}; expected {delimiter!r}: commas in .csv, tabs in .tsv"
        )
    return pd.DataFrame(rows, columns=header, dtype=object).assign(error=pd.Series(errors, dtype=object))


def read_entries(path: str | Path) -> Any:
    """The value of a JSON file, or the list of values of a JSON Lines file. Raises DataError with the line."""
    if is_stored(path):
        return of_copy(read_entries, path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}; data.source.path takes a JSON file")
    if kind_of(path) == ".jsonl":
        lines = enumerate(_lines(path), 1)
        return [_json(line, path, number) for number, line in lines if line.strip()]
    return _json("".join(_lines(path, limit=-1)), path)


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


def _lines(path: Path, limit: int = MAX_LINE) -> Iterator[str]:
    """The lines of a UTF-8 file, without byte-order mark. Raises DataError with the line that is no text."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(limit), b""), 1):
                if number == 1 and (encoding := ENCODINGS.get(line[:2])):
                    raise DataError(f"{path} is {encoding} text; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW")
                if len(line) == limit:
                    raise DataError(f"{path}, line {number}: has more than {limit} bytes; is it a table?")
                yield _text(line, f"{path}, line {number}").removeprefix("\ufeff" if number == 1 else "")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


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

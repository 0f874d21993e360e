"""Where videos and images come from: every source lists its files as a table, without decoding anything.

The table has the columns path (absolute; with a * for their numbers, the images of a video), name (the path as the
source gives it), num_frames, height, width, fps (of the file; NaN where unknown), start and end of the part of the
file that the row stands for (seconds; NaN: the file's own), split, text and label (None where not given), row, the
place in the source that messages name, and error: why a row cannot be used, or None.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from glob import escape, glob
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd

from vae3d.data.dataset_rows import how_to_download, is_row
from vae3d.data.images import IMAGE_SUFFIXES, is_sequence, numbered
from vae3d.data.media import DataError
from vae3d.data.readers import VIDEO_SUFFIXES
from vae3d.data.segments import SEGMENT, SEGMENT_ERROR
from vae3d.data.tables import read_table
from vae3d.seeding import seed_of

T = TypeVar("T")
NUMBERS = ("num_frames", "height", "width", "fps")
THREADS, CHUNK = 16, 200  # that look at files, and paths that one of them takes at a time
MAX_NAME = 255  # bytes of a file's name, on every file system
ARCHIVES = (".tar", ".tgz", ".zip", ".gz", ".7z", ".rar")
MISSING_NUMBERS = ("", "nan", "na", "n/a", "none", "null")  # as a column of numbers may have; a text is always a text
SPLITS = ("train", "val", "test")
LIMITS = {  # least value of a column, if it is not 1, and the error of a row that has no such number
    "fps": (0, "`fps` is no positive number"),  # images have none
    "start": (0, SEGMENT_ERROR),
    "end": (0, SEGMENT_ERROR),
}


class Source(Protocol):
    """May have `notes`, a list of lines that the start of a run tells of the files once `table` was called."""

    def table(self) -> pd.DataFrame:
        """The files, one row each. Raises DataError."""


class Table:
    """A CSV, TSV (also .gz) or parquet file with a column `path`; optional text, label, num_frames, height, width,
    fps, start, end and split.

    Relative paths are relative to `root`, by default the table's folder. A row with start or end (seconds) is that part
    of its file only; num_frames is the file's nevertheless.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent

    def table(self) -> pd.DataFrame:
        raw = read_table(self.path)
        if "path" not in raw.columns:
            raise DataError(
                f"{self.path} has no column `path`; its first line names the columns {', '.join(map(str, raw.columns))}"
            )
        if raw.empty:
            raise DataError(f"{self.path} has no rows")
        return normalise_rows(raw, self.root)


def normalise_rows(raw: pd.DataFrame, root: Path) -> pd.DataFrame:
    """A source's table of rows as a file gives them, numbered from 0, with what is wrong with each in `error`, where
    `raw` may already tell it."""
    names = raw["path"].fillna("").astype(str).str.strip()
    table = pd.DataFrame({"path": [os.path.abspath(root / name) for name in names], "name": names})
    table["row"] = raw.index + 1
    for column in ("text", "label", "split", "error"):
        table[column] = raw[column] if column in raw.columns else None
    _mark(table, names == "", "has no `path`")
    _mark(table, names.str.contains("\0", regex=False), "`path` has the character NUL, which no file name has")
    too_long = names.str.len() > MAX_NAME // 4  # characters have up to four bytes
    too_long[too_long] = names[too_long].map(lambda name: max(map(len, os.fsencode(name).split(b"/"))) > MAX_NAME)
    _mark(table, too_long, f"`path` has a name of more than {MAX_NAME} bytes; is it the right column?")
    for column in (*SEGMENT, *NUMBERS):
        table[column] = np.nan
        if column in raw.columns:
            table[column] = _numbers(raw[column])
            least, reason = LIMITS.get(column, (1, f"`{column}` is no positive number"))
            bad = table[column].isna() & raw[column].notna()
            bad[bad] = ~raw.loc[bad, column].astype(str).str.strip().str.lower().isin(MISSING_NUMBERS)
            bad |= table[column] < least
            _mark(table, bad, reason)
    _mark(table, table["end"] <= table["start"].fillna(0), SEGMENT_ERROR)
    if "split" in raw.columns:
        _mark(table, ~raw["split"].isin(SPLITS), f"`split` is none of {', '.join(SPLITS)}")
    return table


def _numbers(column: pd.Series) -> pd.Series:
    """Floats; NaN for what is no finite number."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    return numbers.replace([np.inf, -np.inf], np.nan)


def _mark(table: pd.DataFrame, bad: pd.Series, reason: str) -> None:
    """Give the rows where `bad` their error; the first one that is found counts."""
    table.loc[bad & table["error"].isna(), "error"] = reason


class Folder:
    """Every video and image under a folder, sorted by name; or one file; or, of a path with `*`, such as
    rooms/*/output/panorama_*.png, the numbered images of every folder that it fits as a video."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def table(self) -> pd.DataFrame:
        top = self.path if self.path.is_dir() else self.path.parent
        if is_sequence(self.path):
            files = sequences(self.path)
            top = next(parent for parent in self.path.parents if "*" not in str(parent))
        elif self.path.is_file():
            if not is_media(self.path.name):
                kind = self.path.suffix or "a file without extension"
                hint = "; extract it, and give the folder" if kind.lower() in ARCHIVES else ""
                raise DataError(
                    f"{self.path}: {kind} is not read; give a table (.csv, .tsv, .parquet), a list (.json, .jsonl), a "
                    f"folder, a video or an image{hint}"
                )
            files = [self.path]
        elif self.path.is_dir():
            files = [top / name for name in files_under(top) if is_media(name)]
        else:
            raise DataError(f"{self.path}: no such file or folder{how_to_download(self.path)}")
        if not files:
            raise DataError(f"{self.path} holds no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})")
        return rows_from_paths([os.path.abspath(f) for f in files], [str(f.relative_to(top)) for f in files])


def files_under(folder: str | Path) -> list[str]:
    """Names of all files in a folder and the folders in it, sorted; links are followed, hidden ones left out.

    Raises DataError for a name that is not UTF-8.
    """
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_up(here, name)]
        inside = os.path.relpath(here, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if not name.startswith(".")]
    for name in found:
        if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
            raise DataError(f"{folder}: the name of the file {os.fsencode(name)!r} is not UTF-8; rename it")
    return sorted(found, key=lambda name: name.split(os.sep))


def _leads_up(here: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    path = os.path.join(here, name)
    return os.path.islink(path) and f"{os.path.realpath(here)}/".startswith(f"{os.path.realpath(path)}/")


def is_media(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES


def sequences(path: Path) -> list[Path]:
    """The sequences that a path stands for whose folders may have a `*` too. Raises DataError if there is none."""
    try:
        fits = numbered(path.name)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    folders = sorted(glob(escape(str(path.parent)).replace("[*]", "*")))
    found = [folder for folder in folders if os.path.isdir(folder) and any(map(fits, os.listdir(folder)))]
    if not found:
        raise DataError(f"{path}: no files are called so, with a number for the * of their name")
    return [Path(folder) / path.name for folder in found]


def rows_from_paths(paths: list[str], names: list[str]) -> pd.DataFrame:
    """A table of files of which nothing else is known."""
    table = pd.DataFrame({"path": paths, "name": names, "row": np.arange(1, len(paths) + 1)})
    return table.assign(**dict.fromkeys([*NUMBERS, *SEGMENT], np.nan), text=None, label=None, split=None, error=None)


def in_threads(function: Callable[[str], T], paths: Iterable[str]) -> dict[str, T]:
    """function(path) of each path once. A network disk answers many at once."""
    unique = list(dict.fromkeys(paths))
    chunks = [unique[i : i + CHUNK] for i in range(0, len(unique), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda chunk: [function(path) for path in chunk], chunks)
        return dict(zip(unique, chain.from_iterable(results), strict=True))


def exists(path: str) -> bool:
    """Whether a row's file is there; of a sequence its folder, of a row of a dataset always: its table says so."""
    if is_row(path):
        return True
    return os.path.isdir(os.path.dirname(path)) if is_sequence(path) else os.path.isfile(path)


def file_hashes(table: pd.DataFrame) -> np.ndarray:
    """A number per row, of its name, from 0 to 2**63 - 1: equal for all rows of a file, and on every machine."""
    names = table.groupby("path")["name"].transform("min")
    return np.array([seed_of(name) for name in names], dtype=np.int64)

"""The table of files that every source returns: one row per file, or per part of a file. Nothing is decoded.

Columns:
    path        absolute; with a `*` for the numbers of the images of a sequence; or a URL, a member of a tar or a row
                of a dataset (see storage/paths.py)
    name        the path as the source gives it; its hash decides what is held out
    row         number of the row in the source, from 1, for messages
    num_frames, height, width, fps       of the whole file; NaN: unknown
    start, end  seconds, of the part of the file that the row stands for; NaN: the file's own
    split       train, val or test; None: not given
    text, label None: not given
    error       why the row cannot be used; None: it can
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from vae3d.data.decoding.images import is_sequence
from vae3d.data.media import NO_SUCH_FILE, DataError, MediaError, stat_reason
from vae3d.data.storage.files import size_and_version
from vae3d.data.storage.paths import is_stored, is_url, resolve
from vae3d.data.table.segments import SEGMENT, SEGMENT_ERROR
from vae3d.seeding import seed_of
from vae3d.text import is_utf8

T = TypeVar("T")
NUMBERS = ("num_frames", "height", "width", "fps")
TEXTS = ("text", "label", "split", "error")
SPLITS = ("train", "val", "test")
THREADS = 16
PATHS_PER_TASK = 200  # of a thread
MAX_NAME = 255  # bytes of a file name, on every file system
# In columns of numbers; in text columns these are text. C programs write -nan.
MISSING_NUMBERS = ("", "nan", "-nan", "na", "n/a", "none", "null")
# For DataFrame.to_csv. A caption or a name may have a carriage return, which the csv module would leave bare.
QUOTED_CSV: dict[str, Any] = {"index": False, "quoting": csv.QUOTE_NONNUMERIC, "lineterminator": "\n"}
WHOLE_NUMBERS = ("num_frames", "height", "width")
MAX_WHOLE = 2**31 - 1  # of which columns and lengths are made
MINIMUM = {"fps": 0, "start": 0, "end": 0}  # of a column; 1 for the others. fps is 0 of an image


def normalise_rows(raw: pd.DataFrame, root: str | Path) -> pd.DataFrame:
    """All columns of the table, checked, from the columns that a file has. Relative paths are relative to `root`.

    `raw` needs the column `path`. Its column `error`, if there is one, takes precedence over errors found here.
    """
    names = raw["path"].fillna("").astype(str).str.strip()
    table = pd.DataFrame({"path": absolute_paths(root, names.tolist()), "name": names})
    table["row"] = raw.index + 1
    for column in TEXTS:
        table[column] = raw[column] if column in raw.columns else None

    def mark(bad: pd.Series, reason: str) -> None:
        table.loc[bad & table["error"].isna(), "error"] = reason

    mark(names == "", "has no `path`")
    mark(names.str.contains("\0", regex=False), "`path` has the character NUL, which no file name has")
    too_long = names.str.len() > MAX_NAME // 4  # characters have up to four bytes
    too_long[too_long] = np.array([_is_too_long(name) for name in names[too_long]], dtype=bool)
    mark(too_long, f"`path` has a name of more than {MAX_NAME} bytes; is it the right column?")
    for column in (*SEGMENT, *NUMBERS):
        table[column] = np.nan
        if column in raw.columns:
            numbers = pd.to_numeric(raw[column], errors="coerce").astype(float)
            table[column] = numbers.replace([np.inf, -np.inf], np.nan)
            bad = table[column].isna() & raw[column].notna()
            texts = raw.loc[bad, column].astype(str).str.strip().str.lower()
            bad[bad] = ~texts.isin(MISSING_NUMBERS).to_numpy(bool)
            bad |= table[column] < MINIMUM.get(column, 1)
            if column in WHOLE_NUMBERS:
                bad |= (table[column] > MAX_WHOLE) | (table[column] % 1 > 0)
            kind = "whole number" if column in WHOLE_NUMBERS else "number"
            mark(bad, SEGMENT_ERROR if column in SEGMENT else f"`{column}` is no positive {kind}")
    mark(table["end"] <= table["start"].fillna(0), SEGMENT_ERROR)
    if "split" in raw.columns:
        mark(~raw["split"].isin(SPLITS), f"`split` is none of {', '.join(SPLITS)}")
    return table


def joined(pieces: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """A table of its pieces, with the rows numbered."""
    table = pd.concat(list(pieces), ignore_index=True)
    return table.assign(row=np.arange(1, len(table) + 1))


def _is_too_long(name: str) -> bool:
    return max(map(len, os.fsencode(name).split(b"/"))) > MAX_NAME and not is_stored(name)


def absolute_paths(root: str | Path, names: Iterable[str]) -> list[str]:
    """os.path.abspath(root / name) of each name. pathlib takes ten times as long, of a million names 5 s.

    root: a folder or a URL. A name may be a URL or a member of a tar. Raises DataError for a folder that is not UTF-8.
    """
    if not is_utf8(os.fspath(root)):
        raise DataError(f"the folder {os.fsencode(root)!r} is not UTF-8; rename it")
    if is_url(root):
        return [resolve(root, name) for name in names]
    folder = os.path.join(os.path.abspath(root), "")
    # A plain name is only concatenated: it has no empty parts and none that start with a dot, as "." and ".." do.
    return [
        (name if name[0] == "/" else folder + name)
        if name and name[0] != "." and name[-1] != "/" and "/." not in name and "//" not in name and os.sep == "/"
        else resolve(folder, name)
        for name in names
    ]


def rows_from_paths(paths: list[str], names: list[str]) -> pd.DataFrame:
    """The table of files of which nothing else is known. Raises DataError for a path that is not UTF-8."""
    for path in paths:
        if not is_utf8(path):
            raise DataError(f"{os.fsencode(path)!r} is not UTF-8; rename it")
    table = pd.DataFrame({"path": paths, "name": names, "row": np.arange(1, len(paths) + 1)})
    return table.assign(**dict.fromkeys([*NUMBERS, *SEGMENT], np.nan), text=None, label=None, split=None, error=None)


class Listing(NamedTuple):
    """Files that a source has listed: their paths and names. splits: of each; None: not given. numbers: column -> the
    value that all have."""

    paths: list[str]
    names: list[str]
    splits: list[str] | None = None
    numbers: dict[str, float] = {}

    def table(self, rows: slice = slice(None)) -> pd.DataFrame:
        """The table of all files, or of some, whose rows then count from 1."""
        table = rows_from_paths(self.paths[rows], self.names[rows])
        table = table if self.splits is None else table.assign(split=self.splits[rows])
        return table.assign(**self.numbers)


def invalid_rows(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(row and path, reason) of the rows with an error."""
    invalid = table.loc[table["error"].notna(), ["row", "path", "error"]]
    return [(f"row {row} ({path})", error) for row, path, error in invalid.values]


def mark_missing_files(table: pd.DataFrame) -> None:
    """Set the error of the rows whose file does not exist."""
    missing = table["path"].map(in_threads(why_missing, table["path"]))
    missing = missing[missing.notna() & table["error"].isna()]
    table.loc[missing.index, "error"] = missing


def exists(path: str) -> bool:
    """Whether a row's file exists: of a sequence its folder."""
    return why_missing(path) is None


def why_missing(path: str) -> str | None:
    """Why a row's file is not there; None if it is. Raises StorageError if its store does not answer."""
    if is_stored(path):
        try:
            size_and_version(path)
        except MediaError as error:
            return error.reason
        return None
    sequence = is_sequence(path)
    try:
        mode = os.stat(os.path.dirname(path) if sequence else path).st_mode
    except (OSError, ValueError) as error:  # ValueError: the name has the character NUL
        return stat_reason(path, error)
    return None if (S_ISDIR if sequence else S_ISREG)(mode) else NO_SUCH_FILE


def file_hashes(table: pd.DataFrame) -> np.ndarray:
    """A hash of each row's name, from 0 to 2**63 - 1: equal for all rows of a file, and on every machine."""
    names = table.groupby("path")["name"].transform("min")
    return np.array([seed_of(name) for name in names], dtype=np.int64)


def in_threads(function: Callable[[str], T], paths: Iterable[str]) -> dict[str, T]:
    """function(path) of each distinct path, in threads, since a network disk serves many requests at a time."""
    unique = list(dict.fromkeys(paths))
    chunks = [unique[i : i + PATHS_PER_TASK] for i in range(0, len(unique), PATHS_PER_TASK)]
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda chunk: [function(path) for path in chunk], chunks)
        return dict(zip(unique, chain.from_iterable(results), strict=True))

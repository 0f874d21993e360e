"""Where videos and images come from: every source lists its files as a table, without decoding anything.

The table has the columns path (absolute), num_frames, height, width, fps (NaN where unknown), split and text
(None where not given) and row, the place in the source that messages name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from vae3d.data.readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from vae3d.errors import UserError

NUMBERS = ("num_frames", "height", "width", "fps")
SPLITS = ("train", "val", "test")


class DataError(UserError):
    """A data set that cannot be used as it is; the message says what to change."""


class Source(Protocol):
    def table(self) -> pd.DataFrame:
        """The files, one row each. Raises DataError."""


class Table:
    """A CSV or parquet file with a column `path`; optional text, num_frames, height, width, fps and split.

    Relative paths are relative to `root`, by default the table's folder.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent

    def table(self) -> pd.DataFrame:
        raw = self._read()
        if "path" not in raw.columns:
            raise DataError(f"{self.path} has no column `path`; its columns are {', '.join(map(str, raw.columns))}")
        if raw.empty:
            raise DataError(f"{self.path} has no rows")
        rows = raw.index.to_numpy() + 1
        empty = raw["path"].isna() | (raw["path"].astype(str).str.strip() == "")
        if empty.any():
            raise DataError(f"{self.path}: `path` is empty in rows {_some(rows[empty])}; fill or drop them")
        paths = [str(self.root / path) for path in raw["path"].astype(str)]
        table = pd.DataFrame({"path": paths, "row": rows})
        for name in NUMBERS:
            table[name] = self._numbers(raw, name, rows)
        table["text"] = raw["text"] if "text" in raw.columns else None
        table["split"] = self._splits(raw, rows)
        return table

    def _read(self) -> pd.DataFrame:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; data.source.path takes a CSV or parquet file")
        try:
            if self.path.suffix == ".parquet":
                return pd.read_parquet(self.path)
            return pd.read_csv(self.path, dtype={"path": str, "split": str, "text": str})
        except pd.errors.EmptyDataError as error:
            raise DataError(f"{self.path} is empty") from error
        except (pd.errors.ParserError, UnicodeDecodeError, OSError, ValueError) as error:
            raise DataError(f"{self.path} is not a readable table: {error}") from error

    def _numbers(self, raw: pd.DataFrame, name: str, rows: np.ndarray) -> pd.Series | float:
        if name not in raw.columns:
            return np.nan
        numbers = pd.to_numeric(raw[name], errors="coerce")
        smallest = 0 if name == "fps" else 1  # images have no rate
        bad = (numbers.isna() & raw[name].notna()) | (numbers < smallest)
        if bad.any():
            raise DataError(f"{self.path}: `{name}` is no positive number in rows {_some(rows[bad])}")
        return numbers.astype(float)

    def _splits(self, raw: pd.DataFrame, rows: np.ndarray) -> pd.Series | None:
        if "split" not in raw.columns:
            return None
        bad = ~raw["split"].isin(SPLITS)
        if bad.any():
            raise DataError(
                f"{self.path}: `split` must be one of {', '.join(SPLITS)}; it is not in rows {_some(rows[bad])}"
            )
        return raw["split"]


class Folder:
    """Every video and image under a folder, sorted by name; or one file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def table(self) -> pd.DataFrame:
        if self.path.is_file():
            files = [self.path]
        elif self.path.is_dir():
            files = sorted(f for f in self.path.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        else:
            raise DataError(f"{self.path}: no such file or folder")
        if not files:
            raise DataError(f"{self.path} holds no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})")
        table = pd.DataFrame({"path": [str(f) for f in files], "row": np.arange(1, len(files) + 1)})
        return table.assign(**dict.fromkeys(NUMBERS, np.nan), text=None, split=None)


def open_source(path: str | Path, root: str | Path | None = None) -> Source:
    """A Table for .csv and .parquet, else a Folder."""
    return Table(path, root) if Path(path).suffix in (".csv", ".parquet") else Folder(path)


def _some(rows: np.ndarray, count: int = 5) -> str:
    return ", ".join(map(str, rows[:count])) + (f" and {len(rows) - count} more" if len(rows) > count else "")

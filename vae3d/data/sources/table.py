"""Tables of files: CSV, TSV and parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vae3d.arguments import check_arguments
from vae3d.data.media import DataError
from vae3d.data.sources.table_files import ERROR, read_table
from vae3d.data.storage.paths import folder_of, is_stored
from vae3d.data.table.rows import normalise_rows


class Table:
    """A CSV, TSV (also .gz) or parquet file with a column `path`; optional text, label, num_frames, height, width,
    fps, start, end and split.

    A path is a local file, a URL, or a member of a tar (see storage/paths.py). path and root may be URLs themselves.
    root: what relative paths are relative to; None: the table's folder. A row with start or end (seconds) is that part
    of its file; num_frames is the whole file's nevertheless.
    """

    @check_arguments
    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = path if is_stored(path) else Path(path)
        self.root = root if root is not None else folder_of(path)

    def table(self) -> pd.DataFrame:
        """Raises DataError if the file is no table, or has no column `path` or no row."""
        raw = read_table(self.path)
        self.check_columns(raw.columns, len(raw))
        return normalise_rows(raw, self.root)

    def check_columns(self, names: Sequence[str], rows: int) -> None:
        """Raises DataError if there is no column `path`, or no row."""
        if "path" not in names:
            named = ", ".join(str(name) for name in names if name != ERROR)
            raise DataError(f"{self.path} has no column `path`; its first line names the columns {named}")
        if not rows:
            raise DataError(f"{self.path} has no rows")

"""Image datasets of Hugging Face in a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from vae3d.data.dataset_rows import encoded, image_columns, open_splits, row_path
from vae3d.data.media import DataError
from vae3d.data.rows import rows_from_paths

NO_LABEL = -1  # of test sets whose labels are kept secret
HELD_OUT = ("validation", "valid", "val", "test")  # the first that exists is the validation split


class HuggingFace:
    """The images of a folder that `save_to_disk` wrote, or of a downloaded repository with parquet, arrow or image
    files, as `datasets.load_dataset` reads it. Never goes online.

    split: for training; None: train, or the only split. val_split: for validation; None: the first that exists of
    validation, valid, val and test; without one, data.num_val_files applies. column: of images; None: the only one.
    A column `label` gives the labels: classes by number. Rows without an image get an error. `notes`: splits and
    counts.
    """

    def __init__(
        self, path: str | Path, split: str | None = None, val_split: str | None = None, column: str | None = None
    ) -> None:
        self.path, self.split, self.val_split, self.column = path, split, val_split, column
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if the folder is no dataset, or has no such split or column."""
        folder = os.path.abspath(self.path) if os.path.isdir(self.path) else str(self.path)
        splits = open_splits(folder)
        roles = self._roles(list(splits))
        rows = splits[next(iter(roles))]
        column = self._column(folder, image_columns(rows), rows.column_names)
        tables = {name: _rows(folder, name, column) for name in roles}
        table = pd.concat([rows.assign(split=roles[name]) for name, rows in tables.items()], ignore_index=True)
        table["row"] = np.arange(1, len(table) + 1)
        if "val" not in roles.values():
            table["split"] = None
        counts = ", ".join(f"{len(rows)} of {name} ({roles[name]})" for name, rows in tables.items())
        self.notes = [f"images in the column {column} of {folder}: {counts}"]
        return table

    def _roles(self, splits: Sequence[str]) -> dict[str, str]:
        """Split of the dataset -> split of the table (train, val, test). The training split comes first."""
        train = self.split or (splits[0] if len(splits) == 1 else "train")
        for key, name in (("split", train), ("val_split", self.val_split)):
            if name is not None and name not in splits:
                raise DataError(f"data.source.{key}={name}: {self.path} has only the splits {', '.join(splits)}")
        others = [name for name in (self.val_split, *HELD_OUT) if name in splits and name != train]
        roles = {train: "train"} | dict.fromkeys(others[:1], "val")
        return roles | ({"test": "test"} if "test" in splits and "test" not in roles else {})

    def _column(self, folder: str, images: Sequence[str], columns: Sequence[str]) -> str:
        column = self.column or (images[0] if len(images) == 1 else None)
        if column in images:
            return column
        setting = "" if self.column is None else f"data.source.column={self.column}: "
        hint = "; set data.source.column to one of them" if images else ""
        found = f"{', '.join(images) or 'none'} of its columns ({', '.join(columns)})"
        raise DataError(f"{setting}{folder} holds images in {found}{hint}")


def _rows(folder: str, split: str, column: str) -> pd.DataFrame:
    """The rows of a split. Where only the path of an image is stored, the row is that file."""
    images = encoded(folder, split, column)[:][column]
    external = pc.is_null(pc.struct_field(images, "bytes")).to_pylist()
    files = pc.struct_field(images, "path").to_pylist()
    paths, errors = [], []
    for row, (is_external, file) in enumerate(zip(external, files, strict=True)):
        paths.append(os.path.join(folder, file) if is_external and file else row_path(folder, split, column, row))
        errors.append("has no image" if is_external and not file else None)
    table = rows_from_paths(paths, [f"{split}/{row}" for row in range(len(paths))])
    rows = open_splits(folder)[split]
    if "label" in rows.column_names:
        labels = rows.select_columns(["label"])[:]["label"]
        table["label"] = [label if isinstance(label, int | str) and label != NO_LABEL else None for label in labels]
    return table.assign(num_frames=1.0, fps=0.0, error=errors)

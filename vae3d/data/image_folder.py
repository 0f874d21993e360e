"""Folders and tables of images, and of nothing else."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from vae3d.data.images import IMAGE_SUFFIXES, is_sequence
from vae3d.data.open_source import holds_dataset, open_source
from vae3d.data.readers import is_image
from vae3d.data.sources import SPLITS, DataError, exists, files_under, rows_from_paths

FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # and their splits


class ImageFolder:
    """The images of a folder and the folders in it, of a CSV or parquet table with a column `path`, of a JSON list, or
    of a Hugging Face dataset on this disk.

    If a folder has folders `train` and `val` (or `valid`, `validation`) or `test`, they are its splits, and images
    outside of them are left out. `test` serves for validation if there is no other. In a table the column `split` does
    this. Other names, such as those of classes, mean nothing.
    `notes` tells numbers, and what is left out because it is no image.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path, self.root = Path(path), root
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if there are no images. What is wrong with a row of a table is its `error`."""
        self.notes = []
        table = self._listed() if self.path.is_dir() and not holds_dataset(self.path) else self._table()
        usable = table["error"].isna()
        table.loc[usable, "num_frames"], table.loc[usable, "fps"] = 1.0, 0.0
        counts = [f"{name} {count}" for name in SPLITS if (count := (usable & (table["split"] == name)).sum())]
        self.notes.insert(0, f"{self.path}: {usable.sum()} images{': ' if counts else ''}{', '.join(counts)}")
        return table

    def _listed(self) -> pd.DataFrame:
        files, top = files_under(self.path), os.path.abspath(self.path)
        names = [name for name in files if is_image(name)]
        self._tell_others([name for name in files if not is_image(name)], not names)
        table = rows_from_paths([os.path.join(top, name) for name in names], names)
        splits = _splits_of(names)
        if splits is None:
            return table
        table["split"] = splits
        if "test" in splits and "val" not in splits:
            self.notes.append("there is no folder val, so test serves for validation")
            table["split"] = table["split"].replace("test", "val")
        outside = table["split"].isna()
        if outside.any():
            self.notes.append(f"left out, since they are in no folder of a split: {outside.sum()} images")
        return table[~outside].reset_index(drop=True)

    def _table(self) -> pd.DataFrame:
        source = open_source(self.path, self.root)
        table = source.table()
        self.notes += getattr(source, "notes", ())
        images = table["path"].map(is_image) | table["error"].notna()
        self._tell_others(table.loc[~images, "path"], not images.any())
        table = table[images].reset_index(drop=True)
        gone = table["error"].isna() & ~table["path"].map(exists)
        table.loc[gone, "error"] = "no such file"
        return table

    def _tell_others(self, files: Iterable[str], alone: bool) -> None:
        """Note the files that are no images, or, if they are alone, raise DataError."""
        told = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind, files)).most_common())
        if alone:
            found = f", but {told}; data=folder takes videos" if told else ""
            raise DataError(f"{self.path} holds no images ({' '.join(IMAGE_SUFFIXES)}){found}")
        if told:
            self.notes.append(f"left out, since they are no images: {told}")


def _kind(name: str) -> str:
    return "numbered images" if is_sequence(name) else os.path.splitext(name)[1].lower() or "without extension"


def _splits_of(names: Sequence[str]) -> list[str | None] | None:
    """The split that the outermost folder of each file is called after; None if the folders are no splits."""
    found = [FOLDERS.get(name.split(os.sep)[0].lower()) if os.sep in name else None for name in names]
    return found if "train" in found and {"val", "test"} & set(found) else None

"""Images only, from a folder, a table, a JSON list or a Hugging Face dataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from vae3d.arguments import check_arguments
from vae3d.data.decoding.images import IMAGE_SUFFIXES, is_sequence
from vae3d.data.decoding.readers import is_image
from vae3d.data.media import DataError
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.local_files import files_under
from vae3d.data.sources.open_source import Source, holds_dataset, open_source
from vae3d.data.storage.paths import is_stored, suffix_of
from vae3d.data.table.rows import SPLITS, Listing, mark_missing_files
from vae3d.text import plural

FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # name -> split
IMAGE = {"num_frames": 1.0, "fps": 0.0}


class ImageFolder:
    """The images under a folder, of a table with a column `path`, of a JSON list, or of a local Hugging Face dataset.

    If a folder contains the folders `train` and `val` (or `valid`, `validation`) or `test`, these are the splits, and
    images outside of them are skipped. Without `val`, `test` is used for validation. In a table, the column `split`
    does the same. Other folder names, such as classes, have no meaning here.
    `notes`: counts, and what is skipped because it is no image.
    """

    @check_arguments
    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path, self.root = path if is_stored(path) else Path(path), root
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if there are no images. Invalid rows of a table get an `error`."""
        if self.is_folder():
            return self.listing().table()
        self.notes = []
        table = self._images_of_source()
        usable = table["error"].isna()
        table.loc[usable, "num_frames"], table.loc[usable, "fps"] = IMAGE["num_frames"], IMAGE["fps"]
        self._note_counts(usable.sum(), Counter(table.loc[usable, "split"]))
        return table

    def is_folder(self) -> bool:
        """Whether the images are the files under a folder."""
        return not is_stored(self.path) and self.path.is_dir() and not holds_dataset(self.path)

    def listing(self) -> Listing:
        """The images under a folder. Raises DataError if there are none."""
        self.notes = []
        files, top = files_under(self.path), os.path.abspath(self.path)
        names = [name for name in files if is_image(name)]
        self._note_other_files([name for name in files if not is_image(name)], not names)
        splits = [FOLDERS.get(name.split(os.sep)[0].lower()) if os.sep in name else None for name in names]
        kept: list[str] | None = None
        if "train" in splits and {"val", "test"} & set(splits):
            if "val" not in splits:
                self.notes.append("there is no folder val; test is used for validation")
                splits = ["val" if split == "test" else split for split in splits]
            names = [name for name, split in zip(names, splits, strict=True) if split is not None]
            kept = [split for split in splits if split is not None]
            if outside := len(splits) - len(kept):
                self.notes.append(f"skipped, because they are in no folder of a split: {plural(outside, 'image')}")
        self._note_counts(len(names), Counter(kept))
        return Listing([os.path.join(top, name) for name in names], names, kept, IMAGE)

    def _note_counts(self, images: int, of_split: Mapping[str, int]) -> None:
        counts = [f"{name} {of_split[name]}" for name in SPLITS if of_split[name]]
        self.notes.insert(0, f"{self.path}: {plural(images, 'image')}{': ' if counts else ''}{', '.join(counts)}")

    def _images_of_source(self) -> pd.DataFrame:
        source = open_source(self.path, self.root)
        table = source.table()
        self.notes += getattr(source, "notes", ())
        images = table["path"].map(is_image) | table["error"].notna()
        self._note_other_files(table.loc[~images, "path"], not images.any())
        table = table[images].reset_index(drop=True)
        mark_missing_files(table)
        return table

    def _note_other_files(self, files: Iterable[str], no_images: bool) -> None:
        """Note the files that are no images. Raises DataError if there are no images."""
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind, files)).most_common())
        if no_images:
            videos = "folder" if os.path.isdir(self.path) else "video_csv"
            found = f", but {counts}; data={videos} takes videos" if counts else ""
            raise DataError(f"{self.path} holds no images ({' '.join(IMAGE_SUFFIXES)}){found}")
        if counts:
            self.notes.append(f"skipped, because they are no images: {counts}")


def open_images_or_source(path: str, root: str | None = None) -> Source:
    """The source of a path; a folder of images only is an ImageFolder, whose subfolders name splits."""
    source = open_source(path, root)
    is_folder = isinstance(source, Folder) and not is_stored(source.path) and source.path.is_dir()
    images = is_folder and all(map(is_image, source.listing().names))
    return ImageFolder(path) if images else source


def _kind(name: str) -> str:
    return "numbered images" if is_sequence(name) else suffix_of(name) or "without extension"

"""Sources: what lists the files of a data set, as a table (see table/rows.py).

    Table        CSV, TSV or parquet                                          table.py
    Folder       all videos and images of a folder, one file, or sequences    folder.py
    JsonClips    a JSON list of clips                                         json_clips.py
    HuggingFace  images or videos of Hugging Face                             hugging_face.py
    ImageFolder  images only, of any of these                                 image_folder.py
    WebDataset   videos and images in tar shards                              webdataset.py
    ErpRooms     panorama sequences by area and room                          rooms.py

open_source picks one of the first four, or WebDataset, for a path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import pandas as pd

from vae3d.data.decoding.readers import is_media
from vae3d.data.sources.dataset_rows import has_tables, is_saved
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.hugging_face import HuggingFace
from vae3d.data.sources.json_clips import JsonClips
from vae3d.data.sources.local_files import files_under
from vae3d.data.sources.table import Table
from vae3d.data.sources.table_files import JSON, kind_of
from vae3d.data.sources.webdataset import WebDataset, is_indexed_url, is_shards
from vae3d.data.storage.paths import is_stored, is_url, local_name


class Source(Protocol):
    """May have `notes`: lines for the log at the start of a run, filled by `table`."""

    def table(self) -> pd.DataFrame:
        """The files, one row each; see table/rows.py. Raises DataError."""


def open_source(path: str | Path, root: str | Path | None = None) -> Source:
    """A Table for .csv, .tsv and .parquet, JsonClips for .json and .jsonl, HuggingFace for a dataset's folder,
    WebDataset for tars, their index, a folder of tars without videos and images, and a URL with an index of tars, else
    a Folder. path: local or a URL.

    Raises DataError for a file of another kind.
    """
    path = local_name(str(path)) or path
    if is_shards(path) and not (os.path.isdir(path) and any(map(is_media, files_under(path)))):
        return WebDataset(path)
    stored = is_stored(path)
    if not stored and holds_dataset(path):
        return HuggingFace(path)
    kind = kind_of(path)
    if kind is None and is_url(path) and not is_media(str(path)) and is_indexed_url(str(path)):
        return WebDataset(path)
    if kind is None or (not stored and Path(path).is_dir()):
        return Folder(path)
    return (JsonClips if kind in JSON else Table)(path, root)


def holds_dataset(folder: str | Path) -> bool:
    """Whether a folder is a Hugging Face dataset: saved, or with parquet or arrow files and no videos or images."""
    return is_saved(folder) or (has_tables(folder) and not any(map(is_media, files_under(folder))))

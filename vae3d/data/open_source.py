"""Which reader a path needs."""

from __future__ import annotations

from pathlib import Path

from vae3d.data.dataset_rows import has_tables, is_saved
from vae3d.data.sources import Folder, Source, Table, files_under, is_media
from vae3d.data.tables import JSON, kind_of


def open_source(path: str | Path, root: str | Path | None = None) -> Source:
    """A Table for .csv, .tsv and .parquet, JsonClips for .json and .jsonl, HuggingFace for a dataset's folder, else a
    Folder. Raises DataError for a file that is none of these."""
    from vae3d.data.hugging_face import HuggingFace  # which build on this module
    from vae3d.data.json_clips import JsonClips

    if holds_dataset(path):
        return HuggingFace(path)
    kind = kind_of(path)
    if kind is None or Path(path).is_dir():
        return Folder(path)
    return (JsonClips if kind in JSON else Table)(path, root)


def holds_dataset(folder: str | Path) -> bool:
    """Whether a folder is a dataset of Hugging Face: saved, or with parquet or arrow files and no videos or images."""
    return is_saved(folder) or (has_tables(folder) and not any(map(is_media, files_under(folder))))

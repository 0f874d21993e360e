"""Images in local Hugging Face datasets, addressed by paths:

    /absolute/folder/of/the/dataset/SPLIT/COLUMN/ROW.hfimage        (rows count from 0)

A dataset is opened once per process and memory-mapped: processes share its pages, and only requested rows are read.
Needs the package datasets (the extra `huggingface`), which never goes online here.
"""

from __future__ import annotations

import io
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote

import yaml

from vae3d.data.media import DataError, MediaError, one_line
from vae3d.data.tables import kind_of
from vae3d.text import plural

if TYPE_CHECKING:
    import datasets

SUFFIX = ".hfimage"
SAVED = ("dataset_dict.json", "state.json")  # of DatasetDict.save_to_disk, and of Dataset.save_to_disk
TABLES = (".parquet", ".arrow")


def row_path(folder: str | Path, split: str, column: str, row: int) -> str:
    """The path of a row's image, for open_media."""
    return os.path.join(os.path.abspath(folder), quote(split, ""), quote(column, ""), f"{row}{SUFFIX}")


def is_row(path: str | Path) -> bool:
    return str(path).endswith(SUFFIX)


def open_row(path: str | Path) -> BinaryIO:
    """The encoded image of a row. Raises MediaError if the row does not exist, or has no image."""
    folder, split, column, row = _parts(path)
    try:
        images = encoded(folder, split, column)
    except DataError as error:
        raise MediaError(path, str(error)) from error
    if row >= len(images):
        raise MediaError(path, f"the dataset has {plural(len(images), 'row')}, counted from 0")
    image = images[row][column][0]
    if not image.is_valid or not image["bytes"].is_valid:
        raise MediaError(path, "has no image")
    return io.BytesIO(image["bytes"].as_py())


def version_of(path: str | Path) -> list[int] | None:
    """Bytes and modification time (ns) of the files of a row's dataset; None if it cannot be opened."""
    try:
        return list(_version(*_parts(path)[:3]))
    except (DataError, MediaError, OSError):
        return None


@lru_cache(maxsize=8)
def _version(folder: str, split: str, column: str) -> tuple[int, int]:
    stats = [os.stat(file["filename"]) for file in encoded(folder, split, column).cache_files]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _parts(path: str | Path) -> tuple[str, str, str, int]:
    """Folder, split, column and row. Raises MediaError."""
    found = re.fullmatch(rf"(.+)/([^/]+)/([^/]+)/([0-9]+){re.escape(SUFFIX)}", str(path))
    if not found:
        raise MediaError(path, f"is no row of a dataset: FOLDER/SPLIT/COLUMN/ROW{SUFFIX}")
    return found[1], unquote(found[2]), unquote(found[3]), int(found[4])


@lru_cache(maxsize=8)
def encoded(folder: str, split: str, column: str) -> datasets.Dataset:
    """The column alone, as Arrow tables: images are neither decoded nor copied. Raises DataError."""
    splits = open_splits(folder)
    if split not in splits or column not in image_columns(splits[split]):
        raise DataError(f"{folder} has no split `{split}` with images in a column `{column}`")
    return splits[split].select_columns([column]).with_format("arrow")


def image_columns(rows: datasets.Dataset) -> list[str]:
    """Columns of images, or of their stored form {bytes, path}."""
    image = _library().Image
    stored = {"bytes", "path"}
    return [
        name
        for name, kind in rows.features.items()
        if isinstance(kind, image) or (isinstance(kind, dict) and set(kind) == stored)
    ]


@lru_cache(maxsize=4)
def open_splits(folder: str) -> dict[str, datasets.Dataset]:
    """All splits of a dataset. Raises DataError if the folder holds none."""
    library = _library()
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder{how_to_download(folder)}")
    if remote := _remote_file(Path(folder)):
        raise DataError(f"{folder}: the data files that its README.md names are on the network ({remote})")
    try:
        opened = library.load_from_disk(folder) if is_saved(folder) else library.load_dataset(folder)
    except (OSError, ValueError, ImportError, KeyError, library.exceptions.DatasetsError) as error:
        raise DataError(f"{folder} cannot be opened as a dataset: {one_line(error, 500)}") from error
    return dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}


def how_to_download(path: str | Path) -> str:
    """A hint if `path`, which does not exist, may be the name of a dataset on the hub; else empty."""
    is_file_name = kind_of(path) is not None or Path(path).suffix == ".arrow"
    if is_file_name or not re.fullmatch(r"\w[\w.-]*/[\w-][\w.-]*", str(path)):
        return ""
    name = Path(path).name
    return f"; if it is a dataset on the hub, get it with: hf download {path} --repo-type dataset --local-dir {name}"


def is_saved(folder: str | Path) -> bool:
    """Whether save_to_disk wrote it."""
    return any(Path(folder, name).is_file() for name in SAVED)


def has_tables(folder: str | Path) -> bool:
    """Whether a folder has parquet or arrow files, in it or in its folder `data`."""
    return any(file.suffix.lower() in TABLES for place in (".", "data") for file in Path(folder, place).glob("*"))


def _library() -> ModuleType:
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # read when the package is imported
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"datasets of Hugging Face need the extra `huggingface`: pip install datasets ({error})"
        ) from error
    return datasets


def _remote_file(folder: Path) -> str | None:
    """A URL of data in a repository's card, which even an offline load_dataset would open; None without one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:  # load_dataset reports it
        return None
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    found = re.search(r"\w+://[^\s\"]+", json.dumps(configs, default=str))
    return found and found[0]

"""Sources: what lists the files of a data set, as a table (see rows.py).

    Table        CSV, TSV or parquet                                          here
    Folder       all videos and images of a folder, one file, or sequences    here
    JsonClips    a JSON list of clips                                         json_clips.py
    HuggingFace  images or videos of Hugging Face                             hugging_face.py
    ImageFolder  images only, of any of these                                 image_folder.py
    WebDataset   videos and images in tar shards                              webdataset.py
    ErpRooms     panorama sequences by area and room                          rooms.py

open_source picks one of the first four, or WebDataset, for a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path
from typing import Protocol

import pandas as pd

from vae3d.data.dataset_rows import has_tables, how_to_download, is_saved
from vae3d.data.hugging_face import HuggingFace
from vae3d.data.images import IMAGE_SUFFIXES, is_sequence, numbered
from vae3d.data.json_clips import JsonClips
from vae3d.data.media import DataError, MediaError
from vae3d.data.paths import folder_of, is_stored, is_url, local_name, split_member, suffix_of
from vae3d.data.readers import VIDEO_SUFFIXES
from vae3d.data.rows import Listing, absolute_paths, normalise_rows
from vae3d.data.stores import find_objects, list_urls
from vae3d.data.tables import ERROR, JSON, kind_of, read_table
from vae3d.data.webdataset import TAR, WebDataset, is_indexed_url, is_shards, is_tar

ARCHIVES = (".zip", ".gz", ".7z", ".rar")


class Source(Protocol):
    """May have `notes`: lines for the log at the start of a run, filled by `table`."""

    def table(self) -> pd.DataFrame:
        """The files, one row each; see rows.py. Raises DataError."""


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


class Table:
    """A CSV, TSV (also .gz) or parquet file with a column `path`; optional text, label, num_frames, height, width,
    fps, start, end and split.

    A path is a local file, a URL, or a member of a tar (see paths.py). path and root may be URLs themselves.
    root: what relative paths are relative to; None: the table's folder. A row with start or end (seconds) is that part
    of its file; num_frames is the whole file's nevertheless.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = path if is_stored(path) else Path(path)
        self.root = root if root is not None else folder_of(path)

    def table(self) -> pd.DataFrame:
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


class Folder:
    """Every video and image under a folder, sorted by name; or one file; or image sequences: a path with a `*` in the
    file name, such as rooms/*/output/panorama_*.png, gives one video per matching folder.

    Of a URL, every video and image under it. There, a `*` stands for any characters, and {000..999} for numbers.
    """

    def __init__(self, path: str | Path) -> None:
        path = local_name(str(path)) or path
        self.path = path if is_stored(path) else Path(path)

    def table(self) -> pd.DataFrame:
        return self.listing().table()

    def listing(self) -> Listing:
        """Raises DataError if there is no such folder or file, or it holds no video or image."""
        if is_stored(self.path):
            return Listing(*objects_under(str(self.path)))
        if is_sequence(self.path):
            top = next(parent for parent in self.path.parents if "*" not in str(parent))
            names = [str(path.relative_to(top)) for path in sequences(self.path)]
        elif self.path.is_file():
            if not is_media(self.path.name):
                kind = self.path.suffix or "a file without extension"
                hint = "; extract it, and give the folder" if kind.lower() in ARCHIVES else ""
                hint = "; use data=webdataset" if self.path.name.lower().endswith(TAR) else hint
                raise DataError(
                    f"{self.path}: {kind} is not supported; give a table (.csv, .tsv, .parquet), a list (.json, "
                    f".jsonl), a folder, a video or an image{hint}"
                )
            names, top = [self.path.name], self.path.parent
        elif self.path.is_dir():
            names, top = [name for name in files_under(self.path) if is_media(name)], self.path
        else:
            raise DataError(f"{self.path}: no such file or folder{how_to_download(self.path)}")
        if not names:
            raise DataError(f"{self.path} holds no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})")
        return Listing(absolute_paths(top, names), names)


def objects_under(url: str) -> tuple[list[str], list[str]]:
    """URLs of the videos and images that a URL lists, and their names, relative to it. Raises DataError."""
    if split_member(url) is not None:
        return [url], [url]
    try:
        if "*" in url or "{" in url:
            top, found = re.split(r"[^/]*[*{]", url, maxsplit=1)[0].rstrip("/"), list_urls(url)
        elif is_media(url):
            top, found = url.rpartition("/")[0], [url]
        else:
            top, found = url.rstrip("/"), find_objects(url)
    except MediaError as error:
        raise DataError(str(error)) from error
    names = [path.removeprefix(f"{top}/") for path in found]
    chosen = [i for i, name in enumerate(names) if is_media(found[i]) and not re.search(r"(^|/)\.", name)]
    if not chosen:
        hint = "; of its tars, which have no index.arrow, give a pattern, such as {000..999}.tar"
        tars = hint if any(map(is_tar, found)) else ""
        raise DataError(f"{url} lists no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}){tars}")
    return [found[i] for i in chosen], [names[i] for i in chosen]


def files_under(folder: str | Path) -> list[str]:
    """Relative names of all files under a folder, sorted. Links are followed. Hidden files and folders are skipped, and
    what a probe wrote.

    Raises DataError for a name that is not UTF-8.
    """
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_left_out(here, name)]
        inside = os.path.relpath(here, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if not name.startswith(".")]
    for name in found:
        if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
            raise DataError(f"{folder}: the name of the file {os.fsencode(name)!r} is not UTF-8; rename it")
    return sorted(found, key=lambda name: name.split(os.sep))


def _is_left_out(here: str, name: str) -> bool:
    """Whether a folder is hidden, a link to one that contains it, or has the results of probing a table."""
    return name.startswith(".") or name.endswith(".probe") or _links_to_parent(here, name)


def _links_to_parent(here: str, name: str) -> bool:
    """Whether a folder is a link to one that contains it."""
    path = os.path.join(here, name)
    return os.path.islink(path) and f"{os.path.realpath(here)}/".startswith(f"{os.path.realpath(path)}/")


def is_media(name: str) -> bool:
    """Whether a name has the extension of a video or an image."""
    return suffix_of(name) in VIDEO_SUFFIXES + IMAGE_SUFFIXES


def sequences(path: Path) -> list[Path]:
    """The image sequences that match a path, whose folders may have a `*` too. Raises DataError if there is none."""
    try:
        matches = numbered(path.name)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    folders = sorted(glob(escape(str(path.parent)).replace("[*]", "*")))
    found = [folder for folder in folders if os.path.isdir(folder) and any(map(matches, os.listdir(folder)))]
    if not found:
        raise DataError(f"{path}: no file matches, with a number for the * of its name")
    return [Path(folder) / path.name for folder in found]

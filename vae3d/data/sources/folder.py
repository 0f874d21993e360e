"""All videos and images of a folder or a URL, one file, or image sequences."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from glob import escape, glob
from pathlib import Path

import pandas as pd

from vae3d.arguments import check_arguments
from vae3d.data.decoding.images import IMAGE_SUFFIXES, is_sequence, number_matcher
from vae3d.data.decoding.readers import VIDEO_SUFFIXES, is_media
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.dataset_rows import how_to_download
from vae3d.data.sources.local_files import files_under, report_unlisted
from vae3d.data.sources.webdataset import TAR, is_tar
from vae3d.data.storage.paths import is_stored, local_name, split_member, suffix_of
from vae3d.data.storage.stores import find_objects, list_urls
from vae3d.data.table.rows import Listing, absolute_paths

ARCHIVES = (".zip", ".gz", ".7z", ".rar")
UNREAD_IMAGES = (".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef")
UNREAD_VIDEOS = (".mxf", ".f4v", ".rm", ".rmvb", ".divx", ".y4m", ".yuv", ".h264", ".264", ".hevc", ".265", ".ivf")


class Folder:
    """Every video and image under a folder, sorted by name; or one file; or image sequences: a path with a `*` in the
    file name, such as rooms/*/output/panorama_*.png, gives one video per matching folder.

    Of a URL, every video and image under it. There, a `*` stands for any characters, and {000..999} for numbers.
    """

    @check_arguments
    def __init__(self, path: str | Path) -> None:
        path = local_name(str(path)) or path
        self.path = path if is_stored(path) else Path(path)
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError as `listing` does."""
        return self.listing().table()

    def listing(self) -> Listing:
        """Raises DataError if there is no such folder or file, or it holds no video or image."""
        if is_stored(self.path):
            paths, names, self.notes = objects_under(str(self.path))
            return Listing(paths, names)
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
            names, others, top = [], [], self.path
            for name in files_under(self.path):
                (names if is_media(name) else others).append(name)
            self.notes = unread_notes(others)
        else:
            raise DataError(f"{self.path}: no such file or folder{how_to_download(self.path)}")
        if not names:
            raise DataError(f"{self.path} holds no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})")
        return Listing(absolute_paths(top, names), names)


def unread_notes(names: Iterable[str]) -> list[str]:
    """What is said of images and videos of kinds that nothing here reads, such as .heic; [] if there are none."""
    kinds = Counter(suffix for name in names if (suffix := suffix_of(name)) in UNREAD_IMAGES + UNREAD_VIDEOS)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return [f"skipped, because nothing here reads such files: {counts}; convert them"] if kinds else []


def objects_under(url: str) -> tuple[list[str], list[str], list[str]]:
    """URLs of the videos and images that a URL lists, their names, relative to it, and notes. Raises DataError."""
    if split_member(url) is not None:
        return [url], [url], []
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
    chosen, others = [], []
    for i, name in enumerate(names):
        if not re.search(r"(^|/)\.", name):
            (chosen if is_media(found[i]) else others).append(i)
    if not chosen:
        hint = "; of its tars, which have no index.arrow, give a pattern, such as {000..999}.tar"
        tars = hint if any(map(is_tar, found)) else ""
        raise DataError(f"{url} lists no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}){tars}")
    return [found[i] for i in chosen], [names[i] for i in chosen], unread_notes(found[i] for i in others)


def sequences(path: Path) -> list[Path]:
    """The image sequences that match a path, whose folders may have a `*` too. Raises DataError if there is none."""
    try:
        matches = number_matcher(path.name)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    found = []
    for folder in sorted(glob(escape(str(path.parent)).replace("[*]", "*"))):
        try:
            if os.path.isdir(folder) and any(map(matches, os.listdir(folder))):
                found.append(folder)
        except OSError as error:
            report_unlisted(error)
    if not found:
        raise DataError(f"{path}: no file matches, with a number for the * of its name")
    return [Path(folder) / path.name for folder in found]

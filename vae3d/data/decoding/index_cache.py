"""Indices of videos (see video_index.py) in $VAE3D_CACHE/index, built where they are missing or outdated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vae3d.data.decoding.index_build import build
from vae3d.data.decoding.video_index import VideoIndex, pack, parse
from vae3d.data.media import MediaError
from vae3d.data.storage.cache import cache_folder, warn_cache_unwritable
from vae3d.data.storage.files import FileRange, local_range
from vae3d.io import atomic_write

look_in: dict[Path, Callable[[Sequence], bytes | None]] = {}  # beside tables: key of a video -> a file of the cache


def open_index(video: FileRange) -> VideoIndex:
    """The index of a video: from the cache, from beside a table of this process, or built if the size or time of the
    file, tar or object changed. Raises MediaError.
    """
    key = key_of(video)
    file = _cache_file(key)
    index = _load(file, key)
    if index is None:
        found = (content for find in look_in.values() if (content := find(key)) is not None)
        index = next((index for content in found if (index := parse(content, key))), None)
    if index is None:
        index = build(video)
        _store(file, key, index)
    return index


def cached(path: str) -> tuple[list, bytes] | None:
    """Key and content of the cache's file of a video; None: there is none, or it is outdated."""
    try:
        key = key_of(local_range(path))
        content = _cache_file(key).read_bytes()
    except (OSError, MediaError):
        return None
    return (key, content) if parse(content, key) is not None else None


def key_of(video: FileRange) -> list:
    """Path and version of a video: the index of another version is outdated."""
    return [os.path.abspath(video.file) if video.is_plain else video.name, *video.version]


def _cache_file(key: list) -> Path:
    name = hashlib.blake2b(os.fsencode(key[0]), digest_size=12).hexdigest()
    return cache_folder() / "index" / name[:2] / name[2:]


def _load(file: Path, key: list) -> VideoIndex | None:
    """The cached index; None if there is none, or it is damaged or outdated."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    return parse(content, key)


def _store(file: Path, key: list, index: VideoIndex) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as stream:
            stream.write(pack(key, index))
    except OSError as error:
        warn_cache_unwritable(error, "each time a video is opened, the whole file is read")

"""Versions of source files, so that a resumed command or a cache notices that one was replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from vae3d.data.dataset_rows import is_row, version_of
from vae3d.data.images import is_sequence, sequence_files
from vae3d.data.media import MediaError
from vae3d.data.rows import in_threads
from vae3d.data.storage import split_member
from vae3d.hashing import file_hash, json_hash
from vae3d.io import FileError


def source_version(path: str, hashed: bool = False) -> dict[str, Any] | None:
    """Size and modification time of a source file, with `hashed` also its SHA-256; None if it cannot be read.

    An image sequence gives those of all its files, a row of a Hugging Face dataset those of the dataset's files.
    """
    if is_row(path):
        return {"dataset": version_of(path)}
    try:
        files = sequence_files(path)
        stats = [os.stat(file) for file in files]
        hashes = [file_hash(file) for file in files] if hashed else []
    except (OSError, MediaError, FileError):
        return None
    times = [stat.st_mtime_ns for stat in stats]
    single = len(files) == 1
    version = {
        "bytes": sum(stat.st_size for stat in stats),
        "modified": times[0] if single else json_hash(times),
    }
    if hashed:
        version["sha256"] = hashes[0] if single else json_hash(hashes)
    return version


def file_stamps(paths: Iterable[str]) -> dict[str, list[int] | None]:
    """file_stamp of each distinct path, in threads. Of members of tars: their own bytes and the time of the tar, which
    is looked up once per tar."""
    members = {path: member for path in dict.fromkeys(paths) if (member := split_member(path)) is not None}
    tars = in_threads(file_stamp, [tar for tar, *_ in members.values()])
    stamps = in_threads(file_stamp, [path for path in paths if path not in members])
    for path, (tar, _, size, _) in members.items():
        stamps[path] = tars[tar] and [size, *tars[tar][1:]]
    return stamps


def file_stamp(path: str) -> list[int] | None:
    """Bytes and modification time (ns) of a file, or of the dataset of a row; None if it does not exist.

    Of an image sequence: those of its first file, and the number of its files.
    """
    if is_row(path):
        return version_of(path)
    try:
        files = sequence_files(path)
        stat = os.stat(files[0])
    except (OSError, MediaError):
        return None
    return [stat.st_size, stat.st_mtime_ns, *([len(files)] if is_sequence(path) else [])]

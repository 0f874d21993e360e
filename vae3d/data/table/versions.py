"""Versions of source files, so that a resumed command or a cache notices that one was replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from vae3d.data.decoding.images import is_sequence, sequence_files
from vae3d.data.media import MediaError
from vae3d.data.storage.files import local_range, size_and_version
from vae3d.data.storage.paths import is_stored, split_member
from vae3d.data.table.rows import in_threads
from vae3d.hashing import file_hash, json_hash, stream_hash
from vae3d.io import FileError
from vae3d.seeding import seed_of


def source_version(path: str, hashed: bool = False) -> dict[str, Any] | None:
    """Size and modification time of a source file, with `hashed` also its SHA-256; None if it cannot be read.

    An image sequence gives those of all its files, a member of a tar its size and the time of the tar. An object of a
    store has a version, such as its ETag, for a time.
    Raises StorageError if its store does not answer.
    """
    if is_stored(path):
        return _stored_version(path, hashed)
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


def _stored_version(path: str, hashed: bool) -> dict[str, Any] | None:
    try:
        size, version = size_and_version(path)
        content = local_range(path).open() if hashed else None
    except (OSError, MediaError):
        return None
    found: dict[str, Any] = {"bytes": size, "modified" if isinstance(version, int) else "version": version}
    if content is not None:
        with content:
            found["sha256"] = stream_hash(content)
    return found


def file_stamps(paths: Iterable[str]) -> dict[str, list[int] | None]:
    """file_stamp of each distinct path, in threads. Of members of tars: their own bytes and the time of the tar, which
    is looked up once per tar."""
    members = {path: split_member(path) for path in dict.fromkeys(paths)}
    stamps = in_threads(file_stamp, [member[0] if member else path for path, member in members.items()])

    def stamp_of(path: str) -> list[int] | None:
        if members[path] is None:
            return stamps[path]
        tar, offset, size, _ = members[path]
        found = stamps[tar]
        return None if found is None or offset + size > found[0] else [size, found[1]]

    return {path: stamp_of(path) for path in members}


def file_stamp(path: str) -> list[int] | None:
    """Bytes and modification time (ns) of a file; None if it does not exist.

    Of an image sequence: those of its first file, and the number of its files. Of a member of a tar: its bytes, and the
    time of the tar. Of an object: its bytes, and a hash of its version. Raises StorageError if a store does not answer.
    """
    if is_stored(path):
        try:
            size, version = size_and_version(path)
        except MediaError:
            return None
        return [size, version if isinstance(version, int) else seed_of(version)]
    try:
        files = sequence_files(path)
        stat = os.stat(files[0])
    except (OSError, MediaError):
        return None
    return [stat.st_size, stat.st_mtime_ns, *([len(files)] if is_sequence(path) else [])]

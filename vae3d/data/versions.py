"""Versions of source files, so that a resumed command or a cache notices that one was replaced."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from vae3d.data.dataset_rows import is_row, version_of
from vae3d.data.images import is_sequence, sequence_files
from vae3d.data.media import MediaError
from vae3d.data.storage import is_stored, local_range, size_and_version
from vae3d.hashing import file_hash, json_hash
from vae3d.io import FileError
from vae3d.seeding import seed_of


def source_version(path: str, hashed: bool = False) -> dict[str, Any] | None:
    """Size and modification time of a source file, with `hashed` also its SHA-256; None if it cannot be read.

    An image sequence gives those of all its files, a row of a Hugging Face dataset those of the dataset's files, a
    member of a tar its size and the time of the tar. An object of a store has a version, such as its ETag, for a time.
    Raises StorageError if its store does not answer.
    """
    if is_row(path):
        return {"dataset": version_of(path)}
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
            digest = hashlib.sha256()
            while block := content.read(2**20):
                digest.update(block)
            found["sha256"] = digest.hexdigest()
    return found


def file_stamp(path: str) -> list[int] | None:
    """Bytes and modification time (ns) of a file, or of the dataset of a row; None if it does not exist.

    Of an image sequence: those of its first file, and the number of its files. Of a member of a tar: its bytes, and the
    time of the tar. Of an object: its bytes, and a hash of its version. Raises StorageError if a store does not answer.
    """
    if is_row(path):
        return version_of(path)
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

"""Copies of remote objects, and of members of tars, in $VAE3D_CACHE/objects.

It holds at most $VAE3D_CACHE_GIB (default 20); those that were used longest ago are deleted. All processes and ranks of
a machine share it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vae3d.data.media import DataError
from vae3d.data.storage import stores
from vae3d.data.storage.cache import cache_folder
from vae3d.data.storage.paths import suffix_of
from vae3d.data.storage.stores import StorageError

DEFAULT_GIB = 20.0
GIB = 2**30
KEEP = 0.9  # share of the limit that is left when the cache is full
USED_AGAIN = 60.0  # seconds after which a use is written down again
ABANDONED = 3600.0  # seconds without a write after which an unfinished file is deleted
UNFINISHED = ".part"  # suffix
SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")


def cache_limit() -> int:
    """Bytes that the cache may have: $VAE3D_CACHE_GIB. Raises DataError."""
    given = os.environ.get("VAE3D_CACHE_GIB", DEFAULT_GIB)
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise DataError(f"VAE3D_CACHE_GIB={given}: use the GiB that fetched objects may take on disk, such as 20")
    return int(limit * GIB)


def cached_copy(name: str, size: int, version: int | str, read: Callable[[int, int], bytes]) -> Path:
    """The local copy of an object or a member, fetched if it is not there. read: (first byte, bytes) -> its content.

    Its name has a hash of path and version: a replaced object is another one. Raises DataError, and what `read` does.
    """
    key = hashlib.blake2b(json.dumps([name, size, version]).encode(), digest_size=16).hexdigest()
    suffix = suffix_of(name)
    file = cache_folder() / "objects" / key[:2] / f"{key[2:]}{suffix if SUFFIX.fullmatch(suffix) else ''}"
    try:
        stat = file.stat()
    except FileNotFoundError:
        stat = None
    except OSError as error:
        raise _unusable(error) from error
    if stat is not None and stat.st_size == size:
        if time.time() - stat.st_atime > USED_AGAIN:
            with suppress(OSError):  # deleted meanwhile, or another user's
                os.utime(file, ns=(time.time_ns(), stat.st_mtime_ns))
        return file
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        _reserve(part, size, name)
        with part.open("r+b") as stream:
            for start in range(0, size, stores.PIECE):
                stream.write(read(start, min(stores.PIECE, size - start)))
            stream.flush()
            os.fsync(stream.fileno())  # else a machine that goes down leaves zeros of the full size
        os.replace(part, file)
    except OSError as error:
        raise _unusable(error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return file


def _unusable(error: OSError) -> StorageError:
    folder = cache_folder() / "objects"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk of the cache folder {folder} is full ({error.strerror}); lower VAE3D_CACHE_GIB (now "
            f"{cache_limit() / GIB:g}), or set VAE3D_CACHE to a folder on another disk"
        )
    return StorageError(
        f"the cache folder {folder} cannot be used ({error.strerror}); set VAE3D_CACHE to a writable folder"
    )


def _reserve(part: Path, size: int, name: str) -> None:
    """Make the unfinished file with its full size, and delete copies if the cache would become larger than its limit.

    The file `bytes` has the size of the cache, an upper bound: it is counted again when it reaches the limit.
    """
    from filelock import FileLock

    limit, folder = cache_limit(), cache_folder() / "objects"
    if size > limit:
        raise DataError(
            f"{name} has {size / GIB:.3g} GiB, more than VAE3D_CACHE_GIB={limit / GIB:g}, the limit of all fetched "
            f"objects in {folder}; raise it"
        )
    part.parent.mkdir(parents=True, exist_ok=True)
    total_file = folder / "bytes"
    with FileLock(folder / "lock").acquire(poll_interval=0.005):
        try:
            total = int(total_file.read_text())
        except (FileNotFoundError, ValueError):  # or a machine went down while it was written
            total = limit
        if total + size > limit:
            total = _delete_oldest(folder, min(int(KEEP * limit), limit - size))
        with part.open("xb") as stream:
            stream.truncate(size)
        total_file.write_text(str(total + size))


def _delete_oldest(folder: Path, target: int) -> int:
    """Delete the copies that were used longest ago until `target` bytes are left. Returns how many are.

    Files that are being written count and stay. A process that has a deleted file open goes on reading it.
    """
    copies, total, now = [], 0, time.time()
    for place in os.scandir(folder):
        for entry in os.scandir(place) if place.is_dir(follow_symlinks=False) else ():
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                total += stat.st_size
                if not entry.name.endswith(UNFINISHED):
                    copies.append((stat.st_atime_ns, stat.st_size, entry.path))
                elif now - stat.st_mtime > ABANDONED:
                    copies.append((0, stat.st_size, entry.path))
    for _, size, path in sorted(copies):
        if total <= target:
            break
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
    return total

"""The cache folder, and a lock, so that what is made there is made once."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vae3d.io import FileError

SILENT = 10.0  # seconds of waiting for another process before a line in the log
log = logging.getLogger("vae3d")


def cache_folder() -> Path:
    """$VAE3D_CACHE, or vae3d in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("VAE3D_CACHE", home / "vae3d"))


def warn_cache_unwritable(error: OSError, consequence: str) -> None:
    """Warn that something is not kept. consequence: what is done again instead each time."""
    warnings.warn(
        f"cannot write to the cache folder {cache_folder()} ({error.strerror}): {consequence}; set VAE3D_CACHE to a "
        "writable folder",
        stacklevel=3,
    )


@contextmanager
def alone(path: Path, kept: str) -> Iterator[None]:
    """Only one process of all is inside, with the lock beside `path`; the others wait, and say so in the log.

    kept: what the folder keeps, for messages. Raises FileError if the cache folder cannot be written.
    """
    from filelock import FileLock, Timeout  # imports asyncio

    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=SILENT)
        except Timeout:
            log.info("waiting for another process, which writes %s; it holds %s", kept, lock.lock_file)
            lock.acquire()
    except OSError as error:
        raise FileError(
            f"{path.parent} cannot be written ({error.strerror}), where {kept} are kept; set VAE3D_CACHE to a writable "
            "folder"
        ) from error
    try:
        yield
    finally:
        lock.release()

"""A lock of the cache folder, so that what is made there is made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from vae3d.io import FileError


@contextmanager
def alone(path: Path, kept: str) -> Iterator[None]:
    """Only one process of all is inside, with the lock beside `path`; the others wait.

    kept: what the folder keeps, for the message. Raises FileError if the cache folder cannot be written.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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

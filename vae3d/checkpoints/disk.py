"""Writing that fails: which exceptions say that the disk refused, and targets that are whole or not there."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vae3d.io import FileError, fsync_folder, fsync_tree, remove

# Errors of a full, failing or vanished disk, or of a folder whose permissions changed.
DISK_ERRORS = frozenset(
    {
        *(errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENOENT),
        *(errno.ENOLCK, errno.ENOSPC, errno.ENOTCONN, errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.EREMOTEIO),
        *(errno.EROFS, errno.ESTALE, errno.ETIMEDOUT),
    }
)


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception says that the disk refused; torch and safetensors report that in types of their own."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "IoError" in str(error)
    return isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error))


@contextmanager
def naming_target(path: Path) -> Iterator[None]:
    """Inside, an exception that says that the disk refused becomes a FileError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        why = error.strerror if isinstance(error, OSError) else f"as on a full disk: {error}"
        raise FileError(f"{path}: cannot be written: {why}") from error


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """write(path) for a `path` of the target's name in a folder beside it; then the file or folder `target`, and files
    that were written beside `path`, get their names, the target last.

    The target is whole or not there, also after a kill. Raises FileError if the disk refuses.
    """
    tmp = target.with_name(f".{target.name}.partial")
    with naming_target(target):
        try:
            remove(tmp)
            write(tmp / target.name)
            fsync_tree(tmp)
            for path in sorted(tmp.iterdir(), key=lambda path: path.name == target.name):
                path.replace(target.with_name(path.name))
        finally:
            remove(tmp)
        fsync_folder(target.parent)

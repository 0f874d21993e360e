"""Files under a local folder, as all sources list them."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

from vae3d.data.media import DataError


def files_under(folder: str | Path) -> list[str]:
    """Relative names of all files under a folder, sorted. Links are followed. Hidden files and folders are skipped, and
    what a probe wrote. Folders that cannot be listed: see report_unlisted."""
    found = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=partial(report_unlisted, top=folder)):
        folders[:] = [name for name in folders if not _is_left_out(here, name)]
        inside = os.path.relpath(here, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda name: name.split(os.sep))


def report_unlisted(error: OSError, top: str | Path = "") -> None:
    """Warn that a folder below `top` must not be read, as lost+found of a disk; say nothing of one that is not there.
    Raises DataError for other errors, by which files would be missing without a word."""
    path = str(error.filename)
    if path == str(top) or not isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
        raise DataError(f"{path} cannot be listed: {error.strerror}") from error
    if isinstance(error, PermissionError):
        warnings.warn(f"{path} cannot be listed ({error.strerror}); its files are left out", stacklevel=1)


def _is_left_out(here: str, name: str) -> bool:
    """Whether a folder is hidden, has the results of probing a table, or leads back to a folder on the way to it."""
    return name.startswith(".") or name.endswith(".probe") or _leads_back(here, name)


def _leads_back(here: str, name: str) -> bool:
    """Whether a folder in `here` is a link to one that contains `here`, by whatever links `here` was reached."""
    path = os.path.join(here, name)
    if not os.path.islink(path):
        return False
    target = os.path.join(os.path.realpath(path), "")
    return any(os.path.join(os.path.realpath(parent), "").startswith(target) for parent in (here, *Path(here).parents))

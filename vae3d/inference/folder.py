"""Folders that a command writes results into: one process group at a time, one command, resumed after a kill.

FOLDER/.lock          held while the command runs
FOLDER/command.json   written first: the settings that the results depend on; another command is an error
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vae3d.errors import UserError
from vae3d.io import UNFINISHED, FileError, naming, read_json, remove_unfinished, write_json

LOCK, COMMAND = ".lock", "command.json"


class FolderError(UserError):
    """A folder that another process writes into, or that holds something else."""

    on_every_rank = False


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Make the folder, hold its lock, and delete what a killed process left half-written.

    setting: how the user named the folder, such as save_dir=out. Raises FolderError if another process holds it,
    FileError if it cannot be made.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        raise FolderError(f"{setting}: another process is writing there; wait for it, or choose another name") from None
    with held:
        remove_unfinished(folder)
        yield


def has_results(folder: Path) -> bool:
    """Whether a folder holds more than what `locked` and `begin` put there and half-written files."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name not in (LOCK, COMMAND) and not UNFINISHED.fullmatch(name) for name in names)


def resumes(folder: Path, command: Mapping[str, Any], setting: str) -> bool:
    """Whether the folder was begun by the same command; False if no command began it.

    Raises FolderError, naming the settings that differ, if another one did.
    """
    file = folder / COMMAND
    if not file.is_file():
        return False
    there = read_json(file)
    if not isinstance(there, dict):
        raise FileError(f"{file}: is no record of a command; choose another folder, or set overwrite=true")
    if why := settings_difference(there, command):
        raise FolderError(
            f"{setting} holds the results of another command: {why}; choose another name, or set overwrite=true"
        )
    return True


def settings_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The settings that differ, with both values, for a message; None if all are equal."""

    def short(value: Any) -> Any:
        return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value  # a SHA-256

    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return ", ".join(f"{n} is {short(there.get(n))} there and {short(here.get(n))} here" for n in names) or None


def begin(folder: Path, command: Mapping[str, Any]) -> None:
    """Record the command, before the first result."""
    with naming(folder / COMMAND):
        write_json(folder / COMMAND, dict(command))

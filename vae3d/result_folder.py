"""Result folders: one command at a time writes into a folder, and resumes there after a kill.

FOLDER/.lock          held while the command runs
FOLDER/command.json   written first: the settings that the results depend on; another command is an error
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vae3d.errors import UserError
from vae3d.io import TMP_NAME, FileError, hold_lock, naming, read_json, remove_unfinished, write_json

LOCK, COMMAND = ".lock", "command.json"


class FolderError(UserError):
    """A folder is in use by another process, or holds other results."""

    on_every_rank = False


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Create the folder, hold its lock during the block, and delete the unfinished files of a killed process.

    setting: the user's name for the folder, such as save_dir=out. Raises FolderError if another process holds the lock,
    FileError if the folder cannot be created.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    in_use = FolderError(f"{setting}: another process is writing there; wait until it ends, or choose another name")
    with hold_lock(folder / LOCK, in_use):
        remove_unfinished(folder)
        yield


def has_results(folder: Path, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds anything but a lock, command.json, unfinished files, and the names in `besides`."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name not in (LOCK, COMMAND, *besides) and not TMP_NAME.fullmatch(name) for name in names)


def is_ours(folder: Path) -> bool:
    """Whether command.json says that a command wrote into a folder; else its files may be anyone's."""
    return (folder / COMMAND).is_file()


def resumes(folder: Path, command: Mapping[str, Any], setting: str) -> bool:
    """Whether the same command began in this folder; False if none did.

    Raises FolderError if another command did, naming the settings that differ.
    """
    if not is_ours(folder):
        return False
    file = folder / COMMAND
    recorded = read_json(file)
    if not isinstance(recorded, dict):
        raise FileError(f"{file}: is damaged; choose another folder, or set overwrite=true")
    if changes := settings_difference(recorded, command):
        raise FolderError(
            f"{setting} holds the results of another command: {changes}; choose another name, or set overwrite=true"
        )
    return True


def settings_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The settings that differ, with both values, for a message; None if all are equal."""

    def short(value: Any) -> Any:
        return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value  # a SHA-256

    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return ", ".join(f"{n} is {short(there.get(n))} there and {short(here.get(n))} here" for n in names) or None


def write_command(folder: Path, command: Mapping[str, Any]) -> None:
    """Write command.json, before the first result."""
    write_json(folder / COMMAND, dict(command))

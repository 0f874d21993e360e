"""Large tables, prepared once: read, checked and hashed into $VAE3D_CACHE/tables/KEY, then mapped into memory.

    KEY/table.arrow             every row of the source, with hashes; KEY: of the settings of the source, and path, size
                                and time of its files
    KEY/about.json              notes of the source, and other files that the rows lie in, with size and time
    KEY/missing.npy             rows whose file was not there, of sources that look for their files
    KEY/selection-SETTINGS/     rows to train on and rows held out, for settings that choose them
        train.arrow, val.arrow  columns row (in table.arrow), num_frames, height, width, fps, length (frames of the
                                longest clip) and by_length (rows in a stable order of their lengths)
        errors.arrow, skipped.arrow, fingerprint.npz, about.json

A run starts by opening these files, which takes no longer for more rows. The first process to need one makes it; others
wait. Folders that no run has opened for KEPT_DAYS days are deleted when another table is prepared, and those opened
longest ago if all together have more than KEPT_BYTES.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae3d.data.media import DataError
from vae3d.data.prepared.rows import FolderRows, Rows, is_folder, open_rows
from vae3d.data.sources.open_source import Source
from vae3d.data.storage.cache import alone, cache_folder
from vae3d.data.table.file_table import ArrowFile, FileTable
from vae3d.data.table.probe import Ranks
from vae3d.data.table.rows import Listing, exists, in_threads
from vae3d.data.table.versions import file_stamp
from vae3d.hashing import json_hash
from vae3d.io import TMP_NAME, atomic_dir, naming, write_json

LARGE = 100_000  # rows; every process reads a smaller table itself
KEPT = f"prepared tables of more than {LARGE:,} rows"
KEPT_DAYS = 30
KEPT_BYTES = 50 * 2**30  # on disk, of all tables, before another one is prepared
VERSION = 4


class Large(NamedTuple):
    """The rows of a large source, and the folder of its prepared table."""

    rows: Rows
    folder: Path


def find_large(source: Source, ranks: Ranks) -> tuple[Large | None, Listing | None]:
    """A source with more than LARGE rows, or that was prepared before, of those that can be prepared; else what was
    listed of it, if anything was.

    Folders are listed by the main process alone. All ranks must call it at the same time. Raises DataError.
    """
    if is_folder(source):
        rows = FolderRows(source)
        found: str | DataError | None = None
        if ranks.rank == 0:
            try:
                found = folder_of(rows).name if rows.count() > LARGE else None
            except DataError as error:
                found = error
        name = ranks.of_main(found)
        if name is None:
            return None, rows.listing if ranks.rank == 0 else None
        return Large(rows, _tables() / name), None
    rows = open_rows(source)
    if rows is None:
        return None, None
    folder = folder_of(rows)
    is_large = (folder / "table.arrow").is_file() or rows.count() > LARGE
    return Large(rows, folder) if is_large else None, None


def _tables() -> Path:
    return cache_folder() / "tables"


def folder_of(rows: Rows) -> Path:
    """Where their prepared table is."""
    return _tables() / json_hash([*rows.versions(), VERSION])


def prepare(large: Large) -> FileTable:
    """The rows of a source, mapped into memory; prepared now if they are not yet. Sets the notes of the source. Raises
    DataError as `table` of the source does, and FileError if the cache folder cannot be written."""
    rows, folder = large
    if not _is_current(folder):
        with alone(folder, KEPT):
            if not _is_current(folder):
                delete_unused(folder.parent)
                if folder_of(rows) != folder:  # asked again here, since each machine may have a cache of its own
                    raise DataError(f"{rows.name} does not hold the same on all machines, or it changes now")
                with naming(folder), atomic_dir(folder) as tmp:
                    write_json(tmp / "about.json", {"source": rows.name, **rows.write(tmp)})
    with suppress(OSError):  # of a folder that others wrote
        os.utime(folder)  # when it was last used
    if (notes := json.loads((folder / "about.json").read_text()).get("notes")) is not None:
        rows.source.notes = notes
    return FileTable(ArrowFile(folder / "table.arrow"))


def _is_current(folder: Path) -> bool:
    """Whether a prepared table is there, the files that its rows lie in are as they were, and those that were not there
    are still missing."""
    if not (folder / "table.arrow").is_file():
        return False
    about = json.loads((folder / "about.json").read_text())
    if any(file_stamp(file) != stamp for file, stamp in about.get("files", ())):
        return False
    if not (folder / "missing.npy").is_file():
        return True
    missing = FileTable(ArrowFile(folder / "table.arrow")).paths(np.load(folder / "missing.npy"))
    return not any(in_threads(exists, missing).values())


def delete_unused(folder: Path) -> None:
    """Delete prepared tables that no run has opened for KEPT_DAYS days, those opened longest ago if they have more than
    KEPT_BYTES together, and what killed processes left. Others may write tables and selections meanwhile."""
    total, tables = 0, []
    for table in folder.iterdir():
        with suppress(FileNotFoundError):
            if table.is_dir():
                tables.append((table.stat().st_mtime, table))
    for opened, table in sorted(tables, reverse=True):  # the last opened first
        days = (time.time() - opened) / 86400
        if TMP_NAME.fullmatch(table.name):  # another process may be writing it now
            unwanted = days > 1
        else:
            total += _size_of(table)
            unwanted = total > KEPT_BYTES or days > KEPT_DAYS
        if unwanted:
            shutil.rmtree(table, ignore_errors=True)  # but not its .lock, which another process may hold


def _size_of(folder: Path) -> int:
    """Bytes of the files that are there, as far as they stay."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(here, name)).st_size
    return total

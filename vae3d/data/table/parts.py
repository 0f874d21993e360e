"""Arrow files in parts: KIND-TIME-HASH.arrow in a folder, each written atomically. The entry of a later part counts."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from vae3d.data.storage.cache import warn_cache_unwritable
from vae3d.data.table.file_table import ArrowFile
from vae3d.hashing import file_hash
from vae3d.io import atomic_path

MAX_PARTS = 16  # with more, they are merged
MAPPED = 2**23  # bytes of a part that is mapped instead of read


class PartFolders:
    """Where parts lie: all are read, the first that can be written gets new ones. The last is in the cache folder.

    above: folder whose files are named by their path relative to it.
    """

    def __init__(self, folders: Sequence[Path], above: str = "") -> None:
        self.folders, self.above = list(folders), above and os.path.join(above, "")

    def key(self, path: str) -> bytes:
        """The name of a file in parts."""
        return os.fsencode(path.removeprefix(self.above) if self.above else path)

    def parts(self, kind: str) -> list[Path]:
        """Of all folders; of each the oldest first."""
        return [part for folder in self.folders for part in parts_of(folder, kind)]

    def merge(self, kind: str, merge: Callable[[list[Path]], None]) -> None:
        """merge(parts) of each folder that has more than MAX_PARTS and can be written. On a full disk they stay."""
        for folder in self.folders:
            parts = parts_of(folder, kind)
            if len(parts) > MAX_PARTS and os.access(folder, os.W_OK):
                with suppress(OSError):
                    merge(parts)

    def write(self, kind: str, schema: pa.Schema, tables: Sequence[pa.Table]) -> None:
        """Write a part into the first folder that can be written. Warns if that is not the first, or there is none."""
        for number, folder in enumerate(self.folders):
            try:
                write_part(folder, kind, schema, tables)
            except OSError as error:
                if number + 1 == len(self.folders):
                    consequence = "every run opens all files of its table that lack num_frames, height, width or fps"
                    warn_cache_unwritable(error, consequence)
                elif folder not in _warned:
                    _warned.add(folder)
                    warnings.warn(
                        f"{folder} cannot be written ({error.strerror}): what is found in the files of the table is "
                        f"kept in {self.folders[number + 1]} instead",
                        stacklevel=2,
                    )
            else:
                return


_warned: set[Path] = set()


def path_hash(key: bytes) -> int:
    """From 0 to 2**63 - 1, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def parts_of(folder: Path, kind: str) -> list[Path]:
    """The parts of a folder, oldest first."""
    return sorted(folder.glob(f"{kind}-*.arrow"))


def read_part(part: Path, schema: pa.Schema) -> pa.Table | None:
    """The entries of a part; None if it was deleted, is damaged (its name has the hash of its content), or is not what
    this version writes."""
    try:
        if not part.stem.endswith(f"-{_hash_in_name(part)}"):
            return None
        mapped = part.stat().st_size >= MAPPED
        table = ArrowFile(part).table if mapped else pa.ipc.open_file(part.read_bytes()).read_all()
        table.validate(full=True)  # wrong offsets would end the process
    except (OSError, pa.ArrowInvalid):
        return None
    complete = table.schema.equals(schema) and not any(column.null_count for column in table.columns)
    return table if complete else None


def _hash_in_name(file: Path) -> str:
    return file_hash(file, "blake2b")[:16]


def write_part(
    folder: Path, kind: str, schema: pa.Schema, tables: Iterable[pa.Table], written: str | None = None
) -> Path:
    """Write a part, atomically. written: the time in its name; None: now. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = written or f"{time.time_ns():020d}"
    tmp = folder / f"{written}-{os.getpid()}"
    with atomic_path(tmp) as file:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for table in tables:
                for batch in table.combine_chunks().to_batches():
                    writer.write_batch(batch)
        digest = _hash_in_name(file)
    part = folder / f"{kind}-{written}-{digest}.arrow"
    os.replace(tmp, part)
    return part


def replace_parts(parts: Sequence[Path], kind: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write one part in place of several of a folder, oldest first. Raises OSError."""
    # With the time of the last, so that a part that another rank writes now counts as newer.
    merged = write_part(parts[0].parent, kind, schema, tables, written=parts[-1].name.split("-")[1])
    for part in parts:
        if part != merged:
            part.unlink(missing_ok=True)  # another rank may have merged them as well

"""Indices of videos (see decoding/video_index.py) beside a table: what one machine has indexed, others read.

In TABLE.probe/index-TIME-HASH.arrow, a part per up to probe.PART videos that were probed, sorted by hash; many are
merged into one. Columns: path (relative to the table's folder if it is inside), hash (of the path), version (size and
time of the file, as JSON), index (a file of the index cache, compressed by zlib, with a checksum of its own).
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from vae3d.data.decoding import index_cache
from vae3d.data.table.file_table import NAMES, TEXT, ArrowFile, take
from vae3d.data.table.parts import PartFolders, path_hash, replace_parts

SCHEMA = pa.schema([("path", NAMES), ("hash", pa.int64()), ("version", TEXT), ("index", pa.large_binary())])
KIND = "index"
MAX_INDEX = 2**28  # bytes of an index, of about 30 hours
BATCH = 1000  # rows per piece of a merged part


class SharedIndices:
    """The indices beside a table. Nothing is read before the first search."""

    def __init__(self, folders: PartFolders) -> None:
        self.folders = folders
        self._tables: list[tuple[list[int], pa.Table]] | None = None  # the first hash of each piece, and the part

    def find(self, key: Sequence) -> bytes | None:
        """The content of a file of the index cache. key: path, size and time of the video; None: it is not here."""
        if self._tables is None:
            self._tables = [_opened(part) for part in self.folders.parts(KIND)]
        name = self.folders.key(str(key[0]))
        number, version = path_hash(name), json.dumps(list(key[1:]))
        for firsts, table in reversed(self._tables):
            # From the last piece that may begin before the hash on; equal hashes may lie in two pieces.
            for piece in range(max(0, bisect_left(firsts, number) - 1), table["hash"].num_chunks):
                if firsts[piece] > number:
                    break
                hashes = table["hash"].chunk(piece).to_numpy()
                for row in range(*np.searchsorted(hashes, [number, number + 1])):
                    entry = {column: table[column].chunk(piece)[row].as_py() for column in table.column_names}
                    if entry["path"] == name and entry["version"] == version:
                        with suppress(zlib.error):  # damaged: it is built again
                            inflate = zlib.decompressobj()
                            content = inflate.decompress(entry["index"], MAX_INDEX)
                            if inflate.eof:
                                return content
        return None

    def add(self, paths: Sequence[str]) -> None:
        """Write a part with those of some files that are in the index cache."""
        rows = []
        for path in paths:
            if (found := index_cache.cached(path)) is not None:
                key, content = found
                name = self.folders.key(str(key[0]))
                index = zlib.compress(content)
                rows.append({"path": name, "hash": path_hash(name), "version": json.dumps(key[1:]), "index": index})
        if rows:
            rows.sort(key=lambda row: row["hash"])
            self.folders.write(KIND, SCHEMA, [pa.Table.from_pylist(rows, SCHEMA)])

    def merge(self) -> None:
        """Make one part of many, in the folder that holds them."""
        self.folders.merge(KIND, _merge)
        self._tables = None


def _opened(part: Path) -> tuple[list[int], pa.Table]:
    """A part that vanished or is damaged has no rows. Its entries have checksums."""
    try:
        table = ArrowFile(part).table
        table.validate(full=True)  # wrong offsets would end the process
    except (OSError, ValueError, pa.ArrowInvalid):
        table = SCHEMA.empty_table()
    if not table.schema.equals(SCHEMA):
        table = SCHEMA.empty_table()
    return [piece[0].as_py() if len(piece) else -1 for piece in table["hash"].chunks], table


def _merge(parts: Sequence[Path]) -> None:
    """Replace parts by one, sorted by hash, with the last entry of each video, in bounded memory."""
    table = pa.concat_tables([_opened(part)[1] for part in parts])
    hashes = table["hash"].to_numpy()
    order = np.argsort(hashes, kind="stable")
    last = np.append(hashes[order][1:] != hashes[order][:-1], True) if len(order) else np.empty(0, bool)
    order = order[last]
    pieces = (order[first : first + BATCH] for first in range(0, len(order), BATCH))
    taken = (pa.table({name: take(table[name], rows) for name in table.column_names}, SCHEMA) for rows in pieces)
    replace_parts(parts, KIND, SCHEMA, taken)

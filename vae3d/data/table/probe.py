"""Probing files for frame count, size and rate: in parallel over threads and ranks, with the results kept in Arrow.

Results lie beside the table, in TABLE.probe/probed-TIME-HASH.arrow, or in the cache folder if that cannot be written or
the source is no file. Columns: path (relative to the table's folder if it is inside), num_frames, height, width, fps,
and how a changed file is noticed: size (bytes), modified (ns), images (of a sequence; -1: not one). A part is written,
atomically, when PART files are done, so a probe that is killed loses at most one part per process. The indices of the
key frames of videos lie there too (see shared_index.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from vae3d.data.decoding.index_cache import look_in
from vae3d.data.decoding.readers import media_info
from vae3d.data.media import MediaError, MediaInfo
from vae3d.data.storage.cache import cache_folder
from vae3d.data.storage.paths import is_stored, is_url
from vae3d.data.table.file_table import NAMES, take
from vae3d.data.table.parts import PartFolders, path_hash, read_part, replace_parts
from vae3d.data.table.rows import NUMBERS, THREADS, invalid_rows
from vae3d.data.table.segments import is_segment
from vae3d.data.table.shared_index import SharedIndices
from vae3d.data.table.versions import file_stamps
from vae3d.distributed import all_gather_object
from vae3d.progress import progress

STAMP = ("size", "modified", "images")
SCHEMA = pa.schema([
    ("path", NAMES), ("hash", pa.int64()), *((name, pa.float64()) for name in NUMBERS),
    *((name, pa.int64()) for name in STAMP),
])  # fmt: skip
KIND = "probed"  # another name since sizes are those with square pixels: results of stored sizes are not read
PART = 2000  # files per part
Metadata = dict[str, float | str]  # the columns of NUMBERS, or the key `error` alone


def fill_metadata(
    table: pd.DataFrame,
    needed: Sequence[str] = NUMBERS,
    results: ProbeResults | None = None,
    trusted: bool = False,
    ranks: Ranks | None = None,
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table with the columns `needed` filled in, and (path, reason) of invalid rows and files that do not open.

    Invalid rows and rows whose files do not open are removed. Only files of rows that lack a number are opened, and of
    rows that are a part of their file, for the times of their frames. results, trusted, ranks: see probe.
    """
    errors = invalid_rows(table)
    table = table[table["error"].isna()].reset_index(drop=True)
    unknown = (table[list(needed)].isna().any(axis=1) | is_segment(table)).to_numpy()
    if not unknown.any():
        return table, errors
    paths = table["path"][unknown]
    metadata = probe(paths.tolist(), results, trusted, ranks)
    read = pd.DataFrame.from_dict(metadata, orient="index", columns=NUMBERS, dtype=float)
    for name in NUMBERS:
        table[name] = table[name].fillna(paths.map(read[name]))
    unread = paths.map({path: str(m["error"]) for path, m in metadata.items() if "error" in m}).dropna()
    errors += zip(paths[unread.index], unread, strict=True)  # a file may have many rows
    return table.drop(unread.index).reset_index(drop=True), errors


class Ranks:
    """How the ranks of a run share the files to probe. All must probe at the same time.

    exchange: gives every rank the values of all.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, exchange: Callable[[Any], list[Any]] = all_gather_object
    ) -> None:
        self.rank, self.world_size, self._exchange = rank, world_size, exchange

    def has(self, path: str) -> bool:
        """Whether this rank probes a file."""
        return path_hash(os.fsencode(path)) % self.world_size == self.rank

    def all(self, value: bool) -> bool:
        """Whether it is true on all ranks."""
        return value if self.world_size == 1 else all(self._exchange(value))

    def of_main(self, value: Any) -> Any:
        """The value of the main process, on all ranks. If that is an exception, it is raised."""
        value = value if self.world_size == 1 else self._exchange(value)[0]
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self) -> None:
        """Return when all ranks have called it."""
        self.all(True)


def probe(
    paths: Sequence[str],
    results: ProbeResults | None = None,
    trusted: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Metadata]:
    """Metadata of every file, from `results` (None: of the cache folder) if the file has not changed since.

    trusted: do not look whether files changed. ranks: probe this rank's share, then read that of the others.
    """
    results = results or results_for_paths(paths)
    paths = list(dict.fromkeys(paths))
    stamps = {} if trusted else file_stamps(paths)
    known = results.find(paths, stamps)
    todo = [path for path in paths if path not in known]
    if ranks is not None and ranks.world_size > 1:
        read_files([path for path in todo if ranks.has(path)], results, hidden=ranks.rank > 0)
        ranks.wait()
        results.merge()
        known |= results.find(todo, stamps)
        todo = [path for path in todo if path not in known]
    read = read_files(todo, results)
    if todo:
        results.merge()
    return known | read


def read_files(paths: Sequence[str], results: ProbeResults, hidden: bool = False) -> dict[str, Metadata]:
    """Metadata of files, read now in threads and added to the results. hidden: without a bar of the progress."""
    found: dict[str, Metadata] = {}
    bar = progress(total=len(paths), desc="probing files", unit="file", hidden=hidden or not paths)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(paths), PART):
            part = paths[first : first + PART]
            stamps = file_stamps(part)  # before reading: a file that changes meanwhile is read again
            for path, metadata in zip(part, pool.map(lambda path: read_metadata(path), part), strict=True):
                found[path] = metadata
                bar.update()
            # Errors are not kept: a disk may come back, a file may still be being copied.
            results.add({path: found[path] for path in part if "error" not in found[path]}, stamps)
    return found


def read_metadata(path: str) -> Metadata:
    """Metadata of one file; of an image from its header."""
    try:
        return numbers_of(media_info(path))
    except MediaError as error:
        return {"error": error.reason_for(path)}


def numbers_of(info: MediaInfo) -> dict[str, float]:
    """The columns of NUMBERS. The size is that with square pixels, from which clips are scaled."""
    height, width = info.square_size
    return {"num_frames": info.num_frames, "height": height, "width": width, "fps": info.fps}


def results_for_table(file: str | Path) -> ProbeResults:
    """The results beside a table or list, or of its own in the cache folder, as of one in a store."""
    if is_stored(file):
        return ProbeResults(PartFolders([_cached(file)]))
    file = Path(os.path.abspath(file))
    beside = file.with_name(f"{file.name}.probe")
    folders = PartFolders([beside, _cached(file)], str(file.parent))
    indices = SharedIndices(folders)
    look_in[beside] = indices.find
    return ProbeResults(folders, indices)


def results_for_paths(paths: Sequence[str]) -> ProbeResults:
    """The results in the cache folder for files of one folder."""
    common = os.path.commonprefix if any(map(is_url, paths)) else os.path.commonpath
    return ProbeResults(PartFolders([_cached(common(paths) if paths else "")]))


def _cached(source: str | Path) -> Path:
    """The folder in the cache folder for results of a source."""
    return cache_folder() / "probe" / hashlib.blake2b(os.fsencode(source), digest_size=8).hexdigest()


class ProbeResults:
    """What was probed before. indices: of the key frames of a table's videos."""

    def __init__(self, folders: PartFolders, indices: SharedIndices | None = None) -> None:
        self.folders, self.indices = folders, indices
        self.load()

    def load(self) -> None:
        """Read the parts that are there. Damaged ones are ignored."""
        tables = [table for part in self.folders.parts(KIND) if (table := read_part(part, SCHEMA))]
        self.table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        hashes = self.table["hash"].to_numpy()
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, paths: Sequence[str], stamps: dict[str, list[int] | None]) -> dict[str, Metadata]:
        """Metadata of the paths that are known, with the stamp if one is given for the path; else the last."""
        lasts, known = self._last(paths)
        found: dict[str, Metadata] = {}
        places = np.flatnonzero(known)
        while len(places):  # from the last entry of a path to the first
            rows = self._order[lasts[places]]
            entries = pa.table({name: take(self.table[name], rows) for name in self.table.column_names}).to_pylist()
            for place, entry in zip(places, entries, strict=True):
                path = paths[place]
                if path not in found and entry["path"] == self.folders.key(path) and _has_stamp(entry, path, stamps):
                    found[path] = {name: entry[name] for name in NUMBERS}
            places = np.array([place for place in places if paths[place] not in found and lasts[place]], dtype=np.int64)
            lasts[places] -= 1
            places = places[self._hashes[lasts[places]] == self._hashes[lasts[places] + 1]]
        return found

    def knows(self, paths: Sequence[str]) -> np.ndarray:
        """[paths] whether a path has an entry, whatever its stamp."""
        return self._last(paths)[1]

    def stamps(self, paths: Sequence[str]) -> np.ndarray:
        """[paths, 2] size and time of modification, when the file was probed last; -1: it was not."""
        stamps = np.full((len(paths), 2), -1, np.int64)
        lasts, known = self._last(paths)
        for column, name in enumerate(STAMP[:2]):
            stamps[known, column] = take(self.table[name], self._order[lasts[known]]).to_numpy()
        return stamps

    def _last(self, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """[paths] place in `_hashes` of the last entry with the hash of each path, and whether there is one."""
        hashes = np.array([path_hash(self.folders.key(path)) for path in paths], dtype=np.int64)
        lasts = np.searchsorted(self._hashes, hashes, "right") - 1
        known = lasts >= 0
        known[known] = self._hashes[lasts[known]] == hashes[known]
        return lasts, known

    def add(self, metadata: dict[str, Metadata], stamps: dict[str, list[int] | None]) -> None:
        """Write a part. Files without a stamp, which vanished meanwhile, are left out."""
        rows = []
        for path, entry in metadata.items():
            if (stamp := stamps[path]) is not None:
                key = self.folders.key(path)
                seen = dict(zip(STAMP, [*stamp, -1][:3], strict=True))
                rows.append({"path": key, "hash": path_hash(key), **{n: float(entry[n]) for n in NUMBERS}, **seen})
        if rows:
            self.folders.write(KIND, SCHEMA, [pa.Table.from_pylist(rows, SCHEMA)])
            if self.indices is not None:
                self.indices.add(list(metadata))

    def merge(self) -> None:
        """Make one part of many, in the folder that holds them."""
        self.folders.merge(KIND, _merge)
        if self.indices is not None:
            self.indices.merge()
        self.load()


def _has_stamp(entry: dict, path: str, stamps: dict[str, list[int] | None]) -> bool:
    if path not in stamps:
        return True
    stamp = stamps[path]
    return stamp is not None and [entry[name] for name in STAMP] == [*stamp, -1][:3]


def _merge(parts: Sequence[Path]) -> None:
    """Replace parts by one, with the last entry of each file, in bounded memory."""
    tables = [(part, table) for part in parts if (table := read_part(part, SCHEMA)) is not None]
    if not tables:
        return
    hashes = np.concatenate([table["hash"].to_numpy() for _, table in tables])
    _, last = np.unique(hashes[::-1], return_index=True)
    kept = np.zeros(len(hashes), dtype=bool)
    kept[len(hashes) - 1 - last] = True
    starts = np.cumsum([0, *(len(table) for _, table in tables)])

    def rows() -> Iterator[pa.Table]:
        held: list[pa.Table] = []
        for (_, table), start in zip(tables, starts[:-1], strict=True):
            held.append(table.filter(pa.array(kept[start : start + len(table)])))
            if sum(map(len, held)) >= 100_000:
                yield pa.concat_tables(held)
                held = []
        if held:
            yield pa.concat_tables(held)

    replace_parts([part for part, _ in tables], KIND, SCHEMA, rows())

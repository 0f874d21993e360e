"""Filling in what a table does not tell of its files, in parallel, once: the answers are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from vae3d.data.dataset_rows import is_row, version_of
from vae3d.data.images import is_sequence, sequence_files
from vae3d.data.readers import MediaError, media_info
from vae3d.data.segments import has_segment
from vae3d.data.sources import NUMBERS
from vae3d.data.video_index import cache_folder
from vae3d.io import naming

THREADS = 16
VERSION = 2  # of the answers; 1 counted frames and rates by timestamps
Facts = dict[str, float | str]  # the columns of NUMBERS, or the one key `error`


def complete(table: pd.DataFrame, needed: Sequence[str] = NUMBERS) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table without NaN in the columns `needed`, and (path, reason) of rows that are faulty or do not open.

    Only rows that lack one of these numbers are opened, and those with a segment, for the times of their frames; rows
    that do not open are left out of the table.
    """
    sound = table["fault"].isna()
    faults = faulty_rows(table)
    table = table[sound].reset_index(drop=True)
    unknown = table[list(needed)].isna().any(axis=1)
    unknown = (unknown | has_segment(table)).to_numpy()
    if not unknown.any():
        return table, faults
    facts = probe(table.loc[unknown, "path"].tolist())
    unread = {path: str(f["error"]) for path, f in facts.items() if "error" in f}
    for name in NUMBERS:
        found = np.array([facts[path].get(name, np.nan) for path in table.loc[unknown, "path"]], dtype=float)
        table.loc[unknown, name] = table.loc[unknown, name].fillna(pd.Series(found, index=table.index[unknown]))
    faults += [(path, unread[path]) for path in table["path"] if path in unread]  # a file may have many rows
    return table[~table["path"].isin(unread)].reset_index(drop=True), faults


def faulty_rows(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(row and path, reason) of the rows that their source found faulty."""
    faulty = table.loc[table["fault"].notna(), ["row", "path", "fault"]]
    return [(f"row {row} ({path})", fault) for row, path, fault in faulty.values]


def probe(paths: list[str]) -> dict[str, Facts]:
    """Facts of every file, from the cache where the file has not changed since.

    Raises FileError if the cache cannot be written.
    """
    cache = _cache_file(paths)
    known = _read_cache(cache)
    keys = {path: _key(path) for path in dict.fromkeys(paths)}
    todo = [path for path, key in keys.items() if key is None or known.get(path, {}).get("key") != key]
    if todo:
        with naming(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("a") as stream, ThreadPoolExecutor(THREADS) as pool:
                results = zip(todo, pool.map(look, todo), strict=True)
                for path, facts in tqdm(results, total=len(todo), desc="probing files", unit="file", disable=None):
                    known[path] = {"path": path, "key": keys[path], **facts}
                    if "error" not in facts:  # which may pass: a disk that was away, a file still being copied
                        stream.write(json.dumps(known[path]) + "\n")
    return {path: {k: v for k, v in known[path].items() if k not in ("path", "key")} for path in keys}


def look(path: str) -> Facts:
    """Facts of one file; of an image, from its header."""
    try:
        info = media_info(path)
    except MediaError as error:
        return {"error": error.reason_for(path)}
    return {"num_frames": info.num_frames, "height": info.height, "width": info.width, "fps": info.fps}


def _key(path: str) -> list[int] | None:
    """What changes when the file does, or, of a sequence, its number of files or the first of them, or the dataset of
    a row; None if there is no file."""
    if is_row(path):
        return version_of(path)
    try:
        files = sequence_files(path)
        stat = os.stat(files[0])
    except (OSError, MediaError):
        return None
    return [stat.st_size, stat.st_mtime_ns, *([len(files)] if is_sequence(path) else [])]


def _read_cache(cache: Path) -> dict[str, dict]:
    if not cache.is_file():
        return {}
    known = {}
    for line in cache.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a probe that was killed
            continue
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            known[entry["path"]] = entry
    return known


def _cache_file(paths: list[str]) -> Path:
    name = hashlib.blake2b(os.path.commonpath(paths).encode(), digest_size=8).hexdigest()
    return cache_folder() / "probe" / f"{name}-{VERSION}.jsonl"

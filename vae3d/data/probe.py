"""Filling in what a table does not tell of its files, in parallel, once: the answers are kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from vae3d.data.dataset_rows import is_row, version_of
from vae3d.data.images import is_sequence, sequence_files
from vae3d.data.readers import MediaError, media_info
from vae3d.data.segments import is_segment
from vae3d.data.sources import NUMBERS
from vae3d.data.video_index import cache_folder, warn_of_cache

THREADS = 16
ENTRY = {"path": str, **dict.fromkeys(NUMBERS, (int, float))}  # of the cache
VERSION = 3  # of the answers; 1 counted frames and rates by timestamps, 2 had no checksums
BATCH = 100  # answers that are written at once
Facts = dict[str, float | str]  # the columns of NUMBERS, or the one key `error`


def fill_metadata(table: pd.DataFrame, needed: Sequence[str] = NUMBERS) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table without NaN in the columns `needed`, and (path, reason) of rows that are faulty or do not open.

    Only rows that lack one of these numbers are opened, and those with a segment, for the times of their frames; rows
    that do not open are left out of the table.
    """
    sound = table["error"].isna()
    errors = invalid_rows(table)
    table = table[sound].reset_index(drop=True)
    unknown = table[list(needed)].isna().any(axis=1)
    unknown = (unknown | is_segment(table)).to_numpy()
    if not unknown.any():
        return table, errors
    facts = probe(table.loc[unknown, "path"].tolist())
    unread = {path: str(f["error"]) for path, f in facts.items() if "error" in f}
    for name in NUMBERS:
        found = np.array([facts[path].get(name, np.nan) for path in table.loc[unknown, "path"]], dtype=float)
        table.loc[unknown, name] = table.loc[unknown, name].fillna(pd.Series(found, index=table.index[unknown]))
    errors += [(path, unread[path]) for path in table["path"] if path in unread]  # a file may have many rows
    return table[~table["path"].isin(unread)].reset_index(drop=True), errors


def invalid_rows(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(row and path, reason) of the rows that their source found faulty."""
    faulty = table.loc[table["error"].notna(), ["row", "path", "error"]]
    return [(f"row {row} ({path})", error) for row, path, error in faulty.values]


def probe(paths: list[str]) -> dict[str, Facts]:
    """Facts of every file, from the cache where the file has not changed since.

    Raises FileError if the cache cannot be written.
    """
    cache = _cache_file(paths)
    known = _read_cache(cache)
    keys = {path: _key(path) for path in dict.fromkeys(paths)}
    todo = [path for path, key in keys.items() if key is None or known.get(path, {}).get("key") != key]
    with ThreadPoolExecutor(THREADS) as pool:
        looked = pool.map(read_metadata, todo)
        results = tqdm(looked, total=len(todo), desc="probing files", unit="file", disable=None if todo else True)
        pairs = zip(todo, results, strict=True)
        while batch := list(itertools.islice(pairs, BATCH)):
            entries = [{"path": path, "key": keys[path], **facts} for path, facts in batch]
            known |= {entry["path"]: entry for entry in entries}
            # Errors may pass: a disk that was away, a file still being copied.
            _write_cache(cache, [entry for entry in entries if "error" not in entry])
    return {path: {k: v for k, v in known[path].items() if k not in ("path", "key")} for path in keys}


def read_metadata(path: str) -> Facts:
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
    """What was found of each file; lines that were cut off, damaged or not written by a probe are passed over."""
    try:
        lines = cache.read_bytes().splitlines()
    except OSError:
        return {}
    known = {}
    for line in lines:
        check, _, text = line.partition(b" ")
        if check != _checksum(text):
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in ENTRY.items()):
            known[entry["path"]] = entry
    return known


def _write_cache(cache: Path, entries: Sequence[dict]) -> None:
    if not entries:
        return
    texts = [json.dumps(entry).encode() for entry in entries]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("ab") as stream:  # begins with a new line, because the last one may be cut off
            stream.write(b"".join(b"\n%s %s" % (_checksum(text), text) for text in texts) + b"\n")
    except OSError as error:
        warn_of_cache(
            error, "every start of a run opens all files of its table that lack num_frames, height, width, fps"
        )


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _cache_file(paths: list[str]) -> Path:
    name = hashlib.blake2b(os.path.commonpath(paths).encode(), digest_size=8).hexdigest()
    return cache_folder() / "probe" / f"{name}-{VERSION}.jsonl"

"""Probing files for frame count, size and rate, in parallel, with a cache on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd

from vae3d.data.media import MediaError
from vae3d.data.readers import media_info
from vae3d.data.rows import NUMBERS, THREADS, in_threads, invalid_rows
from vae3d.data.segments import is_segment
from vae3d.data.storage import is_url
from vae3d.data.versions import file_stamp
from vae3d.data.video_index import cache_folder, warn_cache_unwritable
from vae3d.progress import progress

ENTRY = {"path": str, **dict.fromkeys(NUMBERS, (int, float))}  # keys of a cache entry, and their types
VERSION = 3  # of the cache; 1 counted frames and rates by timestamps, 2 had no checksums
BATCH = 100  # entries per write
Metadata = dict[str, float | str]  # the columns of NUMBERS, or the key `error` alone


def fill_metadata(table: pd.DataFrame, needed: Sequence[str] = NUMBERS) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table with the columns `needed` filled in, and (path, reason) of invalid rows and files that do not open.

    Invalid rows and rows whose files do not open are removed. Only files of rows that lack a number are opened, and of
    rows that are a part of their file, for the times of their frames.
    """
    errors = invalid_rows(table)
    table = table[table["error"].isna()].reset_index(drop=True)
    unknown = (table[list(needed)].isna().any(axis=1) | is_segment(table)).to_numpy()
    if not unknown.any():
        return table, errors
    metadata = probe(table.loc[unknown, "path"].tolist())
    read = pd.DataFrame.from_dict(metadata, orient="index", columns=NUMBERS, dtype=float)
    for name in NUMBERS:
        table[name] = table[name].fillna(table["path"].map(read[name]))
    unread = {path: str(m["error"]) for path, m in metadata.items() if "error" in m}
    errors += [(path, unread[path]) for path in table["path"] if path in unread]  # a file may have many rows
    return table[~table["path"].isin(unread)].reset_index(drop=True), errors


def probe(paths: list[str]) -> dict[str, Metadata]:
    """Metadata of every file, from the cache if the file has not changed since."""
    common = os.path.commonprefix if any(map(is_url, paths)) else os.path.commonpath
    name = hashlib.blake2b(common(paths).encode(), digest_size=8).hexdigest()
    cache = cache_folder() / "probe" / f"{name}-{VERSION}.jsonl"
    known = _read_cache(cache)
    stamps = in_threads(file_stamp, paths)
    todo = [path for path, stamp in stamps.items() if stamp is None or known.get(path, {}).get("key") != stamp]
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(read_metadata, todo)
        results = progress(read, total=len(todo), desc="probing files", unit="file", hidden=not todo)
        pairs = zip(todo, results, strict=True)
        while batch := list(itertools.islice(pairs, BATCH)):
            entries = [{"path": path, "key": stamps[path], **metadata} for path, metadata in batch]
            known |= {entry["path"]: entry for entry in entries}
            # Errors are not cached: a disk may come back, a file may still be being copied.
            _write_cache(cache, [entry for entry in entries if "error" not in entry])
    return {path: {k: v for k, v in known[path].items() if k not in ("path", "key")} for path in stamps}


def read_metadata(path: str) -> Metadata:
    """Metadata of one file; of an image from its header."""
    try:
        info = media_info(path)
    except MediaError as error:
        return {"error": error.reason_for(path)}
    return {"num_frames": info.num_frames, "height": info.height, "width": info.width, "fps": info.fps}


def _read_cache(cache: Path) -> dict[str, dict]:
    """Path -> entry. Lines that are cut off, damaged, or of another kind are ignored."""
    try:
        lines = cache.read_bytes().splitlines()
    except OSError:
        return {}
    known = {}
    for line in lines:
        checksum, _, text = line.partition(b" ")
        if checksum == _checksum(text):
            with suppress(ValueError, RecursionError):  # ValueError: no JSON
                entry = json.loads(text)
                if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in ENTRY.items()):
                    known[entry["path"]] = entry
    return known


def _write_cache(cache: Path, entries: Sequence[dict]) -> None:
    texts = [json.dumps(entry).encode() for entry in entries]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("ab") as stream:  # starts with a newline: the last line may be cut off
            stream.write(b"".join(b"\n%s %s" % (_checksum(text), text) for text in texts) + b"\n")
    except OSError as error:
        consequence = "every run opens all files of its table that lack num_frames, height, width or fps"
        warn_cache_unwritable(error, consequence)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)

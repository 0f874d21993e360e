"""Clips listed in a JSON file: whole videos, or parts of videos."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vae3d.data.media import DataError
from vae3d.data.rows import SPLITS, file_hashes, mark_missing_files, normalise_rows
from vae3d.data.segments import SEGMENT, SEGMENT_ERROR
from vae3d.data.storage import folder_of, is_stored
from vae3d.data.tables import read_entries
from vae3d.text import plural

TEXT, NUMBER = (str, "a text"), ((int, float), "a number")
KINDS = {
    "path": TEXT,
    "start": NUMBER,
    "end": NUMBER,
    "frames": NUMBER,
    "fps": NUMBER,
    "split": TEXT,
    "text": TEXT,
    "label": ((str, int), "a text or a whole number"),
}
COUNTS = ("total", "count", "num", "length")  # keys beside `list` that give its length
HASHES = 2**63  # file_hashes are below


class JsonClips:
    """A JSON list of clips, an object {"list": [...]}, or JSON Lines (.jsonl), also gzipped (.gz).

    Each clip is an object with the key `path` and optional

        start, end: seconds, of the part of the file; without them, the whole file.
        frames, fps: of the whole file, so that it need not be opened.
        split: train, val or test; all clips have it, or none. text: a caption. label: a class, as text or a number.

    null means the same as no key. Other keys are ignored and listed in `notes`.
    root: what relative paths are relative to; None: the JSON file's folder.
    val_share: if no clip has a split, this share of the videos (at least one) is held out with all their clips. The
    hash of the path decides, so a video stays in its split when the list grows. None: data.num_val_files applies.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, val_share: float | None = 0.02) -> None:
        if val_share is not None and not 0 < val_share < 1:
            raise DataError(f"data.source.val_share is {val_share:g}; use a share above 0 and below 1, or null")
        self.path, self.val_share = path if is_stored(path) else Path(path), val_share
        self.root = root if root is not None else folder_of(path)
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if the file is no such list. Invalid clips get an `error`."""
        entries, self.notes = _entries(self.path)
        clips, errors = zip(*map(_checked, entries), strict=True)
        keys = [key for key in KINDS if key == "path" or any(key in clip for clip in clips)]
        raw = pd.DataFrame({key: [clip.get(key) for clip in clips] for key in keys}).assign(error=errors)
        table = normalise_rows(raw.rename(columns={"frames": "num_frames"}), self.root)
        mark_missing_files(table)
        rule = "by their `split`"
        if "split" not in keys and self.val_share is not None:
            table["split"] = self._split(table)
            rule = f"by the hash of the path, val_share={self.val_share:g}"
        ignored = [f"{key} ({count})" for key, count in _keys(entries).items() if key not in KINDS]
        if ignored:
            self.notes.append(f"ignored keys of clips: {', '.join(ignored)}")
        self.notes += _counts(table, str(self.path), rule)
        return table

    def _split(self, table: pd.DataFrame) -> np.ndarray:
        hashes = file_hashes(table)
        usable = np.unique(hashes[table["error"].isna()])
        if len(usable) < 2:
            return np.full(len(table), "train")
        return np.where(hashes <= max(usable[0], int(self.val_share * HASHES)), "val", "train")


def _counts(table: pd.DataFrame, where: str, rule: str) -> list[str]:
    """Lines with the number of clips and videos, in all and per split."""
    usable = table[table["error"].isna()]
    parts = [(split, usable[usable["split"] == split]) for split in SPLITS]
    counts = [f"{split} {_clips_of(part)}" for split, part in parts if len(part)]
    return [f"{where} lists {_clips_of(usable)}", *([f"{', '.join(counts)}, {rule}"] if counts else [])]


def _clips_of(table: pd.DataFrame) -> str:
    return f"{plural(len(table), 'clip')} of {plural(table['path'].nunique(), 'video')}"


def _entries(path: str | Path) -> tuple[list[Any], list[str]]:
    """The list in a file, and warnings about it. Raises DataError."""
    content = read_entries(path)
    entries = content.get("list") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else f"{content!r:.40}"
        raise DataError(f'{path} must be a list of clips, or an object {{"list": [...]}}; it is {found}')
    if not entries:
        raise DataError(f"{path} lists no clips")
    keys = _keys(entries)
    if "path" not in keys:
        found = f"their keys are {', '.join(keys)}" if keys else f"they must be {{'path': ...}}, not {entries[0]!r:.40}"
        hint = "; call their `full_path` `path`" if "full_path" in keys else ""
        raise DataError(f"{path}: no clip has the key `path`; {found}{hint}")
    claims = {key: content[key] for key in COUNTS if key in content} if isinstance(content, dict) else {}
    return entries, [
        f"`{key}` of {path} is {claim}, but its list has {plural(len(entries), 'clip')}"
        for key, claim in claims.items()
        if claim != len(entries)
    ]


def _keys(entries: list[Any]) -> Counter[str]:
    return Counter(key for entry in entries if isinstance(entry, dict) for key in entry)


def _checked(entry: Any) -> tuple[dict[str, Any], str | None]:
    """The known keys of an entry whose values have the right type, and what is wrong with the others, if anything."""
    if not isinstance(entry, dict):
        return {}, f"is {json.dumps(entry):.40}, no object with the key `path`"
    valid = {key: value for key, value in entry.items() if key in KINDS and _is_valid(value, KINDS[key][0])}
    if entry.get("path") is None:
        return valid, "has no `path`" + ("; call its `full_path` so" if "full_path" in entry else "")
    for key, (_, expected) in KINDS.items():
        if key not in valid and entry.get(key) is not None:
            value = json.dumps(entry[key])
            return valid, SEGMENT_ERROR if key in SEGMENT else f"`{key}` is {value:.40}, which is not {expected}"
    return valid, None


def _is_valid(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """JSON can hold lone surrogates, which no encoding has; NaN, which Python reads; and integers beyond 64 bits."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return abs(value) < 2**63 if isinstance(value, int) else value == value

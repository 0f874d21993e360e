"""Clips listed in a JSON file: whole videos, or parts of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vae3d.data.segments import SEGMENT, SEGMENT_ERROR
from vae3d.data.sources import SPLITS, DataError, exists, file_hashes, normalise_rows
from vae3d.data.tables import read_entries

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
OPTIONAL = [key for key in KINDS if key != "path"]
COLUMNS = {"frames": "num_frames"}  # of a table, where they are not called as the keys
COUNTS = ("total", "count", "num", "length")  # keys beside `list` that tell its length
HASHES = 2**63


class JsonClips:
    """A JSON list of clips, an object {"list": [...]}, or JSON Lines (.jsonl), also gzipped (.gz).

    Each clip is an object with the key `path` and optional

        start, end: seconds of the file that the clip begins and ends at; without them, the file's own.
        frames, fps: of the whole file, as annotated, so that it need not be opened to know them.
        split: train, val or test; all clips have it, or none. text: a caption. label: a class, as text or a number.

    null is as good as leaving a key out; other keys are not read, and told in `notes`. Relative paths are relative to
    `root`, by default the JSON file's folder.
    val_share: where no clip has a split, the videos whose names hash into this share of all hashes are held out with
    all their clips, at least one video; so a video stays on its side when the list grows. None:
    data.num_val_files applies.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, val_share: float | None = 0.02) -> None:
        if val_share is not None and not 0 < val_share < 1:
            raise DataError(f"data.source.val_share is {val_share:g}; use a share above 0 and below 1, or null")
        self.path, self.val_share = Path(path), val_share
        self.root = Path(root) if root is not None else self.path.parent
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError for a file that is no such list; what is wrong with single clips is their `error`."""
        entries, self.notes = _entries(self.path)
        errors = [_error(entry) for entry in entries]
        sound = [_well_typed(entry) for entry in entries]
        given = ["path", *(key for key in OPTIONAL if any(key in entry for entry in sound))]
        raw = pd.DataFrame({COLUMNS.get(key, key): [entry.get(key) for entry in sound] for key in given})
        table = normalise_rows(raw.assign(error=errors), self.root)
        gone = table["error"].isna() & ~table["path"].map(exists)
        table.loc[gone, "error"] = "no such file"
        how = "as their `split` says"
        if "split" not in given and self.val_share is not None:
            table["split"] = self._split(table)
            how = f"by the hash of the path, val_share={self.val_share:g}"
        self.notes += [*_unread(entries), *_counts(table, str(self.path), how)]
        return table

    def _split(self, table: pd.DataFrame) -> np.ndarray:
        hashes = file_hashes(table)
        usable = np.unique(hashes[table["error"].isna()])
        if len(usable) < 2:
            return np.full(len(table), "train")
        return np.where(hashes <= max(usable[0], int(self.val_share * HASHES)), "val", "train")


def _counts(table: pd.DataFrame, where: str, how: str) -> list[str]:
    """How many clips and videos there are, and on which side."""
    usable = table[table["error"].isna()]
    sides = [(split, usable[usable["split"] == split]) for split in SPLITS]
    told = [f"{split} {_clips_of(side)}" for split, side in sides if len(side)]
    return [f"{where} lists {_clips_of(usable)}", *([f"{', '.join(told)}, {how}"] if told else [])]


def _clips_of(table: pd.DataFrame) -> str:
    return f"{len(table)} clips of {table['path'].nunique()} videos"


def _entries(path: Path) -> tuple[list[Any], list[str]]:
    """The list in a file, and what is odd about it. Raises DataError."""
    content = read_entries(path)
    entries = content.get("list") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else f"{content!r:.40}"
        raise DataError(f'{path} must be a list of clips, or an object {{"list": [...]}}; it is {found}')
    if not entries:
        raise DataError(f"{path} lists no clips")
    if not any(isinstance(entry, dict) and "path" in entry for entry in entries):
        hint = "; call their `full_path` `path`" if "full_path" in _keys(entries) else ""
        found = (
            f"their keys are {', '.join(_keys(entries))}"
            if _keys(entries)
            else f"they must be {{'path': ...}}, not {entries[0]!r:.40}"
        )
        raise DataError(f"{path}: no clip has the key `path`; {found}{hint}")
    claims = {key: content[key] for key in COUNTS if key in content} if isinstance(content, dict) else {}
    return entries, [
        f"`{key}` of {path} is {claim}, but its list has {len(entries)} clips"
        for key, claim in claims.items()
        if claim != len(entries)
    ]


def _keys(entries: list[Any]) -> Counter[str]:
    return Counter(key for entry in entries if isinstance(entry, dict) for key in entry)


def _error(entry: Any) -> str | None:
    """What is wrong with the types of an entry."""
    if not isinstance(entry, dict):
        return f"is {json.dumps(entry):.40}, no object with the key `path`"
    if entry.get("path") is None:
        return "has no `path`" + ("; call its `full_path` so" if "full_path" in entry else "")
    sound = _well_typed(entry)
    for key, (_, wanted) in KINDS.items():
        if key not in sound and entry.get(key) is not None:
            value = json.dumps(entry[key])
            return SEGMENT_ERROR if key in SEGMENT else f"`{key}` is {value:.40}, which is not {wanted}"
    return None


def _well_typed(entry: Any) -> dict[str, Any]:
    """What can be used of an entry; NaN, which JSON does not have but Python reads, is not."""
    if not isinstance(entry, dict):
        return {}
    found = {key: value for key, value in entry.items() if key in KINDS and isinstance(value, KINDS[key][0])}
    return {
        key: value for key, value in found.items() if not isinstance(value, bool) and value == value and _whole(value)
    }


def _whole(value: Any) -> bool:
    """Whether a text has no lone surrogate, which JSON can spell and no encoding has, and an integer has 64 bits."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, int) or abs(value) < 2**63


def _unread(entries: list[Any]) -> list[str]:
    unread = [f"{key} ({count})" for key, count in _keys(entries).items() if key not in KINDS]
    return [f"keys of clips that are not read: {', '.join(unread)}"] if unread else []

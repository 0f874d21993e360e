"""Clips listed in a JSON file: whole videos, or parts of videos."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vae3d.arguments import check_arguments
from vae3d.data.media import DataError
from vae3d.data.sources.table_files import JsonLines, kind_of, of_copy, read_entries
from vae3d.data.storage.paths import folder_of, is_stored
from vae3d.data.table.rows import SPLITS, file_hashes, mark_missing_files, normalise_rows
from vae3d.data.table.segments import SEGMENT, SEGMENT_ERROR
from vae3d.text import is_utf8, plural

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

    @check_arguments
    def __init__(self, path: str | Path, root: str | Path | None = None, val_share: float | None = 0.02) -> None:
        if val_share is not None and not 0 < val_share < 1:
            raise DataError(f"data.source.val_share is {val_share:g}; use a share above 0 and below 1, or null")
        self.path, self.val_share = path if is_stored(path) else Path(path), val_share
        self.root = root if root is not None else folder_of(path)
        self.notes: list[str] = []

    def table(self) -> pd.DataFrame:
        """Raises DataError if the file is no such list. Invalid clips get an `error`."""
        listed = read_list(self.path)
        table = self._rows(list(listed.entries), listed.given)
        mark_missing_files(table)
        usable = table["error"].isna().to_numpy()
        if self.splits_by_hash(listed):
            table["split"] = np.where(self.held_out(file_hashes(table), usable), "val", "train")
        of_split = {split: (table["split"] == split).to_numpy() for split in SPLITS}
        self.notes = self.notes_of(listed, table["path"].to_numpy(), usable, of_split)
        return table

    def pieces(self, listed: ClipList, size: int) -> Iterator[pd.DataFrame]:
        """`table` in pieces of `size` rows, without looking for the files, and without a split by hashes."""
        entries = iter(listed.entries)
        first = 0
        while part := list(islice(entries, size)):
            yield self._rows(part, listed.given, first)
            first += len(part)

    def _rows(self, entries: Sequence[Any], given: Sequence[str], first: int = 0) -> pd.DataFrame:
        """first: number of the first entry in the list, from 0."""
        clips, errors = zip(*map(_checked, entries), strict=True)
        numbers = range(first, first + len(clips))
        # Objects: whether a clip's label stays a whole number must not depend on the other clips.
        raw = pd.DataFrame({key: [clip.get(key) for clip in clips] for key in given}, index=numbers, dtype=object)
        raw["error"] = pd.Series(errors, index=numbers, dtype=object)
        return normalise_rows(raw.rename(columns={"frames": "num_frames"}), self.root)

    def splits_by_hash(self, listed: ClipList) -> bool:
        """Whether val_share chooses the clips that are held out."""
        return "split" not in listed.given and self.val_share is not None

    def held_out(self, hashes: np.ndarray, usable: np.ndarray) -> np.ndarray:
        """[rows] whether val_share holds a row out. hashes: of file_hashes. usable: [rows] whether it has no error."""
        files = np.unique(hashes[usable])
        if len(files) < 2:
            return np.zeros(len(hashes), dtype=bool)
        return hashes <= max(files[0], int(self.val_share * HASHES))

    def notes_of(
        self, listed: ClipList, files: np.ndarray, usable: np.ndarray, of_split: Mapping[str, np.ndarray]
    ) -> list[str]:
        """Warnings about the list, and lines with the number of clips and videos, in all and per split.

        files: [rows] equal for rows of one file. usable: [rows] without an error. of_split: split -> [rows] its rows.
        """
        by_hash = self.splits_by_hash(listed)
        rule = f"by the hash of the path, val_share={self.val_share:g}" if by_hash else "by their `split`"
        parts = [(split, files[usable & rows]) for split, rows in of_split.items()]
        counts = [f"{split} {_clips_of(part)}" for split, part in parts if len(part)]
        lines = [f"{self.path} lists {_clips_of(files[usable])}"]
        return [*listed.notes, *lines, *([f"{', '.join(counts)}, {rule}"] if counts else [])]


def _clips_of(files: np.ndarray) -> str:
    return f"{plural(len(files), 'clip')} of {plural(len(pd.unique(files)), 'video')}"


class ClipList(NamedTuple):
    """entries: of the list, which may be iterated over again. rows: how many. given: the keys of KINDS that a clip
    has. notes: warnings about the list."""

    entries: Iterable[Any]
    rows: int
    given: list[str]
    notes: list[str]


def read_list(path: str | Path, by_line: bool = False) -> ClipList:
    """The list in a file. by_line: read JSON Lines again each time, and hold one line in memory. Raises DataError."""
    content: Any
    if by_line and kind_of(path) == ".jsonl":
        content = JsonLines(of_copy(Path, path) if is_stored(path) else Path(path))
    else:
        content = read_entries(path)
    entries = content.get("list") if isinstance(content, dict) else content
    if not isinstance(entries, list | JsonLines):
        found = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else f"{content!r:.40}"
        raise DataError(f'{path} must be a list of clips, or an object {{"list": [...]}}; it is {found}')
    keys: Counter[str] = Counter()
    count, given = 0, {"path"}
    for entry in entries:
        count += 1
        if isinstance(entry, dict):
            keys.update(list(entry))
            given.update(key for key in KINDS if key not in given and _is_valid(entry.get(key), KINDS[key][0]))
    if not count:
        raise DataError(f"{path} lists no clips")
    if "path" not in keys:
        found = f"their keys are {', '.join(keys)}" if keys else f"they must be {{'path': ...}}, not {_first(entries)}"
        hint = "; call their `full_path` `path`" if "full_path" in keys else ""
        raise DataError(f"{path}: no clip has the key `path`; {found}{hint}")
    claims = {key: content[key] for key in COUNTS if key in content} if isinstance(content, dict) else {}
    notes = [
        f"`{key}` of {path} is {claim}, but its list has {plural(count, 'clip')}"
        for key, claim in claims.items()
        if claim != count
    ]
    ignored = [f"{key} ({number})" for key, number in keys.items() if key not in KINDS]
    if ignored:
        notes.append(f"ignored keys of clips: {', '.join(ignored)}")
    return ClipList(entries, count, [key for key in KINDS if key in given], notes)


def _first(entries: Iterable[Any]) -> str:
    return f"{next(iter(entries))!r:.40}"


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
        return is_utf8(value)
    return abs(value) < 2**63 if isinstance(value, int) else value == value

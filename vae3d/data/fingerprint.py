"""The data of a run, row by row: saved with its checkpoints, compared on resume and between ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from vae3d.data.dataset_rows import is_row, version_of
from vae3d.data.images import is_sequence, sequence_files
from vae3d.data.media import MediaError
from vae3d.data.segments import SEGMENT
from vae3d.data.sources import in_threads
from vae3d.restore import check_like
from vae3d.seeding import seed_of

FACTS = ("split", "num_frames", "height", "width", "fps", "label", "text")
SIZES = (("rows", ()), ("facts", ()), ("files", (2,)))  # of the tensors of a record, beside the number of rows
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class DataFingerprint:
    """Rows in the order of training.

    rows: [N] int64, hash of what a row is: its name in the source, start and end. facts: [N] int64, hash of what else
    the table says of it. files: [N, 2] int64, size and modification time of its file; -1 where they are not known.
    names: of the rows, for messages.
    """

    rows: np.ndarray
    facts: np.ndarray
    files: np.ndarray
    names: Sequence[str]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(getattr(self, name)) for name in ("rows", "facts", "files")}

    def digests(self) -> dict[str, Any]:
        """What must be equal on all ranks; names stay the same where the folder differs."""
        return {
            "data: number of rows": len(self.rows),
            "data: rows": _digest(np.sort(self.rows)),
            "data: order of the rows": _digest(self.rows),
            "data: numbers, splits and labels of the rows": _digest(self.facts[np.argsort(self.rows, kind="stable")]),
        }

    def changes_since(self, saved: Mapping[str, torch.Tensor] | None) -> list[str]:
        """What differs from the data of a checkpoint, one line each. saved: its state_dict; None: not recorded.

        Raises ArgumentError if `saved` is something else.
        """
        if not saved:
            return []
        count = len(saved["rows"]) if isinstance(saved, Mapping) and isinstance(saved.get("rows"), torch.Tensor) else 0
        check_like(
            saved, {name: torch.empty(count, *size, dtype=torch.int64, device="meta") for name, size in SIZES}, "data"
        )
        old = DataFingerprint(*(saved[name].numpy() for name in ("rows", "facts", "files")), names=[])
        added, removed = ~np.isin(self.rows, old.rows), ~np.isin(old.rows, self.rows)
        lines = []
        if added.any():
            lines.append(f"{added.sum()} rows are new{self._named(added)}")
        if removed.any():
            lines.append(f"{removed.sum()} rows were removed")
        before, now = old.rows[~removed], self.rows[~added]
        if len(before) != len(now):
            lines.append(f"rows that occurred {len(before)} times occur {len(now)} times")
        elif moved := int((before != now).sum()):
            lines.append(f"the order of the rows changed: {moved} of {len(now)} moved")
        _, here, there = np.intersect1d(self.rows, old.rows, return_indices=True)
        edited = self.facts[here] != old.facts[there]
        if edited.any():
            lines.append(f"{edited.sum()} rows have other numbers, split, label or text{self._named(here[edited])}")
        (size, time), (old_size, old_time) = self.files[here].T, old.files[there].T
        known = (size >= 0) & (old_size >= 0)
        replaced, touched = known & (size != old_size), known & (size == old_size) & (time != old_time)
        if replaced.any():
            lines.append(f"the files of {replaced.sum()} rows have another size{self._named(here[replaced])}")
        if touched.any():
            lines.append(
                f"the files of {touched.sum()} rows have another modification time, and the same size"
                f"{self._named(here[touched])}"
            )
        return lines

    def _named(self, chosen: np.ndarray) -> str:
        names = list(dict.fromkeys(np.asarray(self.names, dtype=object)[chosen]))
        return f", such as {', '.join(map(str, names[:SHOWN]))}" if names else ""


def fingerprint_of(table: pd.DataFrame, stat_files: bool = True) -> DataFingerprint:
    """Of a source's table. stat_files: look at the files' size and time."""
    columns = {name: table[name].astype(object).where(table[name].notna(), None) for name in (*SEGMENT, *FACTS)}
    rows = [seed_of(*row) for row in zip(table["name"], *(columns[name] for name in SEGMENT), strict=True)]
    facts = [seed_of(*map(_plain, row)) for row in zip(*(columns[name] for name in FACTS), strict=True)]
    paths = table["path"].tolist()
    stats = in_threads(_stat, paths) if stat_files else dict.fromkeys(paths, (-1, -1))
    files = np.array([stats[path] for path in paths], dtype=np.int64).reshape(-1, 2)
    return DataFingerprint(np.array(rows, np.int64), np.array(facts, np.int64), files, table["name"].tolist())


def fingerprint_of_cache(index: pd.DataFrame, digest: str) -> DataFingerprint:
    """Of the entries of a latent cache; digest: of what it was made with."""
    keys = index["key"].tolist()
    facts = [seed_of(*map(str, row), digest) for row in zip(index["label"], index["split"], strict=True)]
    files = np.full((len(keys), 2), -1, np.int64)
    return DataFingerprint(np.array([seed_of(key) for key in keys], np.int64), np.array(facts, np.int64), files, keys)


def _plain(value: Any) -> Any:
    """Numbers as floats, so that 5 and 5.0 are the same."""
    return float(value) if isinstance(value, (int, float, np.number)) else value


def _stat(path: str) -> tuple[int, int]:
    """Size and modification time of a file, of the first of a sequence, or of the dataset of a row; -1 if unknown."""
    if is_row(path):
        return tuple(version_of(path) or (-1, -1))
    try:
        found = os.stat(sequence_files(path)[0] if is_sequence(path) else path)
    except (OSError, MediaError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]

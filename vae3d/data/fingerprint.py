"""A fingerprint of the training data: saved with checkpoints, compared on resume and between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from vae3d.data.segments import SEGMENT
from vae3d.data.versions import file_stamps
from vae3d.restore import check_like
from vae3d.seeding import seed_of
from vae3d.text import plural

FACTS = ("split", "num_frames", "height", "width", "fps", "label", "text")
SIZES = {"rows": (), "facts": (), "files": (2,)}  # tensor -> its size per row
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class DataFingerprint:
    """Hashes of the rows, in training order.

    rows: [N] int64, hash of a row's identity: name, start and end. facts: [N] int64, hash of its other columns. files:
    [N, 2] int64, bytes and modification time of its file; -1: unknown. names: of the rows, for messages.
    """

    rows: np.ndarray
    facts: np.ndarray
    files: np.ndarray
    names: Sequence[str]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(getattr(self, name)) for name in SIZES}

    def digests(self) -> dict[str, Any]:
        """Values that must be equal on all ranks. They do not depend on the folder that holds the data."""
        return {
            "data: number of rows": len(self.rows),
            "data: rows": _digest(np.sort(self.rows)),
            "data: order of the rows": _digest(self.rows),
            "data: numbers, splits and labels of the rows": _digest(self.facts[np.argsort(self.rows, kind="stable")]),
        }

    def changes_since(self, saved: Mapping[str, torch.Tensor] | None) -> list[str]:
        """Differences from the data of a checkpoint, one line each. saved: its state_dict; None: not saved.

        Raises ArgumentError if `saved` is no such state_dict.
        """
        if not saved:
            return []
        count = len(saved["rows"]) if isinstance(saved, Mapping) and isinstance(saved.get("rows"), torch.Tensor) else 0
        expected = {name: torch.empty(count, *size, dtype=torch.int64, device="meta") for name, size in SIZES.items()}
        check_like(saved, expected, "data")
        old = DataFingerprint(**{name: saved[name].numpy() for name in SIZES}, names=[])
        added = ~np.isin(self.rows, old.rows)
        removed = ~np.isin(old.rows, self.rows)
        before, now = old.rows[~removed], self.rows[~added]
        lines = self._line("new row", "", np.flatnonzero(added))
        if removed.any():
            lines.append(f"{plural(removed.sum(), 'row')} removed")
        if len(before) != len(now):
            lines.append(f"rows that occurred {len(before)} times occur {len(now)} times")
        elif moved := int((before != now).sum()):
            lines.append(f"the order of the rows changed: {moved} of {len(now)} moved")
        _, here, there = np.intersect1d(self.rows, old.rows, return_indices=True)
        size, time = self.files[here].T
        old_size, old_time = old.files[there].T
        resized = (size >= 0) & (old_size >= 0) & (size != old_size)
        touched = (size >= 0) & (size == old_size) & (time != old_time)
        other = here[self.facts[here] != old.facts[there]]
        lines += self._line("row", " with other numbers, split, label or text", other)
        lines += self._line("row", " whose file has another size", here[resized])
        lines += self._line("row", " whose file has another modification time, and the same size", here[touched])
        return lines

    def _line(self, noun: str, what: str, rows: np.ndarray) -> list[str]:
        names = list(dict.fromkeys(self.names[row] for row in rows))
        return [f"{plural(len(rows), noun)}{what}, such as {', '.join(names[:SHOWN])}"] if names else []


def fingerprint_of(table: pd.DataFrame, stat_files: bool = True) -> DataFingerprint:
    """Fingerprint of a source's table. stat_files: include size and modification time of the files."""
    columns = {name: table[name].astype(object).where(table[name].notna(), None) for name in (*SEGMENT, *FACTS)}
    rows = [seed_of(*row) for row in zip(table["name"], *(columns[name] for name in SEGMENT), strict=True)]
    facts = [seed_of(*map(_as_float, row)) for row in zip(*(columns[name] for name in FACTS), strict=True)]
    paths = table["path"].tolist()
    stamps = file_stamps(paths) if stat_files else {}
    files = np.array([(stamps.get(path) or [-1, -1])[:2] for path in paths], dtype=np.int64).reshape(-1, 2)
    return DataFingerprint(np.array(rows, np.int64), np.array(facts, np.int64), files, table["name"].tolist())


@dataclass(frozen=True)
class SourceFingerprints:
    """The fingerprints of the sources of a mixture, by name, which messages begin with."""

    sources: Mapping[str, DataFingerprint]

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = {name: fingerprint.state_dict() for name, fingerprint in self.sources.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def digests(self) -> dict[str, Any]:
        """Values that must be equal on all ranks."""
        digests = {name: fingerprint.digests() for name, fingerprint in self.sources.items()}
        return {f"{name}: {key}": value for name, values in digests.items() for key, value in values.items()}

    def changes_since(self, saved: Mapping[str, torch.Tensor] | None) -> list[str]:
        """Differences from the data of a checkpoint, one line each. saved: its state_dict; None: not saved.

        Raises ArgumentError if `saved` is no such state_dict.
        """
        if not saved:
            return []
        old: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in saved.items():
            name, _, entry = key.rpartition("/")
            old.setdefault(name, {})[entry] = value
        lines = [f"{name}: a new source" for name in self.sources if name not in old]
        lines += [f"{name}: a source that is no longer there" for name in old if name not in self.sources]
        for name, fingerprint in self.sources.items():
            lines += [f"{name}: {line}" for line in fingerprint.changes_since(old.get(name))]
        return lines


def fingerprint_of_cache(index: pd.DataFrame, digest: str) -> DataFingerprint:
    """Fingerprint of the entries of a latent cache. digest: of the settings it was encoded with."""
    keys = index["key"].tolist()
    facts = [seed_of(*map(str, row), digest) for row in zip(index["label"], index["split"], strict=True)]
    files = np.full((len(keys), 2), -1, np.int64)
    return DataFingerprint(np.array([seed_of(key) for key in keys], np.int64), np.array(facts, np.int64), files, keys)


def _as_float(value: Any) -> Any:
    """Numbers as floats: a table may hold 5 or 5.0."""
    return float(value) if isinstance(value, (int, float, np.number)) else value


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]

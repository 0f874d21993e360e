"""A fingerprint of the training data: saved with checkpoints, compared on resume and between ranks.

DataFingerprint has hashes per row, and names what changed. GroupedFingerprint is for more than PER_ROW rows: it has
hashes per group of rows, of one size for any number of rows, and says what kind of change there is and of about how
many rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from vae3d.data.permutation import GOLDEN, mix
from vae3d.data.table.file_table import FileTable
from vae3d.data.table.segments import SEGMENT
from vae3d.data.table.versions import file_stamps
from vae3d.restore import check_like
from vae3d.seeding import seed_of
from vae3d.text import plural

FACTS = ("split", "num_frames", "height", "width", "fps", "label", "text")
SIZES = {"rows": (), "facts": (), "files": (2,)}  # tensor -> its size per row
SHOWN = 3  # names in a message
PER_ROW = 100_000  # rows
GROUPS = 4096


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
        if isinstance(saved, Mapping) and "groups" in saved:  # the data had more rows
            return grouped(self.rows, self.facts, self.files).changes_since(saved)
        old = _per_row(saved)
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


def _per_row(saved: Any) -> DataFingerprint:
    """The fingerprint of a state_dict, without names. Raises ArgumentError."""
    count = len(saved["rows"]) if isinstance(saved, Mapping) and isinstance(saved.get("rows"), torch.Tensor) else 0
    expected = {name: torch.empty(count, *size, dtype=torch.int64, device="meta") for name, size in SIZES.items()}
    check_like(saved, expected, "data")
    return DataFingerprint(**{name: saved[name].numpy() for name in SIZES}, names=[])


@dataclass(frozen=True)
class GroupedFingerprint:
    """Hashes of groups of rows. A row's identity chooses its group, so a row that comes, goes or changes changes one.

    groups: [GROUPS, 5] int64: number of rows; sums of the hashes of their identities, of these with their other
    columns, and of these with size and time of those files whose size is known; number of these files. order: [32]
    int64, SHA-256 of the identities in training order.
    """

    groups: np.ndarray
    order: np.ndarray

    @property
    def count(self) -> int:
        return int(self.groups[:, 0].sum())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"groups": torch.from_numpy(self.groups.copy()), "order": torch.from_numpy(self.order.copy())}

    def digests(self) -> dict[str, Any]:
        """Values that must be equal on all ranks. They do not depend on the folder that holds the data."""
        return {
            "data: number of rows": self.count,
            "data: rows": _digest(self.groups[:, :2]),
            "data: order of the rows": _digest(self.order),
            "data: numbers, splits and labels of the rows": _digest(self.groups[:, 2]),
        }

    def changes_since(self, saved: Mapping[str, torch.Tensor] | None) -> list[str]:
        """Differences from the data of a checkpoint, one line each. saved: its state_dict, or that of a
        DataFingerprint; None: not saved. Raises ArgumentError if `saved` is neither.
        """
        if not saved:
            return []
        if isinstance(saved, Mapping) and "groups" not in saved:
            old = _per_row(saved)
            old = grouped(old.rows, old.facts, old.files)
        else:
            check_like(saved, {name: value.to("meta") for name, value in self.state_dict().items()}, "data")
            old = GroupedFingerprint(saved["groups"].numpy(), saved["order"].numpy())
        counts, rows, facts, files, unknown = (self.groups != old.groups).T
        same = ~(counts | rows)
        lines = []
        if not same.all():
            more = self.count - old.count
            difference = (
                f"{plural(abs(more), 'row')} {'more' if more > 0 else 'fewer'} than" if more else "as many rows as"
            )
            changed = _about((~same).sum(), GROUPS, at_least=abs(more))  # equal rows count in one group
            lines.append(f"rows are new or removed, {changed}; {difference} before")
        elif not np.array_equal(self.order, old.order):
            lines.append("the order of the rows changed")
        for changed, what in (
            (same & facts, "rows have other numbers, split, label or text"),
            (same & ~facts & files & ~unknown, "rows have files of another size or modification time"),
        ):
            if changed.any():
                lines.append(f"{what}, {_about(changed.sum(), same.sum())}")
        return lines


Fingerprint = DataFingerprint | GroupedFingerprint  # of one source


def _about(changed: int, groups: int, at_least: int = 0) -> str:
    """How many changes hit so many of the groups, if each hits any: most likely ln(1 - share) / ln(1 - 1 / groups)."""
    if changed == groups:
        return f"many (all {groups} groups of rows differ)"
    likely = round(np.log1p(-changed / groups) / np.log1p(-1 / groups)) if groups > 1 else changed
    return f"about {max(likely, at_least)} ({changed} of {groups} groups of rows differ)"


def grouped(rows: np.ndarray, facts: np.ndarray, files: np.ndarray | None) -> GroupedFingerprint:
    """rows, facts: [N] hashes of row_hashes and fact_hashes. files: [N, 2] size and time; -1: unknown; None: of all."""
    parts = (slice(first, first + PER_ROW) for first in range(0, len(rows), PER_ROW))  # in bounded memory
    groups, order = np.zeros((GROUPS, 5), np.int64), hashlib.sha256()
    for part in parts:
        row, fact = rows[part].astype(np.uint64), facts[part].astype(np.uint64)
        order.update(np.ascontiguousarray(rows[part], np.int64).tobytes())
        columns = [np.ones(len(row), np.uint64), _mixed(row), _mixed(row, fact)]
        if files is not None:
            size, time = files[part].T.astype(np.uint64)
            known = files[part, 0] >= 0
            columns += [np.where(known, _mixed(row, size, time), np.uint64(0)), known.astype(np.uint64)]
        for column, values in enumerate(columns):
            np.add.at(groups[:, column].view(np.uint64), (row % np.uint64(GROUPS)).astype(np.int64), values)
    return GroupedFingerprint(groups, np.frombuffer(order.digest(), np.uint8).astype(np.int64))


def _mixed(*hashes: np.ndarray) -> np.ndarray:
    """One uint64 of several, so that sums of them tell sets of rows apart."""
    z = np.zeros(len(hashes[0]), np.uint64)
    for part in hashes:
        z = mix((z ^ part) + np.uint64(GOLDEN))
    return z


def fingerprint_of(table: FileTable, facts: np.ndarray, stat_files: bool = True) -> Fingerprint:
    """Fingerprint of rows with the columns of row_arrays.py. facts: [rows] their hashes with the numbers that were
    filled in. stat_files: include size and modification time of the files; never of more than PER_ROW rows."""
    everything, rows = np.arange(len(table)), np.array(table.numbers("identity"))  # a copy, which torch can take
    if len(table) > PER_ROW:
        return grouped(rows, facts, None)
    paths = table.paths(everything)
    stamps = file_stamps(paths) if stat_files else {}
    files = np.array([(stamps.get(path) or [-1, -1])[:2] for path in paths], dtype=np.int64).reshape(-1, 2)
    return DataFingerprint(rows, facts, files, table.names(everything))


def row_hashes(table: pd.DataFrame) -> np.ndarray:
    """[rows] int64, hash of a row's identity: name, start and end."""
    columns = [_values(table[name]) for name in SEGMENT]
    return np.array([seed_of(*row) for row in zip(table["name"].tolist(), *columns, strict=True)], np.int64)


def fact_hashes(table: pd.DataFrame) -> np.ndarray:
    """[rows] int64, hash of the columns of FACTS."""
    known: dict[tuple, int] = {}  # many rows have the same
    hashes = np.empty(len(table), np.int64)
    for place, row in enumerate(zip(*(_values(table[name]) for name in FACTS), strict=True)):
        if (value := known.get(row)) is None:
            value = known[row] = seed_of(*row)
        hashes[place] = value
    return hashes


def _values(column: pd.Series) -> list[Any]:
    """The values of a column as Python objects: numbers as floats, None for missing ones."""
    missing = column.isna()
    if missing.all():
        return [None] * len(column)
    values = column.tolist() if column.dtype == float else list(map(_as_float, column.tolist()))
    if not missing.any():
        return values
    return [None if no else value for value, no in zip(values, missing.tolist(), strict=True)]


@dataclass(frozen=True)
class SourceFingerprints:
    """The fingerprints of the sources of a mixture, by name, which messages begin with."""

    sources: Mapping[str, Fingerprint]

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


class DataChanges:
    """The rows of the training data, and after a load how they differ from those of the checkpoint."""

    def __init__(self, fingerprint: Fingerprint | SourceFingerprints | None) -> None:
        self.fingerprint = fingerprint
        self.lines: list[str] = []

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self.fingerprint is None else self.fingerprint.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        if self.fingerprint is None:
            return
        mixture = isinstance(self.fingerprint, SourceFingerprints)
        if state and isinstance(state, Mapping) and any("/" in name for name in state) != mixture:
            self.lines = [f"{'one source' if mixture else 'a mixture'} before, {'a mixture' if mixture else 'one'} now"]
        else:
            self.lines = self.fingerprint.changes_since(state)


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

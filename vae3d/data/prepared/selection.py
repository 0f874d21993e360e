"""Which rows of a prepared table a run uses: what selection.choose chooses, kept beside the table (see table.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vae3d.data.batches.selection import SHOWN, Choice, Pairs, Rules, check_broken_share, choose, pieces, skipped_files
from vae3d.data.prepared.rows import results_of
from vae3d.data.prepared.table import KEPT, Large
from vae3d.data.storage.cache import alone
from vae3d.data.table.file_table import CHUNK, NAMES, TEXT, ArrowFile, FileTable, write_arrow
from vae3d.data.table.fingerprint import GroupedFingerprint, grouped
from vae3d.data.table.probe import PART, ProbeResults, Ranks, read_files, read_metadata
from vae3d.data.table.rows import in_threads
from vae3d.hashing import json_hash
from vae3d.io import atomic_dir, naming, write_json
from vae3d.progress import progress

LISTED = 1000  # files that a run names one by one
ERRORS = pa.schema([("path", NAMES), ("reason", TEXT), ("opened", pa.bool_())])


@dataclass(frozen=True)
class Selection:
    """Rows chosen from a prepared table. errors: (path, reason) of the first LISTED that cannot be used. skipped:
    likewise of files that are too small. notes: lines for the log."""

    train: FileTable
    val: FileTable
    fingerprint: GroupedFingerprint
    errors: Pairs
    skipped: Pairs
    notes: list[str]


def select(large: Large, table: FileTable, rules: Rules, ranks: Ranks) -> Selection:
    """Rows to train on and rows held out. Files that did not open when the selection was made are tried again.

    All ranks must call it at the same time. Raises DataError as `choose` does.
    """
    settings = rules.settings
    chosen_by = [rules.needed, rules.sizes, rules.num_val_files, settings.stride, settings.fps, settings.min_side]
    sizes = [settings.height, settings.width, settings.short_side]  # of which a note depends
    folder = large.folder / f"selection-{json_hash([chosen_by, sizes])}"
    made = _time_of(folder)
    if not ranks.all(made is not None and not _opens_now(folder, ranks)):
        results = results_of(large.rows.source, large.folder)
        probe_unknown(table, rules, results, ranks)
        with alone(folder.parent, KEPT):
            if _time_of(folder) == made:  # else another process has just made it again
                one_name_per_file = json.loads((large.folder / "about.json").read_text())["one_name_per_file"]
                with naming(folder), atomic_dir(folder) as tmp:
                    _write(tmp, table, rules, results, one_name_per_file)
    about = json.loads((folder / "about.json").read_text())
    errors, skipped = (ArrowFile(folder / f"{name}.arrow").table for name in ("errors", "skipped"))
    check_broken_share(_pairs(errors, SHOWN), len(errors), about["rows"], rules.max_broken)
    train, val = (FileTable(table.base, ArrowFile(folder / f"{name}.arrow")) for name in ("train", "val"))
    with np.load(folder / "fingerprint.npz") as arrays:
        fingerprint = GroupedFingerprint(arrays["groups"], arrays["order"])
    notes = list(about["notes"])
    for name, listed, what in (("errors", errors, "cannot be used"), ("skipped", skipped, "are too small")):
        if len(listed) > LISTED:
            notes.append(f"{folder / name}.arrow lists all {len(listed)} files that {what}")
    return Selection(train, val, fingerprint, _pairs(errors, LISTED), _pairs(skipped, LISTED), notes)


def _time_of(folder: Path) -> int | None:
    """When a selection was made; None: it is not there."""
    try:
        return (folder / "about.json").stat().st_mtime_ns
    except OSError:
        return None


def _opens_now(folder: Path, ranks: Ranks) -> bool:
    """Whether a file opens that did not when the selection was made, of this rank's share of such files."""
    errors = ArrowFile(folder / "errors.arrow").table
    paths = errors.filter(errors["opened"])["path"].to_pylist()[ranks.rank :: ranks.world_size]
    return any("error" not in metadata for metadata in in_threads(read_metadata, map(os.fsdecode, paths)).values())


def _pairs(errors: pa.Table, count: int) -> Pairs:
    return [(os.fsdecode(row["path"]), row["reason"]) for row in errors.slice(0, count).to_pylist()]


def probe_unknown(table: FileTable, rules: Rules, results: ProbeResults, ranks: Ranks) -> None:
    """Read this rank's share of the files that nothing is known of, and wait for the other ranks."""
    unknown = (piece[lacks] for piece, lacks in pieces(table, rules.needed))
    rows = np.concatenate([np.empty(0, np.int64), *unknown])
    with progress(total=len(rows), desc="probing files", unit="row", hidden=ranks.rank > 0 or not len(rows)) as bar:
        for first in range(0, len(rows), PART):
            paths = list(dict.fromkeys(table.paths(rows[first : first + PART])))
            known = results.knows(paths)
            mine = [path for path, found in zip(paths, known, strict=True) if not found and ranks.has(path)]
            read_files(mine, results, hidden=True)
            bar.update(min(PART, len(rows) - first))
    ranks.wait()
    if len(rows):
        results.merge()


def _write(folder: Path, table: FileTable, rules: Rules, results: ProbeResults, one_name_per_file: bool) -> None:
    """Choose rows, and write the selection. Raises DataError."""
    with pa.OSFile(str(folder / "errors.arrow"), "wb") as sink, pa.ipc.new_file(sink, ERRORS) as writer:
        choice = choose(
            table,
            rules,
            results,
            lambda errors, opened: writer.write_table(_errors_table(errors, opened)),
            one_name_per_file=one_name_per_file,
            trusted=True,
        )
    _write_errors(folder / "skipped.arrow", skipped_files(table, choice, rules.settings.min_side))
    fingerprint = _fingerprint(table, choice, results)
    np.savez(folder / "fingerprint.npz", groups=fingerprint.groups, order=fingerprint.order)
    write_json(folder / "about.json", {"rows": len(table), "notes": choice.notes})
    pa.default_memory_pool().release_unused()
    write_arrow(folder / "val.arrow", choice.view(choice.val, rules.settings))
    write_arrow(folder / "train.arrow", choice.view(choice.train, rules.settings, last=True))


def _fingerprint(table: FileTable, choice: Choice, results: ProbeResults) -> GroupedFingerprint:
    """With size and time of the files that were probed, as they were then."""
    chosen = np.concatenate([choice.train, choice.val])
    rows, probed = choice.columns["row"][chosen], choice.columns["probed"][chosen]
    files = None
    if probed.any():
        files = np.full((len(rows), 2), -1, np.int64)
        for places in np.array_split(np.flatnonzero(probed), -(-probed.sum() // CHUNK)):
            files[places] = results.stamps(table.paths(rows[places]))
    return grouped(table.numbers("identity", rows), choice.columns["facts"][chosen], files)


def _write_errors(file: Path, parts: Iterable[Pairs]) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, ERRORS) as writer:
        for part in parts:
            writer.write_table(_errors_table(part, opened=False))


def _errors_table(errors: Pairs, opened: bool) -> pa.Table:
    rows = [{"path": os.fsencode(path), "reason": reason, "opened": opened} for path, reason in errors]
    return pa.Table.from_pylist(rows, ERRORS)

"""Which rows of a prepared table a run uses: a selection, kept beside the table (see prepared.py).

The rules are those of loader.read_tables for a small table, whose pieces are in selection.py; here they work on
columns of numbers, in memory of about 70 bytes per row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vae3d.data.file_table import CHUNK, NAMES, TEXT, ArrowFile, FileTable, clip_rule, compact, write_arrow
from vae3d.data.fingerprint import GroupedFingerprint, fact_hashes, grouped
from vae3d.data.media import DataError
from vae3d.data.prepared import Large, alone
from vae3d.data.prepared_rows import equal_in_a_file, path_hashes, with_labels
from vae3d.data.probe import (
    PART,
    Metadata,
    ProbeResults,
    Ranks,
    fill_metadata,
    probe,
    read_files,
    read_metadata,
)
from vae3d.data.readers import is_image
from vae3d.data.rows import NUMBERS, in_threads, invalid_rows
from vae3d.data.segments import SEGMENT, count_frames
from vae3d.data.selection import (
    PROBED_IMAGES,
    SHOWN,
    check_broken_share,
    evenly_spaced,
    is_held_out,
    skipped_note,
    too_small,
    upscaled_notes,
    why_too_small,
)
from vae3d.hashing import json_hash
from vae3d.io import atomic_dir, naming, write_json
from vae3d.progress import progress
from vae3d.seeding import seed_of

if TYPE_CHECKING:
    from vae3d.data.clips import ClipSettings

LISTED = 1000  # files that a run names one by one
ERRORS = pa.schema([("path", NAMES), ("reason", TEXT), ("opened", pa.bool_())])


@dataclass(frozen=True)
class Selection:
    """Rows chosen from a prepared table. errors: (path, reason) of the first LISTED that cannot be used. skipped:
    likewise of files that are too small. notes: lines for the log."""

    train: FileTable
    val: FileTable
    fingerprint: GroupedFingerprint
    errors: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    notes: list[str]


def select(
    large: Large,
    table: FileTable,
    settings: ClipSettings,
    needed: Sequence[str],
    num_val_files: int,
    max_broken: float,
    ranks: Ranks,
) -> Selection:
    """Rows to train on and rows held out, as loader.read_tables chooses them from a small table. needed: columns that
    every row must have. Files that did not open when the selection was made are tried again.

    All ranks must call it at the same time. Raises DataError if more than the share `max_broken` cannot be used, or if
    nothing is left to train on.
    """
    chosen_by = [needed, num_val_files, settings.stride, settings.fps, settings.min_side]
    sizes = [settings.height, settings.width, settings.short_side]  # of which a note depends
    folder = large.folder / f"selection-{json_hash([chosen_by, sizes])}"
    made = _time_of(folder)
    if not ranks.all(made is not None and not _opens_now(folder, ranks)):
        results = large.rows.results(large.folder)
        probe_unknown(table, needed, results, ranks)
        with alone(folder.parent):
            if _time_of(folder) == made:  # else another process has just made it again
                with naming(folder), atomic_dir(folder) as tmp:
                    _choose(tmp, folder, table, settings, needed, num_val_files, max_broken, results)
    about = json.loads((folder / "about.json").read_text())
    errors, skipped = (ArrowFile(folder / f"{name}.arrow").table for name in ("errors", "skipped"))
    check_broken_share(_pairs(errors, SHOWN), len(errors), about["rows"], max_broken)
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


def _pairs(errors: pa.Table, count: int) -> list[tuple[str, str]]:
    return [(os.fsdecode(row["path"]), row["reason"]) for row in errors.slice(0, count).to_pylist()]


def probe_unknown(table: FileTable, needed: Sequence[str], results: ProbeResults, ranks: Ranks) -> None:
    """Read this rank's share of the files that nothing is known of, and wait for the other ranks."""
    rows = np.concatenate([np.empty(0, np.int64), *(piece[unknown] for piece, unknown in _pieces(table, needed))])
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


def _pieces(table: FileTable, needed: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the rows without an error, and which of them lack a number or are a part of their file."""
    for first in range(0, len(table), CHUNK):
        piece = np.arange(first, min(first + CHUNK, len(table)))
        sound = piece[table.missing("error", piece)]
        lacking = [np.isnan(table.numbers(name, sound)) for name in needed]
        yield sound, np.logical_or.reduce([*lacking, *(~np.isnan(table.numbers(name, sound)) for name in SEGMENT)])
        table.base.release()


def _choose(
    folder: Path,
    final: Path,
    table: FileTable,
    settings: ClipSettings,
    needed: Sequence[str],
    num_val_files: int,
    max_broken: float,
    results: ProbeResults,
) -> None:
    """Write a selection, in memory of about 70 bytes per row. final: where its folder will be. Raises DataError."""
    errors = _Errors(folder / "errors.arrow")
    columns = _filled(table, needed, results, errors)
    errors.close()
    check_broken_share(errors.first, errors.count, len(table), max_broken)
    smaller = too_small(columns["height"], columns["width"], settings.min_side)
    _write_skipped(folder / "skipped.arrow", table, columns, smaller, settings.min_side)
    if smaller.any():
        columns = {name: values[~smaller] for name, values in columns.items()}
    is_val, is_train = _splits(table, columns["row"], num_val_files, final.parent)
    probed = [[m["height"], m["width"]] for m in _some_images(table, columns, results).values() if "error" not in m]
    notes = upscaled_notes(columns["height"], columns["width"], probed, settings)
    if smaller.any():
        notes.append(skipped_note(int(smaller.sum()), settings.min_side))
    if not is_train.any():
        raise DataError("no rows are left to train on; is the `split` column `val` or `test` throughout?")
    order = [np.flatnonzero(is_train).astype(np.int32), np.flatnonzero(is_val).astype(np.int32)]
    pa.default_memory_pool().release_unused()
    for name, rows in (("val", order[1]), ("train", order[0])):
        view = _view(columns, rows, settings, last=name == "train")
        write_arrow(folder / f"{name}.arrow", view.replace_schema_metadata(clip_rule(settings)))
    del view
    rows = np.concatenate(order)
    files = columns["stamp"][rows] if "stamp" in columns else None
    identities = table.numbers("identity", columns["row"][rows])
    fingerprint = grouped(identities, columns["facts"][rows], files)
    np.savez(folder / "fingerprint.npz", groups=fingerprint.groups, order=fingerprint.order)
    write_json(folder / "about.json", {"rows": len(table), "notes": notes})


def _view(columns: dict[str, np.ndarray], rows: np.ndarray, settings: ClipSettings, last: bool) -> pa.Table:
    """The columns of train.arrow or val.arrow. last: the columns of NUMBERS are dropped from `columns`."""
    length = np.empty(len(rows), np.int32)
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        length[first : first + CHUNK] = settings.length(columns["num_frames"][part], columns["fps"][part])
    known = {}
    for name in NUMBERS:
        values = columns.pop(name) if last else columns[name]
        if not np.isnan(values).all():
            known[name] = values[rows]
    del values
    by_length = np.argsort(length, kind="stable").astype(np.int32)
    return pa.table({"row": columns["row"][rows], **known, "length": length, "by_length": by_length})


def _filled(table: FileTable, needed: Sequence[str], results: ProbeResults, errors: _Errors) -> dict[str, np.ndarray]:
    """The usable rows: `row`, the columns of NUMBERS, `facts` (hash) and, if files were probed, `stamp` [rows, 2]."""
    count, place = len(table), 0
    columns: dict[str, np.ndarray] = {"row": np.empty(count, np.int32), "facts": np.empty(count, np.int64)}
    columns |= {name: np.full(count, np.nan, np.float32) for name in NUMBERS}
    errors.add_rows(table, np.concatenate([np.empty(0, np.int64), *_invalid(table)]))
    for piece, unknown in _pieces(table, needed):
        complete = piece[~unknown]
        found = {"row": complete, "facts": table.numbers("facts", complete)}
        found |= {name: table.numbers(name, complete) for name in NUMBERS}
        if unknown.any():
            probed, unread = fill_metadata(with_labels(table, piece[unknown]), needed, results, trusted=True)
            probed, outside = count_frames(probed)
            errors.add(unread, opened=True)
            errors.add(outside, opened=False)
            if "stamp" not in columns:
                columns["stamp"] = np.full((count, 2), -1, np.int64)
            new = {"row": probed["row"].to_numpy() - 1, "facts": fact_hashes(probed)}
            new |= {name: probed[name].to_numpy(dtype=float) for name in NUMBERS}
            order = np.argsort(np.concatenate([complete, new["row"]]), kind="stable")
            found = {name: np.concatenate([found[name], new[name]])[order] for name in found}
            stamps = np.concatenate([np.full((len(complete), 2), -1), results.stamps(probed["path"].tolist())])[order]
            columns["stamp"][place : place + len(stamps)] = stamps
        for name, values in found.items():
            if name in NUMBERS and compact(values).dtype == np.float64:
                columns[name] = columns[name].astype(np.float64, copy=False)
            columns[name][place : place + len(values)] = values
        place += len(found["row"])
    return {name: values[:place] for name, values in columns.items()}


def _invalid(table: FileTable) -> Iterator[np.ndarray]:
    for first in range(0, len(table), CHUNK):
        piece = np.arange(first, min(first + CHUNK, len(table)))
        yield piece[~table.missing("error", piece)]


class _Errors:
    """Writes errors.arrow: (path, reason) of rows that cannot be used, and whether the file was opened in vain."""

    def __init__(self, path: Path) -> None:
        self.count, self.first = 0, []
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, ERRORS)

    def add(self, errors: list[tuple[str, str]], opened: bool) -> None:
        self.count += len(errors)
        self.first += errors[: SHOWN - len(self.first)]
        self._writer.write_table(_errors_table(errors, opened))

    def add_rows(self, table: FileTable, rows: np.ndarray) -> None:
        """Add rows with an error of their own."""
        for first in range(0, len(rows), CHUNK):
            self.add(invalid_rows(table.to_pandas(rows[first : first + CHUNK])), opened=False)

    def close(self) -> None:
        self._writer.close()
        self._sink.close()


def _errors_table(errors: list[tuple[str, str]], opened: bool) -> pa.Table:
    rows = [{"path": os.fsencode(path), "reason": reason, "opened": opened} for path, reason in errors]
    return pa.Table.from_pylist(rows, ERRORS)


def _write_skipped(
    path: Path, table: FileTable, columns: dict[str, np.ndarray], smaller: np.ndarray, min_side: int | None
) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ERRORS) as writer:
        places = np.flatnonzero(smaller)
        for first in range(0, len(places), CHUNK):
            part = places[first : first + CHUNK]
            paths = table.paths(columns["row"][part])
            reasons = [
                why_too_small(height, width, min_side)
                for height, width in zip(columns["height"][part], columns["width"][part], strict=True)
            ]
            writer.write_table(_errors_table(list(zip(paths, reasons, strict=True)), opened=False))


def _splits(table: FileTable, rows: np.ndarray, num_val_files: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are held out, and which are trained on."""
    if "file" not in table.base.table.column_names:
        if not table.missing("split", rows).all():
            return table.equals("split", "val", rows), table.equals("split", "train", rows)
        hashes = _hashes_of_names(table, rows)
    else:
        hashes = table.numbers("file", rows)
    if not json.loads((folder / "about.json").read_text())["one_name_per_file"]:
        parts = (table.paths(rows[first : first + CHUNK]) for first in range(0, len(rows), CHUNK))
        files = np.concatenate([path_hashes(part) for part in parts])
        hashes = equal_in_a_file(table, rows, hashes, files)
    is_val = is_held_out(hashes, num_val_files)
    return is_val, ~is_val


def _hashes_of_names(table: FileTable, rows: np.ndarray) -> np.ndarray:
    parts = (table.names(rows[first : first + CHUNK]) for first in range(0, len(rows), CHUNK))
    return np.concatenate([np.array([seed_of(name) for name in part], np.int64) for part in parts])


def _some_images(table: FileTable, columns: dict[str, np.ndarray], results: ProbeResults) -> dict[str, Metadata]:
    """Metadata of up to PROBED_IMAGES images without a size, evenly spaced."""
    unknown = columns["row"][np.isnan(columns["height"]) | np.isnan(columns["width"])]
    images = [
        part[np.fromiter(map(is_image, table.names(part)), bool, len(part))]
        for part in (unknown[first : first + CHUNK] for first in range(0, len(unknown), CHUNK))
    ]
    rows = np.concatenate([np.empty(0, np.int32), *images])
    chosen = table.paths(rows[evenly_spaced(len(rows), PROBED_IMAGES)])
    return probe(chosen, results, trusted=True) if chosen else {}

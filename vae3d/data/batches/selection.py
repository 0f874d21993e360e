"""Which rows of a table a run uses: how many may be broken, which are long enough, too small, or held out.

`choose` applies these rules to the table of a source, small or large. It works on columns of numbers, a piece of the
table at a time, in memory of about 70 bytes per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vae3d.data.decoding.readers import is_image
from vae3d.data.media import NO_SUCH_FILE, DataError
from vae3d.data.table.file_table import CHUNK, FileTable, as_file_table, clip_rule, compact
from vae3d.data.table.fingerprint import fact_hashes
from vae3d.data.table.probe import ProbeResults, Ranks, fill_metadata, probe
from vae3d.data.table.row_arrays import equal_in_a_file, path_hashes, with_labels
from vae3d.data.table.rows import NUMBERS, invalid_rows
from vae3d.data.table.segments import SEGMENT, count_frames
from vae3d.seeding import seed_of
from vae3d.text import plural

if TYPE_CHECKING:
    import pandas as pd

    from vae3d.data.batches.clips import ClipSettings

SHOWN = 10  # files in a message
SIZE = ["height", "width"]
PROBED_IMAGES = 2000  # evenly spaced, to estimate how many are too small
Pairs = list[tuple[str, str]]  # (path, reason)


@dataclass(frozen=True)
class Rules:
    """What chooses rows. num_val_files: held out where no row has a `split`. max_broken: share of rows that may be
    unusable. sizes: heights and widths of all files are needed, for clips of several sizes."""

    settings: ClipSettings
    num_val_files: int
    max_broken: float
    sizes: bool = False

    @property
    def needed(self) -> list[str]:
        """Columns that every row must have."""
        sized = self.sizes or self.settings.min_side is not None
        return ["num_frames"] + ["fps"] * (self.settings.fps is not None) + SIZE * sized


@dataclass
class Choice:
    """Rows chosen from a table.

    columns: of the usable rows: `row` (in the table), those of NUMBERS, `facts` (hash), and `probed` (whether the file
    was). train, val: indices into these. skipped: [rows] of the table, of files that are too small, and their heights
    and widths. notes: lines for the log.
    """

    columns: dict[str, np.ndarray]
    train: np.ndarray
    val: np.ndarray
    skipped: tuple[np.ndarray, np.ndarray, np.ndarray]
    notes: list[str]

    def view(self, rows: np.ndarray, settings: ClipSettings, last: bool = False) -> pa.Table:
        """The view of a FileTable, of `train` or `val`. last: `columns` loses those of NUMBERS."""
        columns = self.columns
        length = np.empty(len(rows), np.int32)
        for first in range(0, len(rows), CHUNK):
            part = rows[first : first + CHUNK]
            length[first : first + CHUNK] = settings.length(columns["num_frames"][part], columns["fps"][part])
        known = {}
        for name in NUMBERS:
            values = columns.pop(name) if last else columns[name]
            if not np.isnan(values).all():
                known[name] = values[rows]
        by_length = np.argsort(length, kind="stable").astype(np.int32)
        view = pa.table({"row": columns["row"][rows], **known, "length": length, "by_length": by_length})
        return view.replace_schema_metadata(clip_rule(settings))


def choose(
    table: FileTable,
    rules: Rules,
    results: ProbeResults | None,
    add_errors: Callable[[Pairs, bool], None],
    *,
    one_name_per_file: bool = False,
    trusted: bool = False,
    ranks: Ranks | None = None,
) -> Choice:
    """Rows to train on and rows held out.

    With a `split` column: its `train` and `val` rows. Without: the files with the lowest hashes of their names, see
    is_held_out, are held out with all their parts; so the choice stays when the table grows or moves.
    add_errors: gets (path, reason) of rows that cannot be used, piece by piece, and whether their files were opened in
    vain. one_name_per_file: no two rows name a file differently. results, trusted, ranks: see probe.
    Raises DataError if more than the share `max_broken` cannot be used, or nothing is left to train on.
    """
    settings = rules.settings
    count, first = 0, []

    def add(errors: Pairs, opened: bool) -> None:
        nonlocal count, first
        count, first = count + len(errors), [*first, *errors[:SHOWN]][:SHOWN]
        add_errors(errors, opened)

    columns = _filled(table, rules.needed, results, add, trusted, ranks)
    check_broken_share(first, count, len(table), rules.max_broken)
    small = too_small(columns["height"], columns["width"], settings.min_side)
    skipped = tuple(columns[name][small] for name in ("row", *SIZE))
    if small.any():
        columns = {name: values[~small] for name, values in columns.items()}
    is_val, is_train = _splits(table, columns["row"], rules.num_val_files, one_name_per_file)
    if not is_train.any():
        raise DataError("no rows are left to train on; is the `split` column `val` or `test` throughout?")
    notes = []
    if not rules.sizes:
        probed = [[m["height"], m["width"]] for m in _some_images(table, columns, results, trusted) if "error" not in m]
        notes += upscaled_notes(columns["height"], columns["width"], probed, settings)
    if small.any():
        notes.append(f"skipped: {plural(small.sum(), 'file')} smaller than data.min_side={settings.min_side}")
    train, val = (np.flatnonzero(rows).astype(np.int32) for rows in (is_train, is_val))
    return Choice(columns, train, val, skipped, notes)


def pieces(table: FileTable, needed: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the rows without an error, and which of them lack a number or are a part of their file."""
    for piece in _chunks(np.arange(len(table))):
        sound = piece[table.missing("error", piece)]
        lacking = [np.isnan(table.numbers(name, sound)) for name in needed]
        yield sound, np.logical_or.reduce([*lacking, *(~np.isnan(table.numbers(name, sound)) for name in SEGMENT)])
        table.base.release()


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK))


def _filled(
    table: FileTable,
    needed: Sequence[str],
    results: ProbeResults | None,
    add_errors: Callable[[Pairs, bool], None],
    trusted: bool,
    ranks: Ranks | None,
) -> dict[str, np.ndarray]:
    """Choice.columns of the usable rows."""
    count, place = len(table), 0
    columns: dict[str, np.ndarray] = {"row": np.empty(count, np.int32), "facts": np.empty(count, np.int64)}
    columns |= {name: np.full(count, np.nan, np.float32) for name in NUMBERS}
    columns["probed"] = np.zeros(count, bool)
    for piece in _chunks(np.arange(count)):
        add_errors(invalid_rows(table.to_pandas(piece[~table.missing("error", piece)])), False)
    for piece, unknown in pieces(table, needed):
        complete = piece[~unknown]
        found = {"row": complete, "facts": table.numbers("facts", complete), "probed": np.zeros(len(complete), bool)}
        found |= {name: table.numbers(name, complete) for name in NUMBERS}
        if unknown.any():
            rows = with_labels(table, piece[unknown]).assign(place=piece[unknown])
            rows, unread = fill_metadata(rows, needed, results, trusted, ranks)
            rows, outside = count_frames(rows)
            add_errors(unread, True)
            add_errors(outside, False)
            new = {"row": rows["place"].to_numpy(), "facts": fact_hashes(rows), "probed": np.ones(len(rows), bool)}
            new |= {name: rows[name].to_numpy(dtype=float) for name in NUMBERS}
            order = np.argsort(np.concatenate([complete, new["row"]]), kind="stable")
            found = {name: np.concatenate([found[name], new[name]])[order] for name in found}
        for name, values in found.items():
            if name in NUMBERS and compact(values).dtype == np.float64:
                columns[name] = columns[name].astype(np.float64, copy=False)
            columns[name][place : place + len(values)] = values
        place += len(found["row"])
    return {name: values[:place] for name, values in columns.items()}


def _splits(
    table: FileTable, rows: np.ndarray, num_val_files: int, one_name_per_file: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are held out, and which are trained on."""
    if "file" in table.base.table.column_names:
        hashes = table.numbers("file", rows)
    elif not table.missing("split", rows).all():
        return table.equals("split", "val", rows), table.equals("split", "train", rows)
    else:
        hashes = [np.array([seed_of(name) for name in table.names(part)], np.int64) for part in _chunks(rows)]
        hashes = np.concatenate([np.empty(0, np.int64), *hashes])
    if not one_name_per_file and len(rows):
        files = np.concatenate([path_hashes(table.paths(part)) for part in _chunks(rows)])
        hashes = equal_in_a_file(table, rows, hashes, files)
    is_val = is_held_out(hashes, num_val_files)
    return is_val, ~is_val


def _some_images(
    table: FileTable, columns: dict[str, np.ndarray], results: ProbeResults | None, trusted: bool
) -> list[dict]:
    """Metadata of up to PROBED_IMAGES images without a size, evenly spaced. Videos are not opened for this."""
    unknown = columns["row"][np.isnan(columns["height"]) | np.isnan(columns["width"])]
    images = [part[np.fromiter(map(is_image, table.paths(part)), bool, len(part))] for part in _chunks(unknown)]
    rows = np.concatenate([np.empty(0, np.int32), *images])
    chosen = table.paths(rows[evenly_spaced(len(rows), PROBED_IMAGES)])
    return list(probe(chosen, results, trusted).values()) if chosen else []


def skipped_files(table: FileTable, choice: Choice, min_side: int | None) -> Iterator[Pairs]:
    """(path, reason) of files that are too small, piece by piece."""
    rows, heights, widths = choice.skipped
    for part in _chunks(np.arange(len(rows))):
        sizes = zip(heights[part], widths[part], strict=True)
        reasons = [f"is {height:.0f}x{width:.0f}: skipped, because data.min_side={min_side}" for height, width in sizes]
        yield list(zip(table.paths(rows[part]), reasons, strict=True))


def clip_lengths(table: pd.DataFrame | FileTable, settings: ClipSettings) -> np.ndarray:
    """[rows] frames of the longest clip of each row."""
    table = as_file_table(table)
    stored = table.stored("length", settings)
    return settings.length(table.numbers("num_frames"), table.numbers("fps")) if stored is None else stored


def check_broken_share(first: Sequence[tuple[str, str]], count: int, rows: int, max_broken: float) -> None:
    """Raises DataError if `count` of the rows, such as (path, reason) in `first`, are more than the share, or all."""
    too_many = count > max_broken * rows
    if too_many or count == rows > 0:
        shown = "\n".join(f"  {path}: {reason}" for path, reason in first[:SHOWN])
        missing = all(reason == NO_SUCH_FILE for _, reason in first[:SHOWN])
        hint = "; relative paths are relative to `root` of the source, by default the table's folder" if missing else ""
        raise DataError(
            f"{count} of {rows} files cannot be read{f', more than data.max_broken={max_broken}' if too_many else ''}; "
            "the first:\n"
            f"{shown}\n  vae3d check-data FILE lists them all{hint}"
        )


def too_small(height: np.ndarray, width: np.ndarray, min_side: int | None) -> np.ndarray:
    """[rows] whether a file's shorter side is below `min_side`; None keeps every file. All sizes must be known.

    Raises DataError if no file is left.
    """
    if min_side is None or not len(height):
        return np.zeros(len(height), dtype=bool)
    shorter = np.minimum(height, width)
    small = shorter < min_side
    if small.all():
        raise DataError(
            f"no file has a shorter side of data.min_side={min_side} pixels; the largest has {shorter.max():.0f}"
        )
    return small


def upscaled_notes(
    height: np.ndarray, width: np.ndarray, probed: Sequence[Sequence[float]], settings: ClipSettings
) -> list[str]:
    """A line with the number of files that must be enlarged to fill a clip; none if there are none.

    height, width: of all rows; NaN: unknown. probed: [height, width] of some of the files of these.
    """
    some = np.array(probed, dtype=float).reshape(-1, 2)
    known = int((~np.isnan(height) & ~np.isnan(width)).sum()) + len(some)
    small = sum(int(_enlarged(h, w, settings).sum()) for h, w in ((height, width), some.T))
    if not small:
        return []
    needed = f"{settings.height}x{settings.width}"
    if settings.short_side is not None:
        needed += f" or data.short_side={settings.short_side}"
    total = f"{known} files" if known == len(height) else f"{known} files (of {len(height)})"
    return [f"{small} of {total} are smaller than {needed} and are enlarged; data.min_side skips such files"]


def _enlarged(height: np.ndarray, width: np.ndarray, settings: ClipSettings) -> np.ndarray:
    """[rows] whether a file is smaller than a clip; False where its size is unknown."""
    small = (height < settings.height) | (width < settings.width)
    small |= np.minimum(height, width) < (settings.short_side or 0)
    return small & ~np.isnan(height) & ~np.isnan(width)


def evenly_spaced(count: int, chosen: int) -> np.ndarray:
    """Indices below `count`, `chosen` of them if there are so many."""
    return np.unique(np.linspace(0, count - 1, min(chosen, count)).astype(int))


def is_held_out(hashes: np.ndarray, num_val_files: int) -> np.ndarray:
    """[rows] whether a row is held out: of the files with the lowest hashes, at most a tenth of all, and at least one
    if there are two. hashes: of names, equal for all rows of a file."""
    files = np.unique(hashes)
    lowest = files[: min(num_val_files, max(1, len(files) // 10))]
    return np.isin(hashes, lowest) & (len(files) > 1)

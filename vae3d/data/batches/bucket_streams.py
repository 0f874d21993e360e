"""The streams of a source with buckets, one for each bucket, and what is logged about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts, Interleaved, Schedule
from vae3d.data.batches.buckets import Bucket, relative_costs, rows_of, share_kept, uneven, with_batches, with_weights
from vae3d.data.batches.clips import ClipSettings, Stream
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.media import DataError, Size
from vae3d.data.table.file_table import FileTable, as_file_table, sizes_of
from vae3d.seeding import seed_of
from vae3d.text import plural


@dataclass(frozen=True)
class SourceStreams:
    """The streams of one source, and how they follow each other.

    notes, warnings: lines for the log. skipped_files: (path, reason) of rows that fit no bucket.
    """

    streams: list[Stream]
    schedule: Schedule
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped_files: list[tuple[str, str]] = field(default_factory=list)


def bucket_streams(
    table: pd.DataFrame | FileTable,
    settings: ClipSettings,
    buckets: Sequence[Bucket],
    reference: Bucket,
    divisor: int,
    make_schedule: Callable[..., BatchSchedule],
    seed: int,
    source: str = "",
    overfit: bool = False,
) -> SourceStreams:
    """A stream for each bucket that a row of the table fits.

    reference: with the clips per step of its shape. divisor: of all clips per step. make_schedule: BatchSchedule, with
    the arguments that are the same for all buckets. overfit: repeat the first step.
    Raises DataError if no row fits any bucket.
    """
    table = as_file_table(table)
    heights, widths = sizes_of(table)
    lengths = clip_lengths(table, settings)
    fitting = rows_of(buckets, heights, widths, lengths)
    skipped = np.setdiff1d(np.arange(len(table)), np.concatenate(fitting))
    shortest = min(bucket.frames for bucket in buckets)
    if len(skipped) == len(table):
        raise DataError(
            f"no file fits a bucket: the shortest has {plural(shortest, 'frame')}, and no training file gives more "
            f"than {lengths.max(initial=0)}; give data.buckets fewer frames"
        )
    empty = [bucket.name for bucket, rows in zip(buckets, fitting, strict=True) if not len(rows)]
    buckets = [bucket for bucket, rows in zip(buckets, fitting, strict=True) if len(rows)]
    fitting = [rows for rows in fitting if len(rows)]
    buckets = with_weights(with_batches(buckets, reference, divisor), [len(rows) for rows in fitting])
    streams = [
        Stream(
            table,
            make_schedule(
                lengths[rows],
                FrameCounts(b.frames, b.frames),
                batch_size=b.batch_size,
                seed=seed_of(seed, "bucket", b.name),
                overfit=False,
                rows=rows,
            ),
            replace(settings, height=b.height, width=b.width),
            source,
            b,
        )
        for b, rows in zip(buckets, fitting, strict=True)
    ]
    schedule = Interleaved([stream.schedule for stream in streams], [b.weight for b in buckets], seed, overfit)
    notes = _notes(table, streams, empty, skipped)
    reasons = [f"has {plural(int(lengths[row]), 'frame')}, and no bucket has fewer than {shortest}" for row in skipped]
    skipped_files = list(zip(table.paths(skipped), reasons, strict=True))
    return SourceStreams(streams, schedule, notes, uneven(buckets, schedule.shares(), divisor), skipped_files)


def _notes(table: FileTable, streams: Sequence[Stream], empty: Sequence[str], skipped: np.ndarray) -> list[str]:
    """Lines for the log. empty: names of buckets without files. skipped: rows in no bucket."""
    notes = []
    if empty:
        notes.append(f"left out: {plural(len(empty), 'bucket')} that no file fits: {', '.join(empty)}")
    heights, widths = sizes_of(table)
    enlarged = np.zeros(len(table), bool)
    for bucket, rows in ((stream.bucket, stream.schedule.rows) for stream in streams):
        enlarged[rows] |= (heights[rows] < bucket.height) | (widths[rows] < bucket.width)
    if enlarged.any():
        small = f"{int(enlarged.sum())} of {plural(len(table), 'file')}"
        notes.append(f"{small} are smaller than a bucket of theirs and are enlarged; data.min_side skips such files")
    if len(skipped):
        files = plural(len(skipped), "file")
        notes.append(f"skipped: {files} that fit no bucket, such as {table.path(int(skipped[0]))}")
    return notes


def bucket_rows(streams: Sequence[Stream], shares: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table of a source's buckets. shares: of all steps. cost: over the mean of its steps."""
    costs = relative_costs([stream.bucket for stream in streams], shares)
    cells = []
    for stream, share, cost in zip(streams, shares, costs, strict=True):
        rows = stream.schedule.rows
        cells.append(
            [
                stream.bucket.name,
                str(stream.schedule.batch_size),
                f"{cost:.2f}",
                str(len(rows)),
                f"{100 * share:.1f} %",
                f"{100 * _kept(stream, stream.bucket.size):.1f} %",
            ]
        )
    return ["bucket", "clips", "cost", "files", "steps", "pixels kept"], cells


def pixels_kept(streams: Sequence[Stream], shares: Sequence[float], size: Size) -> tuple[float, float]:
    """Mean share of pixels that the clips of a source's buckets keep, and that they would keep at one `size`. shares:
    of all steps."""
    clips = [stream.schedule.batch_size * share for stream, share in zip(streams, shares, strict=True)]
    in_bucket = [_kept(stream, stream.bucket.size) for stream in streams]
    in_one = [_kept(stream, size) for stream in streams]
    return float(np.average(in_bucket, weights=clips)), float(np.average(in_one, weights=clips))


def _kept(stream: Stream, size: Size) -> float:
    """Mean share of the pixels of a bucket's files that stay at a size."""
    heights, widths = sizes_of(stream.table)
    rows = stream.schedule.rows
    return float(share_kept(widths[rows] / heights[rows], size).mean())

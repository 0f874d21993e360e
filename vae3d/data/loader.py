"""From a source to batches: read the table, hold videos out, and load clips with worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from vae3d.data.batch_schedule import BatchSchedule, ClipIndex, MicroBatchSampler
from vae3d.data.clips import ClipDataset, ClipSettings, Unreadable, collate, open_frames, read_clip, to_sample
from vae3d.data.fingerprint import DataFingerprint
from vae3d.data.media import MediaError
from vae3d.data.probe import fill_metadata, invalid_rows
from vae3d.data.resolution import SIZE, leave_out_small, warn_upscaled
from vae3d.data.segments import Bounds, bounds_of, count_frames
from vae3d.data.sources import DataError, Source, exists, file_hashes, in_threads
from vae3d.data.workers import WorkerDied as WorkerDied
from vae3d.data.workers import WorkerError as WorkerError
from vae3d.data.workers import WorkerTimeout as WorkerTimeout
from vae3d.data.workers import load
from vae3d.types import Clip

SHOWN = 10  # files in a message


@dataclass(frozen=True)
class Tables:
    """Readable files for training and validation. errors: (path, reason) of files that did not open. skipped_files: of files
    that are too small. notes: what there is to tell of the files."""

    train: pd.DataFrame
    val: pd.DataFrame
    errors: list[tuple[str, str]]
    skipped_files: list[tuple[str, str]]
    notes: list[str]


def read_tables(source: Source, settings: ClipSettings, num_val_files: int, max_broken: float) -> Tables:
    """List a source's files and set some aside for validation.

    With a `split` column its `val` rows; without, the `num_val_files` files whose names hash lowest, but at most a
    tenth (and one), with all their segments, so that the choice survives a table that grows or a folder that moves.
    The num_frames of a row with a segment are the segment's. Files smaller than settings.min_side are left out, and are
    no error.
    Raises DataError if more than the share `max_broken` does not open, or nothing is left to train on.
    """
    listed = source.table()
    needed = ["num_frames"] + ["fps"] * (settings.fps is not None) + SIZE * (settings.min_side is not None)
    table, errors = fill_metadata(listed, needed)
    table, outside = count_frames(table)
    errors += outside
    _check_share(errors, len(listed), max_broken)
    table, skipped_files = leave_out_small(table, settings.min_side)
    notes = [*getattr(source, "notes", ()), *warn_upscaled(table, settings)]
    if skipped_files:
        notes.append(f"{len(skipped_files)} files are smaller than data.min_side={settings.min_side}, and left out")
    if table["split"].notna().any():
        is_val = (table["split"] == "val").to_numpy()
        is_train = (table["split"] == "train").to_numpy()
    else:
        hashes = file_hashes(table)
        files = np.unique(hashes)
        is_val = np.isin(hashes, files[: min(num_val_files, max(1, len(files) // 10))]) & (len(files) > 1)
        is_train = ~is_val
    if not is_train.any():
        raise DataError("no rows are left to train on; is the `split` column `val` or `test` throughout?")
    train, val = (table[rows].reset_index(drop=True) for rows in (is_train, is_val))
    return Tables(train, val, errors, skipped_files, notes)


def check_files_exist(source: Source, max_broken: float) -> list[str]:
    """List a source's files, and check that they exist, without opening any. Returns lines for the log.

    Raises DataError if more than the share `max_broken` is missing or invalid.
    """
    table = source.table()
    sound = table[table["error"].isna()]
    there = in_threads(exists, sound["path"])
    errors = invalid_rows(table) + [(path, "no such file") for path in sound["path"] if not there[path]]
    _check_share(errors, len(table), max_broken)
    count = sum(there.values())
    return [
        f"data: {len(table)} rows, {count} of {len(there)} files exist"
        + (f", {invalid} rows are invalid" if (invalid := len(table) - len(sound)) else ""),
        *(f"  {path}: {reason}" for path, reason in errors[:SHOWN]),
        *(f"  {note}" for note in getattr(source, "notes", ())),
    ]


def _check_share(errors: list[tuple[str, str]], rows: int, max_broken: float) -> None:
    if len(errors) > max_broken * rows:
        shown = "\n".join(f"  {path}: {reason}" for path, reason in errors[:SHOWN])
        raise DataError(
            f"{len(errors)} of {rows} files cannot be read, more than data.max_broken={max_broken}; the first:\n"
            f"{shown}\n  python -m vae3d.data.check FILE lists them all"
        )


def clip_lengths(table: pd.DataFrame, settings: ClipSettings) -> np.ndarray:
    """[rows] frames that each row can give."""
    return settings.length(table["num_frames"].to_numpy(), table["fps"].to_numpy())


@dataclass(frozen=True)
class TrainingData:
    """Everything that training reads: the clips of any range of steps, and the held-out clips of this rank."""

    table: pd.DataFrame
    schedule: BatchSchedule
    settings: ClipSettings
    workers: int
    prefetch: int
    held_out: list[Clip]
    errors: list[tuple[str, str]]  # files that did not open when the tables were read
    notes: list[str] = field(default_factory=list)  # what there is to tell of the files
    skipped_files: list[tuple[str, str]] = field(default_factory=list)  # files that are too small
    timeout: float = 0.0  # seconds without a batch after which WorkerTimeout is raised; 0: never
    fingerprint: DataFingerprint | None = None  # what a checkpoint remembers of the data

    def clips(self, first: int, last: int, stopping: Callable[[], bool] = lambda: False) -> Iterator[Clip | Unreadable]:
        """Micro-batches of optimizer steps first..last-1; Unreadable where one file after another could not be read.

        stopping: whether the run is to end after this step. Raises as workers.load does.
        """
        settings, schedule = self.settings, self.schedule
        pixels = 3 * schedule.frames.all()[-1] * settings.height * settings.width
        return load(
            ClipDataset(self.table, schedule, settings),
            workers=self.workers,
            prefetch=self.prefetch,
            timeout=self.timeout,
            stopping=stopping,
            item_bytes=schedule.micro_batch * pixels * (1 if settings.depth is None else 4),
            held=schedule.accumulate,
            batch_sampler=MicroBatchSampler(schedule, first, last),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )


def validation_clips(
    table: pd.DataFrame, settings: ClipSettings, frames: int, count: int, rank: int = 0, world_size: int = 1
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """This rank's share of the first `count` held-out videos that have `frames` frames, and files that failed.

    One clip each, always the same, from the middle of the video (or over all of it, as data.sampling says) and the
    centre of the picture, neither mirrored nor rolled.
    Raises DataError if no video is long enough.
    """
    long_enough = table[clip_lengths(table, settings) >= frames]
    if long_enough.empty:
        raise DataError(
            f"no held-out video has {frames} frames for validation ({len(table)} are held out); "
            "lower validation.frames, give the table a `split` column, or set validation.every=0"
        )
    clips, errors, bounds = [], [], bounds_of(long_enough)
    for place in range(rank, min(count, len(long_enough)), world_size):
        path = long_enough["path"].iloc[place]
        try:
            clips.append(validation_clip(path, bounds[place], place, settings, frames))
        except MediaError as error:
            errors.append((error.path, error.reason))
    return clips, errors


def validation_clip(path: str, bounds: Bounds, place: int, settings: ClipSettings, frames: int) -> Clip:
    """The clip of a file that is always the same, as validation_clips says, at position `place`. Raises MediaError."""
    with closing(open_frames(path, settings, bounds)) as reader:
        pixels = read_clip(reader, path, settings, frames, start=0.5)
    return collate([to_sample(pixels, ClipIndex(place, place, frames), path, settings)])

"""From a source to batches: read the table, choose the files that are held out, load clips with worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vae3d.data.batches.batch_schedule import Schedule
from vae3d.data.batches.clips import (
    ClipSettings,
    MixedClips,
    StepShapes,
    Stream,
    Unreadable,
    collate,
)
from vae3d.data.batches.held_out import HeldOutFiles
from vae3d.data.batches.selection import SHOWN, Pairs, Rules, check_broken_share, choose, skipped_files
from vae3d.data.prepared.rows import results_of
from vae3d.data.prepared.selection import select
from vae3d.data.prepared.table import find_large, prepare
from vae3d.data.sources.open_source import Source
from vae3d.data.table.file_table import ArrowMemory, FileTable
from vae3d.data.table.fingerprint import Fingerprint, SourceFingerprints, fingerprint_of
from vae3d.data.table.probe import Ranks
from vae3d.data.table.row_arrays import table_in_memory
from vae3d.data.table.rows import invalid_rows, mark_missing_files
from vae3d.data.workers import load
from vae3d.distributed import is_distributed
from vae3d.text import plural
from vae3d.types import ClipBatch


@dataclass(frozen=True)
class Tables:
    """Readable files for training and validation.

    errors: (path, reason) of files that do not open. skipped_files: (path, reason) of files that are too small; of a
    large table the first ones. notes: lines for the log. fingerprint: of all these files, training first.
    """

    train: FileTable
    val: FileTable
    errors: list[tuple[str, str]]
    skipped_files: list[tuple[str, str]]
    notes: list[str]
    fingerprint: Fingerprint


def read_tables(
    source: Source,
    settings: ClipSettings,
    num_val_files: int,
    max_broken: float,
    rank: int = 0,
    world_size: int = 1,
    stat_files: bool = False,
    sizes: bool = False,
) -> Tables:
    """List a source's files and hold some out for validation.

    With a `split` column: its `val` rows. Without: the `num_val_files` files whose names have the lowest hashes, at
    most a tenth (and at least one), with all their parts; so the choice stays when the table grows or moves.
    num_frames of a row with start or end becomes that of the part. Files below settings.min_side are skipped, and are
    no errors. A source of more than prepared.LARGE rows is prepared once, and then only mapped into memory.
    sizes: heights and widths of all files are needed.
    rank, world_size: ranks that call this at the same time share the files that must be opened. stat_files: the
    fingerprint has size and time of the files; of a large table, always as they were when they were probed.
    Raises DataError if more than the share `max_broken` does not open, or nothing is left to train on.
    """
    rules = Rules(settings, num_val_files, max_broken, sizes)
    ranks = Ranks(rank, world_size) if is_distributed() else Ranks()
    large, listing = find_large(source, ranks)
    if large is not None:
        chosen = select(large, prepare(large), rules, ranks)
        notes = [*getattr(source, "notes", ()), *chosen.notes]
        return Tables(chosen.train, chosen.val, chosen.errors, chosen.skipped, notes, chosen.fingerprint)
    table = table_in_memory(source.table() if listing is None else listing.table())
    errors: Pairs = []
    choice = choose(table, rules, results_of(source), lambda found, _: errors.extend(found), ranks=ranks)
    skipped = [pair for part in skipped_files(table, choice, settings.min_side) for pair in part]
    notes = [*getattr(source, "notes", ()), *choice.notes]
    train, val = (
        FileTable(table.base, ArrowMemory(choice.view(rows, settings))) for rows in (choice.train, choice.val)
    )
    chosen = np.concatenate([choice.train, choice.val])
    table = table.select(choice.columns["row"][chosen])
    fingerprint = fingerprint_of(table, choice.columns["facts"][chosen], stat_files)
    return Tables(train, val, errors, skipped, notes, fingerprint)


def check_files_exist(source: Source, max_broken: float) -> list[str]:
    """Check that a source's files exist, without opening any. Returns lines for the log.

    Raises DataError if more than the share `max_broken` is missing or invalid.
    """
    table = source.table()
    valid = table["error"].isna()
    mark_missing_files(table)
    errors = invalid_rows(table)
    check_broken_share(errors, len(errors), len(table), max_broken)
    files = table[valid].drop_duplicates("path")["error"]
    lines = [f"data: {plural(len(table), 'row')}, {files.isna().sum()} of {len(files)} files exist"]
    if not valid.all():
        lines[0] += f", {plural((~valid).sum(), 'invalid row')}"
    return lines + [f"  {path}: {reason}" for path, reason in errors[:SHOWN]]


def schedule_notes(schedule: Schedule) -> list[str]:
    """What data.clips_per_file means for epochs and batches; nothing for 1."""
    clips = schedule.leaves[0].clips_per_file
    if clips == 1:
        return []
    notes = [f"data.clips_per_file={clips}: an epoch has {plural(clips, 'clip')} of each file, one after the other"]
    if uneven := [leaf.micro_batch for leaf in schedule.leaves if leaf.micro_batch % clips]:
        batch = plural(uneven[0], "clip")
        notes.append(f"  it does not divide a batch of {batch}: some files are opened for two batches")
    return notes


@dataclass(frozen=True)
class TrainingData(StepShapes):
    """The data of a training run: clips of any range of steps, and this rank's held-out clips.

    streams: by their number in the schedule. val_groups: groups of each held-out clip of all ranks, by its position.
    held_out_files: those from which the held-out clips are taken, and all others; on the first rank alone.
    """

    streams: Sequence[Stream]
    schedule: Schedule
    workers: int
    prefetch: int
    held_out: list[ClipBatch]
    errors: list[tuple[str, str]]  # (path, reason) of files that did not open when the table was read
    notes: list[str] = field(default_factory=list)  # lines for the log
    skipped_files: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of files that are not used
    timeout: float = 0.0  # seconds without a batch until WorkerError; 0: never
    fingerprint: Fingerprint | SourceFingerprints | None = None  # saved with checkpoints
    val_groups: Sequence[tuple[str, ...]] = ()
    held_out_files: Sequence[HeldOutFiles] = ()
    warnings: list[str] = field(default_factory=list)  # lines for the log

    def clips(
        self, first: int, last: int, stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[ClipBatch | Unreadable]:
        """Micro-batches of the optimizer steps first, ..., last - 1.

        stopping: whether the run ends after the current step. Raises as workers.load does.
        """
        schedule, dataset = self.schedule, MixedClips(self.streams)
        return load(
            dataset,
            workers=self.workers,
            prefetch=self.prefetch,
            timeout=self.timeout,
            stopping=stopping,
            item_bytes=self.item_bytes,
            held=schedule.accumulate,
            spawn=dataset.decodes_on_gpu,
            batch_sampler=schedule.micro_batches(first, last),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

"""The data of a training run: from configuration to streams of clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vae3d.config.sources import sources_of
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts, Interleaved, Schedule
from vae3d.data.batches.bucket_streams import SourceStreams, bucket_streams
from vae3d.data.batches.buckets import Bucket, buckets_of
from vae3d.data.batches.clips import ClipSettings, Stream
from vae3d.data.batches.held_out import HeldOut, held_out_files, held_out_of, in_turn, read_held_out, require_held_out
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.batches.streaming import (
    StreamingData,
    StreamingSchedule,
    StreamingSource,
    first_clips,
    is_streaming,
    stream_notes,
)
from vae3d.data.decoding.depth import DepthSettings
from vae3d.data.decoding.readers import check_reader
from vae3d.data.loader import Tables, TrainingData, read_tables, schedule_notes
from vae3d.data.media import DataError
from vae3d.data.table.file_table import FileTable, sizes_of
from vae3d.data.table.fingerprint import Fingerprint, SourceFingerprints
from vae3d.data.workers import usable_workers
from vae3d.loading import instantiate
from vae3d.seeding import seed_of
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import Data, TrainConfig


def frame_counts(config: Data) -> FrameCounts:
    frames = config.frames
    return FrameCounts(frames.min, frames.max, frames.step, frames.images, frames.fit)


def clip_sizes(config: Data) -> list[tuple[int, int, int]]:
    """Frames, height and width of all clips, ascending; with data.buckets.aspects=auto of square ones, since the data's
    aspect ratios are not known yet."""
    counts, size = frame_counts(config).all(), (config.height, config.width)
    if config.buckets is None:
        return [(count, *size) for count in counts]
    return sorted((b.frames, *b.size) for b in buckets_of(config.buckets, counts, size))


def pixel_channels(model: Mapping[str, Any]) -> int:
    """Channels of the pixels of a configured model, of its 2D VAE if it has one."""
    return model.get("spatial", model).get("pixel_channels", 3)


def build_clip_settings(config: Data, channels: int = 3) -> ClipSettings:
    """channels: that the model takes; see pixel_channels."""
    shared = {field.name for field in fields(ClipSettings)} - {"depth", "channels"}
    depth = DepthSettings(**vars(config.depth)) if config.depth.mapping else None
    return ClipSettings(**{name: getattr(config, name) for name in shared}, depth=depth, channels=channels)


def build_schedule(
    config: TrainConfig | DiffusionConfig,
    lengths: np.ndarray,
    frames: FrameCounts,
    rank: int,
    world_size: int,
    **changes: Any,
) -> BatchSchedule:
    """changes: arguments of BatchSchedule that are not those of `config`."""
    settings = {
        "seed": config.run.seed,
        "batch_size": config.data.batch_size,
        "accumulate": config.trainer.accumulate,
        "rank": rank,
        "world_size": world_size,
        "overfit": config.data.overfit,
        "clips_per_file": config.data.clips_per_file,
    }
    return BatchSchedule(lengths, frames, **settings | changes)


def build_streams(
    config: TrainConfig | DiffusionConfig,
    name: str,
    own: Data,
    table: FileTable,
    settings: ClipSettings,
    rank: int,
    world_size: int,
) -> SourceStreams:
    """The streams of a source. name: empty for the only one. own: its settings. table: its training files.

    Raises DataError if no file has enough frames.
    """
    seed = seed_of(config.run.seed, "source", name) if name else config.run.seed
    overfit = config.data.overfit and not name  # of a mixture the whole schedule does
    make = partial(build_schedule, config, rank=rank, world_size=world_size, clips_per_file=own.clips_per_file)
    counts = frame_counts(own)
    if own.buckets is None:
        schedule = make(
            clip_lengths(table, settings),
            counts,
            by_length=table.stored("by_length"),
            batch_size=own.batch_size,
            seed=seed,
            overfit=overfit,
        )
        return SourceStreams([Stream(table, schedule, settings, name)], schedule)
    size = (own.height, own.width)
    return bucket_streams(
        table,
        settings,
        buckets_of(own.buckets, counts.all(), size, *sizes_of(table)),
        reference=Bucket(own.frames.max, *size, own.batch_size),
        divisor=own.buckets.clips_multiple or world_size * config.trainer.accumulate,
        make_schedule=make,
        seed=seed,
        source=name,
        overfit=overfit,
    )


@dataclass(frozen=True)
class SourceData:
    """What was read of a source. name: empty for the only one. own: its settings. settings: how its clips are cut, but
    for the sizes of buckets, which its streams have. training: the streams of its training files."""

    name: str
    own: Data
    settings: ClipSettings
    tables: Tables
    training: SourceStreams

    def lines(self, of: Iterable[str]) -> list[str]:
        """With the source's name in front."""
        return [f"{self.name}: {line}" if self.name else line for line in of]

    def reasons(self, of: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(path, reason) with the source's name in front of the reason."""
        return [(path, self.lines([reason])[0]) for path, reason in of]


def read_sources(
    config: TrainConfig | DiffusionConfig, channels: int, rank: int, world_size: int
) -> tuple[list[SourceData], Schedule, Fingerprint | SourceFingerprints]:
    """Read the tables of all sources, and say in which order training takes their clips. channels: of the model.

    Raises DataError, with the name of the source.
    """
    data, sources = config.data, []
    for name, own in sources_of(data).items():
        settings, bucketed = build_clip_settings(own, channels), own.buckets is not None
        with naming_source(name):
            held_out = own.num_val_files if config.validation.every else 0
            check_reader(own.reader)
            source = instantiate(own.source, "data.source")
            if is_streaming(source):
                raise DataError("a stream has no table: set streaming=false, or train an autoencoder on it alone")
            tables = read_tables(
                source, settings, held_out, own.max_broken, rank, world_size, stat_files=rank == 0, sizes=bucketed
            )
            training = build_streams(config, name, own, tables.train, settings, rank, world_size)
        sources.append(SourceData(name, own, settings, tables, training))
    schedule = sources[0].training.schedule
    if data.sources:
        weights = [data.sources[source.name].weight for source in sources]
        schedule = Interleaved([source.training.schedule for source in sources], weights, config.run.seed, data.overfit)
    fingerprints = {source.name: source.tables.fingerprint for source in sources}
    return sources, schedule, SourceFingerprints(fingerprints) if data.sources else fingerprints[""]


def build_training_data(config: TrainConfig, rank: int, world_size: int) -> TrainingData | StreamingData:
    """Read the tables of all sources and this rank's held-out clips. Raises DataError, with the name of the source."""
    data, validation = config.data, config.validation
    if not data.sources and is_streaming(source := instantiate(data.source, "data.source")):
        return build_streaming_data(config, source, rank, world_size)
    sources, schedule, fingerprint = read_sources(config, pixel_channels(config.model), rank, world_size)
    notes, errors, skipped_files, warnings = [], [], [], []
    possible: list[list[HeldOut]] = []
    for source in sources:
        tables, training = source.tables, source.training
        notes += source.lines([*tables.notes, *training.notes, *schedule_notes(training.schedule)])
        errors += source.reasons(tables.errors)
        skipped_files += source.reasons([*tables.skipped_files, *training.skipped_files])
        warnings += source.lines(training.warnings)
        if validation.every:
            buckets = None if source.own.buckets is None else [stream.bucket for stream in training.streams]
            clips = held_out_of(tables.val, source.settings, validation.frames, validation.clips, source.name, buckets)
            possible.append(clips)
            if source.name and not clips:
                notes.append(
                    f"{source.name}: is not validated, since no held-out file has validation.frames={validation.frames}"
                )
    chosen = in_turn(possible, validation.clips)
    held_out: list[ClipBatch] = []
    if validation.every:
        require_held_out(chosen, validation.frames, sum(len(source.tables.val) for source in sources))
        held_out, more = read_held_out(chosen, rank, world_size)
        errors += more
    workers, note = usable_workers(data.workers)
    return TrainingData(
        streams=[stream for source in sources for stream in source.training.streams],
        schedule=schedule,
        workers=workers,
        prefetch=data.prefetch,
        held_out=held_out,
        errors=errors,
        notes=[*notes, *note],
        skipped_files=skipped_files,
        timeout=data.timeout,
        fingerprint=fingerprint,
        val_groups=[clip.groups for clip in chosen],
        held_out_files=held_out_files([(s.name, s.tables.val, s.settings) for s in sources], validation.frames)
        if rank == 0
        else (),
        warnings=warnings,
    )


def build_streaming_data(config: TrainConfig, source: StreamingSource, rank: int, world_size: int) -> StreamingData:
    """The data of a source that is read as a stream. Raises DataError if it cannot be read or has no rows for
    validation, and for settings that need a table."""
    data, validation = config.data, config.validation
    check_reader(data.reader)
    settings = build_clip_settings(data, pixel_channels(config.model))
    if data.buckets is not None:
        raise DataError("data.buckets needs the sizes of all files: set data.source.streaming=false")
    if data.clips_per_file > 1:
        raise DataError("data.clips_per_file needs random access to files: set data.source.streaming=false, or 1")
    if data.overfit:
        raise DataError("data.overfit repeats clips, which a stream cannot: set data.source.streaming=false")
    stream = source.stream("train")
    held_out, errors = [], []
    if validation.every:
        rows = source.stream("val")
        if rows is None:
            raise DataError(
                f"{stream.name}: a stream holds no rows out: name a split in data.source.val_split (for shards, others "
                "in data.source.val_path), or set validation.every=0"
            )
        held_out, errors = first_clips(rows, settings, validation.frames, validation.clips, rank, world_size)
    workers, note = usable_workers(data.workers)
    schedule = StreamingSchedule(
        frame_counts(data), config.run.seed, data.batch_size, config.trainer.accumulate, rank, world_size
    )
    notes = [*stream_notes(stream, source.shuffle, world_size * max(1, workers)), *note]
    return StreamingData(
        stream=stream,
        schedule=schedule,
        settings=settings,
        shuffle=source.shuffle,
        workers=workers,
        prefetch=data.prefetch,
        held_out=held_out,
        errors=errors,
        notes=notes,
        timeout=data.timeout,
    )


@contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Put the name of a source in front of the messages of DataErrors; nothing if it is empty."""
    try:
        yield
    except DataError as error:
        if not name:
            raise
        raise DataError(f"data.sources.{name}: {error}") from error

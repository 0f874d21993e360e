"""The data of a diffusion model's training: from configuration to latents."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from vae3d.commands.training_data import SourceData, build_schedule, read_sources
from vae3d.data.batches.batch_schedule import ClipIndex, FrameCounts, Interleaved, Schedule
from vae3d.data.batches.buckets import Bucket, longest_buckets, with_batches, with_weights
from vae3d.data.batches.clips import MixedClips
from vae3d.data.batches.held_out import HeldOut, held_out_clip, held_out_of, in_turn, read_held_out, require_held_out
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.loader import Tables, schedule_notes
from vae3d.data.table.file_table import sizes_of
from vae3d.data.table.fingerprint import fingerprint_of_cache
from vae3d.data.workers import usable_workers
from vae3d.diffusion import data as diffusion_data
from vae3d.diffusion.data import Batch, CachedLatents, ClipSize, LatentData
from vae3d.latents.cache import NO_LABEL, LatentCache, SizeGroup, class_names
from vae3d.latents.clips import distinct_labels
from vae3d.latents.codec import LatentCodec
from vae3d.loading import require_file_channels
from vae3d.text import plural

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig, DiffusionValidation

log = logging.getLogger("vae3d")
SHOWN = 10  # sizes in a message


def build_latent_data(config: DiffusionConfig, codec: LatentCodec, rank: int, world_size: int) -> LatentData:
    """The latents to train on: of a cache, or of clips that are encoded batch by batch."""
    build = clip_data if config.cache is None else cache_data
    data, settings = build(config, codec, rank, world_size), config.data
    workers, note = usable_workers(settings.workers)
    notes = [*data.notes, *note]
    return replace(data, workers=workers, prefetch=settings.prefetch, timeout=settings.timeout, notes=notes)


def cache_data(config: DiffusionConfig, codec: LatentCodec, rank: int, world_size: int) -> LatentData:
    mode = None if config.vae.sample else "mean"
    cache = LatentCache(config.cache, codec, mode=mode, seed=config.run.seed, flips=config.data.flip)
    labelled = config.labels != "none"
    if labelled:
        given = np.array(cache.labels)
        first = cache.index["key"].iloc[int(np.argmax(given == NO_LABEL))]
        diffusion_data.require_labels(given, first, f"entries of {config.cache}")
    num_val_files = config.data.num_val_files if config.validation.every else 0
    train, held_out = diffusion_data.split_cache(cache.index, num_val_files)
    groups, validation = cache.sizes(train), config.validation
    counts = {group.size: len(group.entries) for group in groups}
    validated = diffusion_data.take_turns(held_out, (group.entries for group in cache.sizes(held_out)))
    validated = validated[: validation.clips if validation.every else 0]
    mine = list(enumerate(validated.tolist()))[rank::world_size]  # numbered as by clip_data, for the same noise
    every = CachedLatents(cache, range(len(cache)), labelled)
    if labelled and rank == 0:
        labels = np.array(cache.labels)
        diffusion_data.warn_of_untrained(cache.classes, labels[train].tolist(), labels[held_out].tolist())
    return LatentData(
        dataset=CachedLatents(cache, train, labelled),
        collate=diffusion_data.collate_latents,
        schedule=cache_schedule(config, groups, train, rank, world_size),
        rows=len(train),
        codec=codec,
        stream_sizes=[group.size[1:] for group in groups],
        stream_groups=[[Bucket(*group.size).name] if len(groups) > 1 else [] for group in groups],
        size=diffusion_data.choose_size(counts, validation.height, validation.width),
        classes=cache.classes if labelled else [],
        trained_classes=sorted({cache.labels[place] for place in train}) if labelled else [],
        held_out=[every[ClipIndex(number, place, 1)] for number, place in mine],
        held_out_sizes=diffusion_data.distinct_sizes(codec, (group.size for group in cache.sizes(validated))),
        fingerprint=fingerprint_of_cache(cache.index.iloc[[*train, *held_out]], cache.meta["digest"]),
        notes=[f"{config.cache}: {plural(len(train), 'latent')} to train on ({cache.mode}), {len(held_out)} held out"],
    )


def cache_schedule(
    config: DiffusionConfig, groups: Sequence[SizeGroup], train: np.ndarray, rank: int, world_size: int
) -> Schedule:
    """The training order of a cache: every entry equally often, and in each step latents of one size.

    train: indices of the entries to train on, ascending; the schedule's rows are places in it.
    """
    if len(groups) == 1:
        frames = groups[0].size[0]
        return build_schedule(config, np.full(len(train), frames), FrameCounts(frames, frames), rank, world_size)
    buckets = cache_buckets(config, groups, world_size * config.trainer.accumulate)
    small = [bucket for bucket, group in zip(buckets, groups, strict=True) if len(group.entries) < bucket.batch_size]
    if small and rank == 0:
        names = ", ".join(bucket.name for bucket in small[:SHOWN]) + (", ..." if len(small) > SHOWN else "")
        log.warning(
            "%s: %d of %s have fewer latents than a step takes, which repeats them: %s; lower data.batch_size, or "
            "encode with fewer sizes, by buckets",
            config.cache,
            len(small),
            plural(len(groups), "size"),
            names,
        )
    streams = [
        build_schedule(
            config,
            np.full(len(group.entries), bucket.frames),
            FrameCounts(bucket.frames, bucket.frames),
            rank,
            world_size,
            batch_size=bucket.batch_size,
            rows=np.searchsorted(train, group.entries),
            overfit=False,  # the whole schedule repeats its first step
        )
        for bucket, group in zip(buckets, groups, strict=True)
    ]
    return Interleaved(streams, [bucket.weight for bucket in buckets], config.run.seed, config.data.overfit)


def cache_buckets(config: DiffusionConfig, groups: Sequence[SizeGroup], divisor: int) -> list[Bucket]:
    """The sizes of a cache with clips per step and weights: data.batch_size of the largest latents, of smaller ones as
    many as have as many values, so that steps cost the same.

    divisor: of the clips per step, unless data.buckets.clips_multiple is set.
    """
    settings = config.data.buckets
    divisor = (settings and settings.clips_multiple) or divisor
    buckets = [Bucket(*group.size, cost=math.prod(group.latent_shape)) for group in groups]
    largest = max(buckets, key=lambda bucket: bucket.cost)
    buckets = with_batches(buckets, replace(largest, batch_size=config.data.batch_size), divisor)
    return with_weights(buckets, [len(group.entries) for group in groups])


def clip_data(config: DiffusionConfig, codec: LatentCodec, rank: int, world_size: int) -> LatentData:
    validation = config.validation
    if config.data.depth.mapping is None:
        require_file_channels(codec.model, config.vae.path)
    sources, schedule, fingerprint = read_sources(config, codec.model.pixel_channels, rank, world_size)
    streams = [stream for source in sources for stream in source.training.streams]
    classes, train_labels, val_labels = file_classes([source.tables for source in sources], config.labels)
    trained_classes = _distinct(train_labels)
    if rank == 0:
        diffusion_data.warn_of_untrained(classes, trained_classes, _distinct(val_labels))
        for source in sources:
            for line in source.lines(source.training.warnings):
                log.warning(line)
    counts: Counter[ClipSize] = Counter()
    for stream in streams:
        size = (stream.settings.height, stream.settings.width)
        counts.update({(frames, *size): len(stream.schedule.lengths) for frames in stream.schedule.frames.all()})
    size = diffusion_data.choose_size(counts, validation.height, validation.width)
    notes = [line for source in sources for line in source.lines([*source.tables.notes, *source.training.notes])]
    errors = [error for source in sources for error in source.reasons(source.tables.errors)]
    skipped_files = [
        entry
        for source in sources
        for entry in source.reasons([*source.tables.skipped_files, *source.training.skipped_files])
    ]
    possible: list[list[tuple[HeldOut, int]]] = []
    for source, labels in zip(sources, val_labels, strict=True):
        clips = held_out_clips(source, labels, validation) if validation.every else []
        possible += clips
        if validation.every and source.name and not any(clips):
            notes += source.lines(["is not validated, since no held-out file is long enough"])
    chosen, files_held_out = in_turn(possible, validation.clips), sum(map(len, val_labels))
    if validation.every:
        frames = validation.frames or min(stream.schedule.frames.all()[-1] for stream in streams)
        require_held_out(chosen, frames, files_held_out)
    read, unread = read_held_out([clip for clip, _ in chosen], rank, world_size)
    numbers = [int(batch.positions) for batch in read]
    held_out = [
        Batch(batch.video, torch.tensor([chosen[number][1]]), [number], [])
        for number, batch in zip(numbers, read, strict=True)
    ]
    files = sum(map(len, train_labels)) + files_held_out
    labels_of = {source.name: labels for source, labels in zip(sources, train_labels, strict=True)}
    return LatentData(
        dataset=MixedClips(streams),
        collate=diffusion_data.LabelledClips([labels_of[stream.source] for stream in streams]),
        schedule=schedule,
        rows=files - files_held_out - sum(len(source.training.skipped_files) for source in sources),
        codec=codec,
        stream_sizes=[(stream.settings.height, stream.settings.width) for stream in streams],
        stream_groups=[stream.groups for stream in streams],
        size=(validation.frames or size[0], *size[1:]),
        classes=classes,
        trained_classes=trained_classes if classes else [],
        held_out=held_out,
        held_out_sizes=diffusion_data.distinct_sizes(codec, (clip.size for clip, _ in chosen)),
        sample=config.vae.sample,
        fingerprint=fingerprint,
        errors=errors + unread,
        skipped_files=skipped_files,
        notes=[
            *notes,
            f"{plural(files, 'file')}, {files_held_out} of them held out; encoded batch by batch",
            *schedule_notes(schedule),
        ],
    )


def file_classes(tables: Sequence[Tables], setting: str) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names of the classes, and the class of each training file and of each held-out file of every source; NO_LABEL for
    none. setting: `labels` of the configuration. Raises DataError if a file has no class, unless it is `none`."""
    every = [table for read in tables for table in (read.train, read.val)]
    names, rows = distinct_labels(every, setting)
    classes = class_names(names)
    index_of = {"": NO_LABEL} | {name: index for index, name in enumerate(classes)}
    labels = np.array([index_of[name] for name in names], dtype=np.int32)[rows]
    parts = np.split(labels, np.cumsum([len(table) for table in every])[:-1])
    if setting != "none":
        missing = (
            table.path(int(np.argmax(own == NO_LABEL)))
            for table, own in zip(every, parts, strict=True)
            if (own == NO_LABEL).any()
        )
        diffusion_data.require_labels(labels, next(missing, ""), "files")
    return classes, parts[::2], parts[1::2]


def _distinct(labels: Sequence[np.ndarray]) -> list[int]:
    return sorted({*chain(*(np.unique(of_table).tolist() for of_table in labels))})


def held_out_clips(
    source: SourceData, labels: np.ndarray, validation: DiffusionValidation
) -> list[list[tuple[HeldOut, int]]]:
    """Clips of a source's held-out files with their classes, at most validation.clips of each of its sizes, which take
    turns: of validation.frames frames or, if that is null, of as many as training clips have at most, in buckets as
    many as those of the longest one that the file fits. labels: [rows] classes of the held-out files."""
    table, settings, count = source.tables.val, source.settings, validation.clips
    buckets = [stream.bucket for stream in source.training.streams]
    if source.own.buckets is None or validation.frames is not None:
        longest = max(stream.schedule.frames.all()[-1] for stream in source.training.streams)
        frames = validation.frames or longest
        sizes = None if source.own.buckets is None else buckets
        found = held_out_of(table, settings, frames, count, source.name, sizes)
    else:
        fitting = longest_buckets(buckets, *sizes_of(table), clip_lengths(table, settings))
        found = [
            held_out_clip(table, row, replace(settings, height=bucket.height, width=bucket.width), bucket.frames)
            for i, bucket in enumerate(buckets)
            for row in np.flatnonzero(fitting == i)[:count].tolist()
        ]
    by_size: dict[ClipSize, list[tuple[HeldOut, int]]] = {}
    for clip in found:
        by_size.setdefault(clip.size, []).append((clip, int(labels[clip.row])))
    return [by_size[size][:count] for size in sorted(by_size)]

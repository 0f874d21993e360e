"""Train a diffusion model on latents: from configuration to trainer."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vae3d.checkpoints.location import EXPORT_CONFIG, find_weights, split_part
from vae3d.commands.closing import command, curves, longer, shown
from vae3d.commands.meta_check import built
from vae3d.commands.step_cost import fake_tensors
from vae3d.commands.summary import batch_summary, millions
from vae3d.commands.train import SourceData, build_schedule, loggers_of, read_sources
from vae3d.config.issues import NO_VALUE, ConfigIssue, raise_if_any
from vae3d.config.sources import sources_of
from vae3d.data.batch_schedule import BatchSchedule, ClipIndex, FrameCounts, Interleaved, Schedule
from vae3d.data.buckets import Bucket, longest_buckets, with_batches, with_weights
from vae3d.data.clips import StreamedClips, clip_lengths
from vae3d.data.file_table import sizes_of
from vae3d.data.fingerprint import fingerprint_of_cache
from vae3d.data.held_out import HeldOut, held_out_of, in_turn, require_held_out
from vae3d.data.loader import schedule_notes
from vae3d.data.workers import usable_workers
from vae3d.diffusion import data as diffusion_data
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.build import NETWORKS, PROCESSES, network_config
from vae3d.diffusion.data import CachedLatents, ClipSize, HeldOutClip, LatentData
from vae3d.diffusion.unet import LatentUNet
from vae3d.distributed import check_ranks_agree, init_training
from vae3d.inference.scale import unscalable_reason
from vae3d.latents.cache import NO_LABEL, SizeGroup, class_names
from vae3d.latents.clips import distinct_labels
from vae3d.latents.codec import LatentCodec
from vae3d.latents.identity import vae_metadata
from vae3d.latents.tar_shards import open_cache
from vae3d.loading import instantiate, open_codec
from vae3d.models.registry import TARGET, is_known, target_of
from vae3d.precision import set_cudnn_benchmark
from vae3d.text import plural
from vae3d.training.checkpointer import check_may_start
from vae3d.training.diffusion_trainer import DiffusionTrainer

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig, DiffusionValidation
    from vae3d.diffusion.processes import Process

log = logging.getLogger("vae3d")
SHOWN = 10  # sizes in a message


def build_trainer(config: DiffusionConfig, folder: Path) -> DiffusionTrainer:
    """Build the trainer, resume it, lock the run's folder and open its log; ready to `fit`."""
    check_may_start(folder, config.run.resume)
    accelerator = init_training(config.trainer.precision)
    check_ranks_agree(asdict(config))
    codec = codec_of(config, accelerator.device)
    data = latent_data(config, codec, accelerator.process_index, accelerator.num_processes)
    check_ranks_agree({**data.fingerprint.digests(), "data: clips per step": data.clips_per_step()})
    set_cudnn_benchmark(len(data.latent_shapes))
    config, process = complete(config, data)
    torch.manual_seed(config.run.seed)
    network = network_of(config)
    if accelerator.is_main_process:
        for line in summary(config, network, data, accelerator.num_processes):
            log.info(line)
        for node, classes in ((config.denoiser, NETWORKS), (config.process, PROCESSES)):
            if not is_known(node, classes):
                log.warning(
                    "%s is not in vae3d/diffusion/build.py: the exports of this run cannot be opened", node[TARGET]
                )
    vae = {"path": os.path.abspath(config.vae.path), **vae_metadata(codec, config.vae.path)}
    logger, hint = loggers_of(config), scale_hint(config, data)
    trainer = DiffusionTrainer(config, folder, accelerator, network, process, data, vae, logger, hint)
    trainer.setup()
    return trainer


def next_commands(trainer: DiffusionTrainer) -> list[tuple[str, str]]:
    """(purpose, command) that work with the files of this run."""
    found, run = [longer("train-diffusion", trainer)], shown(trainer.folder)
    if any((trainer.folder / "exports").glob("step-*")):
        out = f"{run}/samples-{trainer.step}"
        sizes = {"every_size": "true"} if len(trainer.data.schedule.leaves) > 1 else {}
        found.append(("samples", command("sample", checkpoint=run, out=out, against=trainer.config.cache, **sizes)))
    return [pair for pair in (*found, curves(trainer.folder)) if pair]


def codec_of(config: DiffusionConfig, device: torch.device) -> LatentCodec:
    vae = config.vae
    return open_codec(
        vae.path,
        pixel_range="uint8",
        precision=vae.precision,
        chunk_frames=vae.chunk_frames,
        device=device,
        tf32=config.cache is None,  # as the rest of the training; a cache and the measured scale are exact
    )


def latent_data(config: DiffusionConfig, codec: LatentCodec, rank: int, world_size: int) -> LatentData:
    """The latents to train on: of a cache, or of clips that are encoded batch by batch."""
    build = clip_data if config.cache is None else cache_data
    data, settings = build(config, codec, rank, world_size), config.data
    workers, note = usable_workers(settings.workers)
    notes = [*data.notes, *note]
    return replace(data, workers=workers, prefetch=settings.prefetch, timeout=settings.timeout, notes=notes)


def cache_data(config: DiffusionConfig, codec: LatentCodec, rank: int, world_size: int) -> LatentData:
    mode = None if config.vae.sample else "mean"
    cache = open_cache(config.cache, codec, mode=mode, seed=config.run.seed, flips=config.data.flip)
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
        held_out=[every[ClipIndex(place, place, 1)] for place in validated[rank::world_size].tolist()],
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
        BatchSchedule(
            np.full(len(group.entries), bucket.frames),
            FrameCounts(bucket.frames, bucket.frames),
            config.run.seed,
            bucket.batch_size,
            config.trainer.accumulate,
            rank,
            world_size,
            rows=np.searchsorted(train, group.entries),
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
    sources, schedule, fingerprint = read_sources(config, codec.model.pixel_channels, rank, world_size)
    streams = [stream for source in sources for stream in source.part.streams]
    tables = [source.tables for source in sources]
    every = [table for read in tables for table in (read.train, read.val)]
    names, rows = distinct_labels(every, config.labels)
    classes = class_names(names)
    index_of = {"": NO_LABEL} | {name: index for index, name in enumerate(classes)}
    labels = np.array([index_of[name] for name in names], dtype=np.int32)[rows]
    parts = np.split(labels, np.cumsum([len(table) for table in every])[:-1])
    if config.labels != "none":
        missing = (
            table.path(int(np.argmax(own == NO_LABEL)))
            for table, own in zip(every, parts, strict=True)
            if (own == NO_LABEL).any()
        )
        diffusion_data.require_labels(labels, next(missing, ""), "files")
    of_train = {source.name: part for source, part in zip(sources, parts[::2], strict=True)}
    trained_classes, held_out_classes = (
        sorted({*chain(*(np.unique(p).tolist() for p in parts[i::2]))}) for i in (0, 1)
    )
    if rank == 0:
        diffusion_data.warn_of_untrained(classes, trained_classes, held_out_classes)
        for line in (line for source in sources for line in source.lines(source.part.warnings)):
            log.warning(line)
    counts: Counter[ClipSize] = Counter()
    for stream in streams:
        size = (stream.settings.height, stream.settings.width)
        counts.update({(frames, *size): len(stream.schedule.lengths) for frames in stream.schedule.frames.all()})
    size = diffusion_data.choose_size(counts, validation.height, validation.width)
    notes = [line for source in sources for line in source.lines([*source.tables.notes, *source.part.notes])]
    errors = [error for source in sources for error in source.reasons(source.tables.errors)]
    possible: list[list[HeldOutClip]] = []
    for source, own_labels in zip(sources, parts[1::2], strict=True):
        clips = held_out_clips(source, own_labels, validation) if validation.every else []
        possible += clips
        if validation.every and source.name and not any(clips):
            notes += source.lines(["is not validated, since no held-out file is long enough"])
    chosen, files_held_out = in_turn(possible, validation.clips), sum(len(read.val) for read in tables)
    if validation.every:
        frames = validation.frames or min(stream.schedule.frames.all()[-1] for stream in streams)
        require_held_out(chosen, frames, files_held_out)
    held_out, unread = diffusion_data.read_held_out(chosen, rank, world_size)
    return LatentData(
        dataset=StreamedClips(streams),
        collate=diffusion_data.LabelledClips([of_train[stream.source] for stream in streams]),
        schedule=schedule,
        rows=sum(len(read.train) for read in tables) - sum(len(source.part.skipped_files) for source in sources),
        codec=codec,
        stream_sizes=[(stream.settings.height, stream.settings.width) for stream in streams],
        stream_groups=[stream.groups for stream in streams],
        size=(validation.frames or size[0], *size[1:]),
        classes=classes,
        trained_classes=trained_classes if classes else [],
        held_out=held_out,
        held_out_sizes=diffusion_data.distinct_sizes(codec, (clip.size for clip in chosen)),
        sample=config.vae.sample,
        fingerprint=fingerprint,
        errors=errors + unread,
        notes=[
            *notes,
            f"{plural(len(labels), 'file')}, {files_held_out} of them held out; encoded batch by batch",
            *schedule_notes(schedule),
        ],
    )


def held_out_clips(source: SourceData, labels: np.ndarray, validation: DiffusionValidation) -> list[list[HeldOutClip]]:
    """Clips of a source's held-out files, at most validation.clips of each of its sizes, which take turns: of
    validation.frames frames or, if that is null, of as many as training clips have at most, in buckets as many as those
    of the longest one that the file fits. labels: [rows] classes of the held-out files."""
    table, settings, count = source.tables.val, source.settings, validation.clips
    paths, parts = table.paths(np.arange(len(table))), [table.bounds(row) for row in range(len(table))]
    buckets = [stream.bucket for stream in source.part.streams]
    if source.own.buckets is None or validation.frames is not None:
        longest = max(stream.schedule.frames.all()[-1] for stream in source.part.streams)
        frames = validation.frames or longest
        sizes = None if source.own.buckets is None else buckets
        found = [(clip, frames) for clip in held_out_of(table, settings, frames, count, source.name, sizes)]
    else:
        fitting = longest_buckets(buckets, *sizes_of(table), clip_lengths(table, settings)).tolist()
        found = [
            (
                HeldOut(path, bounds, replace(settings, height=buckets[i].height, width=buckets[i].width)),
                buckets[i].frames,
            )
            for path, bounds, i in zip(paths, parts, fitting, strict=True)
            if i >= 0
        ]
    label_of = dict(zip(zip(paths, map(str, parts), strict=True), labels.tolist(), strict=True))
    by_size: dict[ClipSize, list[HeldOutClip]] = {}
    for clip, frames in found:
        held_out = HeldOutClip(clip, frames, label_of[clip.path, str(clip.bounds)])
        by_size.setdefault(held_out.size, []).append(held_out)
    return [by_size[size][:count] for size in sorted(by_size)]


def complete(config: DiffusionConfig, data: LatentData) -> tuple[DiffusionConfig, Process]:
    """The configuration with the settings of the denoiser that follow from data, autoencoder and process; and the
    process. Raises ConfigError with every error of both."""
    issues: list[ConfigIssue] = []
    process, network = built("process", config.process, instantiate, issues), dict(config.denoiser)
    if process is not None:
        try:
            process.sampler(Sampling(config.validation.steps, config.validation.method, shift=config.validation.shift))
        except ValueError as error:
            issues.append(ConfigIssue("validation", NO_VALUE, f"does not fit the process: {error}"))
        if network.get("learned_sigma") not in (None, process.learned_sigma):
            message = f"the process has learned_sigma={process.learned_sigma}"
            issues.append(ConfigIssue("denoiser.learned_sigma", network["learned_sigma"], message, "use null"))
        network["learned_sigma"] = process.learned_sigma
    classes = len(data.classes)
    if network.get("num_classes") and not classes:
        hint = "set labels=auto, column or folder, or use null"
        issues.append(ConfigIssue("denoiser.num_classes", network["num_classes"], "labels=none gives none", hint))
    elif (network.get("num_classes") or classes) < classes:
        message = f"the data have {classes}"
        issues.append(ConfigIssue("denoiser.num_classes", network["num_classes"], message, "use null"))
    network["num_classes"] = network.get("num_classes") or classes
    sampled, trained = data.latent_shape[1], max(shape[1] for shape in data.latent_shapes)
    if sampled > trained:
        message = f"gives {plural(sampled, 'latent frame')}, and training has at most {trained}"
        hint = f"use {max(frames for frames, *_ in data.sizes)}, for samples, too"
        issues.append(ConfigIssue("validation.frames", config.validation.frames, message, hint))
    elif network[TARGET] == target_of(LatentUNet) and trained > 1:
        hint = "use denoiser=video_transformer, or data.frames.min=1 data.frames.max=1 validation.frames=1"
        message = f"the UNet is for images, and these latents have {plural(trained, 'frame')}"
        issues.append(ConfigIssue("denoiser", NO_VALUE, message, hint))
    try:
        network = network_config(network, min(data.latent_shapes, key=lambda shape: min(shape[2:])))
    except ValueError as error:
        issues.append(ConfigIssue("denoiser", NO_VALUE, str(error)))
    else:
        with torch.device("meta"):
            built("denoiser", network, instantiate, issues)
    if len(data.latent_shapes) > 1 and not is_known(network, NETWORKS) and not issues:
        issues += size_issues(network, data)
    raise_if_any(issues)
    return replace(config, denoiser=network), process


def size_issues(network: Mapping[str, Any], data: LatentData) -> Iterator[ConfigIssue]:
    """Of a denoiser that does not take latents of every size of the data, as one of the user's own may not. Runs it on
    tensors without memory."""
    with fake_tensors():
        model = instantiate(network)
        for size in data.sizes:
            z = torch.empty(2, *data.codec.latent_shape(*size))
            expected = (2, z.shape[1] * (2 if network["learned_sigma"] else 1), *z.shape[2:])
            try:
                found = tuple(model(z, torch.zeros(2), None).shape)
                error = None if found == expected else f"its output is {found}, not {expected}"
            except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as raised:
                error = " ".join(str(raised).split())
            if error is not None:
                shape, of = "x".join(map(str, z.shape[1:])), "x".join(map(str, size))
                message = f"does not take the latents, {shape}, of clips of {of}: {error}"
                hint = "use denoiser=video_transformer, or clips of one size"
                yield ConfigIssue("denoiser", network[TARGET], message, hint)


def network_of(config: DiffusionConfig) -> nn.Module:
    """The network that `complete` has checked, with random weights."""
    network = instantiate(config.denoiser)
    network.config = config.denoiser
    return network


def summary(config: DiffusionConfig, network: nn.Module, data: LatentData, world_size: int) -> list[str]:
    """Latents, network, process and batches of a run."""
    codec, trainer, stride = data.codec, config.trainer, data.codec.space_stride
    epochs = data.schedule.clips_before(trainer.max_steps) / (data.rows * data.schedule.leaves[0].clips_per_file)
    batches = batch_summary(config.data.batch_size, world_size, trainer.accumulate)
    if len(data.schedule.leaves) > 1:
        batches = f"batches as above, in {plural(world_size, 'rank')} x {plural(trainer.accumulate, 'micro-batch')}"
    classes = plural(len(data.trained_classes), "class") if data.trained_classes else "no classes"
    return [
        f"{type(codec.model).__name__} of {config.vae.path}: {codec.time_stride} x {stride} x {stride}, "
        f"{plural(codec.channels, 'channel')}",
        *size_lines(data, trainer.max_steps, mixture=bool(config.data.sources)),
        *(f"  {note}" for note in data.notes),
        f"{type(network).__name__}: {millions(network.parameters())} parameters, {classes}",
        "  " + ", ".join(f"{name}={value}" for name, value in config.denoiser.items() if name != TARGET),
        f"{config.process[TARGET].rpartition('.')[2]}: "
        + ", ".join(f"{name}={value}" for name, value in config.process.items() if name != TARGET),
        f"{batches}; "
        f"{plural(trainer.max_steps, 'step')} ({plural(f'{epochs:.3g}', 'epoch')}) at "
        f"learning rate {config.optim.lr:g}, {trainer.precision}",
    ]


def size_lines(data: LatentData, max_steps: int, mixture: bool) -> list[str]:
    """The size of samples, and of several streams those of all. mixture: name their sources."""

    def line(size: ClipSize) -> str:
        frames, height, width = size
        latent = "x".join(map(str, data.codec.latent_shape(*size)))
        return f"{plural(frames, 'frame')} of {height}x{width} -> latent {latent}"

    streams = data.schedule.leaves
    if len(streams) == 1:
        return [f"  {line(data.size)}"]
    steps = data.schedule.steps_before(max_steps)
    lines = [f"  {plural(len(data.sizes), 'size')}, one in each step (samples: {'x'.join(map(str, data.size))}):"]
    for stream, names, size, taken in zip(streams, data.stream_groups, data.stream_sizes, steps, strict=True):
        longest = line((stream.frames.all()[-1], *size))
        share = f"{plural(taken, 'step')} ({taken / max_steps:.1%})"
        clips = f"{plural(len(stream.lengths), 'row')}, {plural(stream.batch_size, 'clip')} per step"
        lines.append(f"    {f'{names[0]}: ' if mixture else ''}{longest}: {clips}, {share}")
    return lines


def scale_hint(config: DiffusionConfig, data: LatentData) -> str:
    """How to fix an autoencoder whose latents do not have mean 0 and standard deviation 1."""
    path = config.vae.path
    if why := unscalable_reason(data.codec.model):
        return f"the scale of {path} cannot be changed: {why}"
    is_export = find_weights(split_part(path)[0]).with_name(EXPORT_CONFIG).is_file()
    out, then = ("", "") if is_export else (" --out FOLDER", "; then set vae.path=FOLDER")
    if config.cache is not None:
        means = "" if config.vae.sample else " --of-means"
        command = f"scripts/latent_stats.py {config.cache} --write {path} --per-channel{means}{out}"
    else:
        node = next(iter(sources_of(config.data).values())).source
        source = node.get("path") or node.get("root") or "SOURCE"
        frames, height, width = max(data.sizes, key=math.prod)
        command = (
            f"scripts/measure_scale.py {path} {source} --per-channel --frames {frames} --height {height} "
            f"--width {width}{out}"
        )
    return f"measure the scale and write it into the autoencoder: python {command}{then}"

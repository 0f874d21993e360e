"""Train a diffusion model on latents: from configuration to trainer."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from vae3d.checkpoints.location import EXPORT_CONFIG, find_weights, split_part
from vae3d.commands.closing import command, curves, longer, shown
from vae3d.commands.meta_check import built
from vae3d.commands.summary import batch_summary, frame_counts, millions
from vae3d.commands.train import build_clip_settings, build_schedule, loggers_of
from vae3d.config.issues import NO_VALUE, ConfigIssue, raise_if_any
from vae3d.data.batch_schedule import ClipIndex, FrameCounts
from vae3d.data.clips import ClipDataset
from vae3d.data.fingerprint import fingerprint_of_cache
from vae3d.data.loader import clip_lengths, read_tables, validation_clips
from vae3d.data.workers import usable_workers
from vae3d.diffusion import data as diffusion_data
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.build import NETWORKS, PROCESSES, network_config
from vae3d.diffusion.data import CachedLatents, LatentData
from vae3d.diffusion.unet import LatentUNet
from vae3d.distributed import check_ranks_agree, init_training
from vae3d.inference.scale import unscalable_reason
from vae3d.latents.cache import NO_LABEL, class_names
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
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.diffusion.processes import Process

log = logging.getLogger("vae3d")


def build_trainer(config: DiffusionConfig, folder: Path) -> DiffusionTrainer:
    """Build the trainer, resume it, lock the run's folder and open its log; ready to `fit`."""
    check_may_start(folder, config.run.resume)
    accelerator = init_training(config.trainer.precision)
    check_ranks_agree(asdict(config))
    codec = codec_of(config, accelerator.device)
    data = latent_data(config, codec, accelerator.process_index, accelerator.num_processes)
    check_ranks_agree(data.fingerprint.digests())
    set_cudnn_benchmark(len(data.trained))  # height and width of latents are fixed
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
        found.append(("samples", command("sample", checkpoint=run, out=out, against=trainer.config.cache)))
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
    size, latent_shape = diffusion_data.clip_and_latent_size(cache)
    labelled = config.labels != "none"
    if labelled:
        given = np.array(cache.labels)
        first = cache.index["key"].iloc[int(np.argmax(given == NO_LABEL))]
        diffusion_data.require_labels(given, first, f"entries of {config.cache}")
    num_val_files = config.data.num_val_files if config.validation.every else 0
    train, held_out = diffusion_data.split_cache(cache.index, num_val_files)
    mine = held_out[: config.validation.clips if config.validation.every else 0][rank::world_size]
    every = CachedLatents(cache, range(len(cache)), labelled)
    if labelled and rank == 0:
        labels = np.array(cache.labels)
        diffusion_data.warn_of_untrained(cache.classes, labels[train].tolist(), labels[held_out].tolist())
    return LatentData(
        dataset=CachedLatents(cache, train, labelled),
        collate=diffusion_data.collate_latents,
        schedule=build_schedule(config, np.ones(len(train), int), FrameCounts(1, 1), rank, world_size),
        codec=codec,
        size=size,
        latent_shape=latent_shape,
        trained=(latent_shape[1],),
        classes=cache.classes if labelled else [],
        trained_classes=sorted({cache.labels[place] for place in train}) if labelled else [],
        held_out=[every[ClipIndex(place, place, 1)] for place in mine.tolist()],
        fingerprint=fingerprint_of_cache(cache.index.iloc[[*train, *held_out]], cache.meta["digest"]),
        notes=[f"{config.cache}: {plural(len(train), 'latent')} to train on ({cache.mode}), {len(held_out)} held out"],
    )


def clip_data(config: DiffusionConfig, codec: LatentCodec, rank: int, world_size: int) -> LatentData:
    data, validation = config.data, config.validation
    settings, source = build_clip_settings(data, codec.model.pixel_channels), instantiate(data.source)
    num_val_files = data.num_val_files if validation.every else 0
    tables = read_tables(source, settings, num_val_files, data.max_broken, rank, world_size, stat_files=rank == 0)
    names, rows = distinct_labels([tables.train, tables.val], config.labels)
    classes = class_names(names)
    index_of = {"": NO_LABEL} | {name: index for index, name in enumerate(classes)}
    labels = np.array([index_of[name] for name in names], dtype=np.int32)[rows]
    of_train, of_val = np.split(labels, [len(tables.train)])
    if config.labels != "none":
        first = int(np.argmax(labels == NO_LABEL))
        table, place = (tables.val, first - len(of_train)) if first >= len(of_train) else (tables.train, first)
        diffusion_data.require_labels(labels, table.path(place), "files")
    trained_classes = np.unique(of_train).tolist()
    if rank == 0:
        diffusion_data.warn_of_untrained(classes, trained_classes, np.unique(of_val).tolist())
    lengths, by_length = clip_lengths(tables.train, settings), tables.train.stored("by_length")
    schedule = build_schedule(config, lengths, frame_counts(data), rank, world_size, by_length)
    held_out, errors = [], tables.errors
    frames = validation.frames or max(schedule.frames.all())
    if validation.every:
        enough = clip_lengths(tables.val, settings) >= frames
        clips, more = validation_clips(tables.val, settings, frames, validation.clips, rank, world_size)
        held_out, errors = diffusion_data.val_batches(clips, of_val[enough]), errors + more
    trained = {codec.latent_shape(count, data.height, data.width)[1] for count in schedule.frames.all()}
    return LatentData(
        dataset=ClipDataset(tables.train, schedule, settings),
        collate=diffusion_data.LabelledClips(of_train),
        schedule=schedule,
        codec=codec,
        size=(frames, data.height, data.width),
        latent_shape=codec.latent_shape(frames, data.height, data.width),
        trained=tuple(sorted(trained)),
        classes=classes,
        trained_classes=trained_classes if classes else [],
        held_out=held_out,
        sample=config.vae.sample,
        fingerprint=tables.fingerprint,
        errors=errors,
        notes=[
            *tables.notes,
            f"{plural(len(labels), 'file')}, {len(tables.val)} of them held out; encoded batch by batch",
        ],
    )


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
    sampled, trained = data.latent_shape[1], max(data.trained)
    if sampled > trained:
        message = f"gives {plural(sampled, 'latent frame')}, and training has at most {trained}"
        hint = f"use {config.data.frames.max}, for samples, too"
        issues.append(ConfigIssue("validation.frames", config.validation.frames, message, hint))
    elif network[TARGET] == target_of(LatentUNet) and trained > 1:
        hint = "use denoiser=video_transformer, or data.frames.min=1 data.frames.max=1 validation.frames=1"
        message = f"the UNet is for images, and these latents have {plural(trained, 'frame')}"
        issues.append(ConfigIssue("denoiser", NO_VALUE, message, hint))
    try:
        network = network_config(network, data.latent_shape)
    except ValueError as error:
        issues.append(ConfigIssue("denoiser", NO_VALUE, str(error)))
    else:
        with torch.device("meta"):
            built("denoiser", network, instantiate, issues)
    raise_if_any(issues)
    return replace(config, denoiser=network), process


def network_of(config: DiffusionConfig) -> nn.Module:
    """The network that `complete` has checked, with random weights."""
    network = instantiate(config.denoiser)
    network.config = config.denoiser
    return network


def summary(config: DiffusionConfig, network: nn.Module, data: LatentData, world_size: int) -> list[str]:
    """Latents, network, process and batches of a run."""
    codec, trainer, batch = data.codec, config.trainer, config.data.batch_size
    stride, frames, height, width = codec.space_stride, *data.size
    epochs = trainer.max_steps * batch / len(data.schedule.lengths)
    classes = plural(len(data.trained_classes), "class") if data.trained_classes else "no classes"
    return [
        f"{type(codec.model).__name__} of {config.vae.path}: {codec.time_stride} x {stride} x {stride}, "
        f"{plural(codec.channels, 'channel')}",
        f"  {plural(frames, 'frame')} of {height}x{width} -> latent {'x'.join(map(str, data.latent_shape))}",
        *(f"  {note}" for note in data.notes),
        f"{type(network).__name__}: {millions(network.parameters())} parameters, {classes}",
        "  " + ", ".join(f"{name}={value}" for name, value in config.denoiser.items() if name != TARGET),
        f"{config.process[TARGET].rpartition('.')[2]}: "
        + ", ".join(f"{name}={value}" for name, value in config.process.items() if name != TARGET),
        f"{batch_summary(batch, world_size, trainer.accumulate)}; "
        f"{plural(trainer.max_steps, 'step')} ({plural(f'{epochs:.3g}', 'epoch')}) at "
        f"learning rate {config.optim.lr:g}, {trainer.precision}",
    ]


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
        source = config.data.source.get("path") or config.data.source.get("root") or "SOURCE"
        frames, height, width = max(frame_counts(config.data).all()), config.data.height, config.data.width
        command = (
            f"scripts/measure_scale.py {path} {source} --per-channel --frames {frames} --height {height} "
            f"--width {width}{out}"
        )
    return f"measure the scale and write it into the autoencoder: python {command}{then}"

"""debug=dry: log what a run would be, and what it will need. Starts nothing, and uses no GPU."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vae3d.checkpoints.formats import read_checkpoint
from vae3d.commands import train_diffusion
from vae3d.commands.estimate import clips_text, diffusion_needs, estimates
from vae3d.commands.latent_data import build_latent_data
from vae3d.commands.meta_check import check_bucket_sizes, lacking_weights
from vae3d.commands.step_cost import vae_needs
from vae3d.commands.summary import data_summary, first_batch, never_reached, summary
from vae3d.commands.training_data import build_training_data, naming_source
from vae3d.config.diffusion import DiffusionConfig
from vae3d.config.schema import Data, TrainConfig, world_of
from vae3d.config.sources import sources_of
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.batches.streaming import is_streaming
from vae3d.data.loader import check_files_exist
from vae3d.loading import build_from_checkpoint, initialize, instantiate
from vae3d.training.checkpointer import find_checkpoint
from vae3d.training.freeze import train_parts

log = logging.getLogger("vae3d")
STEPS = 200  # of which the mean size is taken


def describe(config: TrainConfig | DiffusionConfig) -> None:
    """Log parts, parameters, shapes, batches and files of a run, and estimates of memory, time and disk.

    Opens the data as training does, and reads the first batch. Raises DataError, and ConfigError as check_bucket_sizes
    does.
    """
    if isinstance(config, DiffusionConfig):
        describe_diffusion(config)
    else:
        describe_training(config)


def describe_training(config: TrainConfig) -> None:
    """Of an autoencoder, which is built on the meta device."""
    with torch.device("meta"):
        model = instantiate(config.model)
    train_parts(model, config.stage.train)
    world = world_of(config)
    log.info("\n".join([*summary(config, model, world), *first_weights(config, model), *existing_files(config.data)]))
    data = build_training_data(config, 0, world)
    check_bucket_sizes(config, data.shapes())
    one_each = {stream.source: stream for stream in data.streams}.values()  # the buckets of a source share its files
    lengths = np.concatenate([clip_lengths(stream.table, stream.settings) for stream in one_each])
    log.info("\n".join([*data_summary(config, data), *first_batch(data.clips(0, 1), lengths)]))
    for line in [*never_reached(config), *data.warnings]:
        log.warning(line)
    if lines := lacking_weights(config):
        log.info("\n".join(lines))
    teacher = None
    if config.teacher.path is not None:
        teacher = partial(build_from_checkpoint, read_checkpoint(config.teacher.path))
    largest = max(data.shapes(), key=lambda shape: (shape.pixels, shape.frames))
    needs = vae_needs(config, largest.clips, teacher, world, size=largest[2:])
    steps = range(min(config.trainer.max_steps, STEPS))
    share = sum(data.shape_at(step).pixels for step in steps) / len(steps) / largest.pixels
    clips = clips_text(largest.clips, largest.frames)
    if len(data.streams) > 1:
        clips += f" of {largest.height}x{largest.width}"
    log.info("\n".join(estimates(config, needs, clips, share, world, data.item_bytes, data.workers)))


def first_weights(config: TrainConfig, model: nn.Module) -> list[str]:
    """Lines that say where the first weights are from; none for a run that resumes, and of `prune`, which the check of
    the configuration has tried. model: on the meta device. Raises CheckpointError if they do not fit."""
    init, folder = config.stage.init_from, Path(config.run.root) / config.run.name
    if (isinstance(init, dict) and "prune" in init) or find_checkpoint(folder, config.run.resume_from) is not None:
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        return initialize(model, init, any_scale=config.trainer.publish.measure_scale > 0)


def describe_diffusion(config: DiffusionConfig) -> None:
    """Of a diffusion model. Its autoencoder is loaded, onto the CPU."""
    if config.cache is None:
        log.info("\n".join(existing_files(config.data)))
    codec = train_diffusion.codec_of(config, torch.device("cpu"))
    data = build_latent_data(config, codec, 0, world_of(config))
    config, process = train_diffusion.complete(config, data)
    with torch.device("meta"):
        network = train_diffusion.network_of(config)
    lines = train_diffusion.summary(config, network, data, data.schedule.world_size)
    lengths = np.concatenate([schedule.lengths for schedule in data.schedule.leaves])
    log.info("\n".join([*lines, *first_batch(data.batches(0, 1), lengths)]))
    (frames, *size), clips = max(data.batch_sizes, key=data.latent_values)
    needs = diffusion_needs(config, process, data, clips, (frames, *size))
    steps = range(min(config.trainer.max_steps, STEPS))
    share = sum(data.latent_values(data.batch_size_at(step)) for step in steps) / len(steps)
    share /= data.latent_values(((frames, *size), clips))
    text = clips_text(clips, frames)
    if len(data.schedule.leaves) > 1:
        text += f" of {size[0]}x{size[1]}"
    world = data.schedule.world_size
    log.info("\n".join(estimates(config, needs, text, share, world, data.item_bytes, data.workers)))


def existing_files(data: Data) -> list[str]:
    """Lines of check_files_exist of every source."""
    files = []
    for name, own in sources_of(data).items():
        with naming_source(name):
            source = instantiate(own.source, "data.source")
            lines = [] if is_streaming(source) else check_files_exist(source, own.max_broken)
        files += [line.replace("data:", f"data.sources.{name}:", 1) if name else line for line in lines]
    return files

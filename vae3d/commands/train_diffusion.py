"""Train a diffusion model on latents: from configuration to trainer."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vae3d.checkpoints.location import EXPORT_CONFIG, absolute_path, find_weights, split_part
from vae3d.commands.closing import command, curves, longer, shown
from vae3d.commands.latent_data import build_latent_data
from vae3d.commands.meta_check import built
from vae3d.commands.step_cost import fake_tensors
from vae3d.commands.summary import batch_summary, millions
from vae3d.commands.train import loggers_of
from vae3d.config.issues import NO_VALUE, ConfigIssue, raise_if_any
from vae3d.config.sources import sources_of
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.build import NETWORKS, PROCESSES, network_config
from vae3d.diffusion.data import ClipSize, LatentData
from vae3d.diffusion.unet import LatentUNet
from vae3d.distributed import check_ranks_agree, init_training
from vae3d.errors import UserError
from vae3d.latents.codec import LatentCodec
from vae3d.latents.identity import vae_metadata
from vae3d.latents.scale import unscalable_reason
from vae3d.loading import instantiate, open_codec
from vae3d.models.registry import TARGET, is_known, target_of
from vae3d.precision import set_cudnn_benchmark
from vae3d.text import epoch_text, plural
from vae3d.training.checkpointer import check_may_start, find_checkpoint
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
    checkpoint = find_checkpoint(folder, config.run.resume_from)
    codec = codec_of(config, accelerator.device)
    data = build_latent_data(config, codec, accelerator.process_index, accelerator.num_processes)
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
    vae = {"path": absolute_path(config.vae.path), **vae_metadata(codec, config.vae.path)}
    logger, hint = loggers_of(config), scale_hint(config, data)
    trainer = DiffusionTrainer(config, folder, accelerator, network, process, data, vae, logger, hint)
    trainer.setup(checkpoint)
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
    for _, height, width in data.sizes:
        try:
            data.codec.model.check_size(height, width)
        except UserError as error:
            issues.append(ConfigIssue("data", NO_VALUE, f"clips of {height}x{width}: {error}"))
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
        images = "data.frames.min=1 data.frames.max=1 validation.frames=1"
        hint = f"use denoiser=video_transformer, or {images if config.cache is None else 'a cache of frames=1'}"
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
        f"{plural(trainer.max_steps, 'step')} ({epoch_text(epochs)}) at "
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
        return f"the scale of {path} cannot be changed: {why}; trainer.any_scale=true trains on its latents as they are"
    is_export = find_weights(split_part(path)[0]).with_name(EXPORT_CONFIG).is_file()
    if config.cache is not None:
        words = ["latent-stats", config.cache, "--write", path]
    else:
        node = next(iter(sources_of(config.data).values())).source
        source = node.get("path") or node.get("root") or "SOURCE"
        frames, height, width = max(data.sizes, key=math.prod)
        words = ["measure-scale", path, source, "--frames", frames, "--height", height, "--width", width]
    words += [
        "--per_channel",
        *([] if config.vae.sample else ["--of_means"]),
        *([] if is_export else ["--out", "FOLDER"]),
    ]
    then = "" if is_export else "; then set vae.path=FOLDER"
    return f"measure the scale and write it into the autoencoder: vae3d {shlex.join(map(str, words))}{then}"

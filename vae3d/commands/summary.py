"""The numbers that a configuration amounts to, logged when a run starts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from vae3d.data.batch_schedule import FrameCounts
from vae3d.data.loader import TrainingData
from vae3d.data.media import DataError
from vae3d.data.streaming import StreamingData
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.text import plural
from vae3d.training.freeze import ALL

if TYPE_CHECKING:
    from vae3d.config.schema import Data, TrainConfig

SHOWN_FILES = 4  # held-out files that are named
LATENTS = {"teacher": "the teacher's", "own": "its own", "mixed": "the teacher's or its own"}  # of teacher.decode


def frame_counts(config: Data) -> FrameCounts:
    frames = config.frames
    return FrameCounts(frames.min, frames.max, frames.step, frames.images, frames.fit)


def summary(config: TrainConfig, model: nn.Module, world_size: int | None = None) -> list[str]:
    """Parts, parameters, latent shapes, losses and batches of a run. The model's parts must be frozen already."""
    data, trainer = config.data, config.trainer
    world = world_size or int(os.environ.get("WORLD_SIZE", config.launcher.nproc))
    kind = f" ({model.kind})" if isinstance(model, DiffusersVAE) else ""
    lines = [f"{type(model).__name__}{kind}: {millions(model.parameters())} parameters"]
    parts = model.trainable_parts()
    for part, scale in config.stage.train.items():
        trained = millions(p for module in ({**parts, ALL: [model]})[part] for p in module.parameters())
        lines.append(f"  trains {part}: {trained}, learning rate x {scale:g}")
    for part, modules in parts.items():
        parameters = [p for module in modules for p in module.parameters()]
        if ALL in config.stage.train:
            lines.append(f"    {part}: {millions(parameters)}")
        elif not any(p.requires_grad for p in parameters):
            lines.append(f"  frozen {part}: {millions(parameters)}")
    counts = frame_counts(data)
    for count in sorted({counts.all()[0], counts.all()[-1]}):
        latent = "x".join(map(str, model.latent_shape(count, data.height, data.width)))
        lines.append(f"  {plural(count, 'frame')} of {data.height}x{data.width} -> latent {latent}")
    terms = " + ".join(f"{term.weight:g} {name}" for name, term in config.loss.terms.items() if term.weight)
    reduced = {"sum": "summed over the elements of a frame", "mean": "means over elements"}[config.loss.reduction]
    lines.append(f"loss: {terms}; {reduced}. Logged per element, with each term's share of the loss")
    if config.teacher.path is not None:
        teacher = config.teacher
        decoded = LATENTS[teacher.decode]
        lines.append(f"teacher: {teacher.path} in {teacher.precision}; the model decodes {decoded} latents")
    steps = f"{plural(trainer.max_steps, 'step')} at learning rate {config.optim.lr:g}, {trainer.precision}"
    return [*lines, f"{batch_summary(data.batch_size, world, trainer.accumulate)}; {steps}"]


def batch_summary(batch_size: int, world_size: int, accumulate: int) -> str:
    share = batch_size // (world_size * accumulate)
    shares = plural(world_size, "rank"), plural(accumulate, "micro-batch"), plural(share, "clip")
    return f"batch of {plural(batch_size, 'clip')} = {' x '.join(shares)}"


def data_summary(config: TrainConfig, data: TrainingData | StreamingData) -> list[str]:
    """Training files, epochs, and the files that are skipped."""
    if isinstance(data, StreamingData):
        return [f"  {line}" for line in [*held_out_lines(data), *data.notes]]
    lengths, counts = data.schedule.lengths, data.schedule.frames.all()
    unused = len(lengths) - len(data.schedule.with_at_least(counts[0]))
    epochs = config.trainer.max_steps * config.data.batch_size / (len(lengths) - unused)
    lines = [f"{plural(len(lengths), 'training file')}, {plural(f'{epochs:.3g}', 'epoch')}"]
    lines += [f"  {line}" for line in [*held_out_lines(data), *data.notes]]
    if unused:
        lines.append(f"  skipped: {plural(unused, 'file')} with fewer than {plural(counts[0], 'frame')}")
    short = len(lengths) - len(data.schedule.with_at_least(counts[-1])) - unused
    if short:
        fewer = f"{plural(short, 'file')} with fewer than {plural(counts[-1], 'frame')}"
        lines.append(f"  used in shorter steps only: {fewer}")
    return lines


def held_out_lines(data: TrainingData | StreamingData) -> list[str]:
    held_out = [path for clip in data.held_out for path in clip.paths]
    lines = []
    if held_out:
        names = ", ".join(held_out[:SHOWN_FILES]) + (", ..." if len(held_out) > SHOWN_FILES else "")
        lines.append(f"held out on this rank: {names}")
    if data.errors:
        lines.append(f"skipped: {plural(len(data.errors), 'file')} that cannot be read")
    return lines


def first_batch(batches: Iterator[Any], lengths: np.ndarray) -> list[str]:
    """Reads the first batch. Lines: how many frames there are, and how long the batch took.

    lengths: frames that each training file can give; of a stream none. Raises DataError if no file of the batch can
    be read.
    """
    start = time.perf_counter()
    batch = next(batches)
    seconds = time.perf_counter() - start
    pixels = getattr(batch, "video", getattr(batch, "values", None))
    is_video = lengths.max(initial=0) > 1
    lines = [f"  {plural(lengths.sum(), 'frame')}, {lengths.mean():.1f} per file"] if is_video else []
    if pixels is None:
        reasons = "\n".join(f"  {path}: {reason}" for path, reason in batch.errors)
        raise DataError(f"no file of the first batch can be read:\n{reasons}")
    shape = "x".join(map(str, pixels.shape))
    return [*lines, f"  the first batch, {shape}, took {seconds:.2f} s to read, with the start of the workers"]


def millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"

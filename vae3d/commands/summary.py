"""What a configuration means in numbers, as the start of a run tells it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from vae3d.data.batch_schedule import FrameCounts
from vae3d.data.loader import TrainingData
from vae3d.training.freeze import ALL

if TYPE_CHECKING:
    from vae3d.config.schema import Data, TrainConfig

LATENTS = {"teacher": "the teacher's", "own": "its own", "mixed": "the teacher's or its own"}  # by teacher.decode


def frame_counts(config: Data) -> FrameCounts:
    frames = config.frames
    return FrameCounts(frames.min, frames.max, frames.step, frames.images, frames.fit)


def summary(config: TrainConfig, model: nn.Module, world_size: int | None = None) -> list[str]:
    """Derived numbers of a run, a line each. The model's parameters must be frozen or not as in training."""
    data, trainer = config.data, config.trainer
    world = world_size or int(os.environ.get("WORLD_SIZE", config.launcher.nproc))
    lines = [f"{type(model).__name__}: {_millions(model.parameters())} parameters"]
    for part, scale in config.stage.train.items():
        modules = {**model.trainable_parts(), ALL: [model]}[part]
        trained = _millions(p for module in modules for p in module.parameters())
        lines.append(f"  trains {part}: {trained}, learning rate x {scale:g}")
    lines.append(f"  frozen: {_millions(p for p in model.parameters() if not p.requires_grad)}")
    counts = frame_counts(data)
    for count in sorted({counts.all()[0], counts.all()[-1]}):
        latent = "x".join(map(str, model.latent_shape(count, data.height, data.width)))
        lines.append(f"  {count} frames of {data.height}x{data.width} -> latent {latent}")
    terms = ", ".join(f"{term.weight:g} {name}" for name, term in config.loss.terms.items() if term.weight)
    lines.append(f"loss ({config.loss.reduction}): {terms}")
    if config.teacher.path is not None:
        told = config.teacher
        lines.append(f"teacher: {told.path} in {told.precision}; the model decodes {LATENTS[told.decode]} latents")
    share = data.batch_size // (world * trainer.accumulate)
    lines.append(
        f"batch of {data.batch_size} clips = {world} ranks x {trainer.accumulate} micro-batches x {share} clips; "
        f"{trainer.max_steps} steps at learning rate {config.optim.lr:g}, {trainer.precision}"
    )
    return lines


def data_summary(config: TrainConfig, data: TrainingData) -> list[str]:
    lengths, counts = data.schedule.lengths, data.schedule.frames.all()
    epochs = config.trainer.max_steps * config.data.batch_size / len(lengths)
    lines = [f"{len(lengths)} training files, {epochs:.3g} epochs"]
    if data.errors:
        lines.append(f"  {len(data.errors)} files cannot be read and are skipped")
    lines += [f"  {note}" for note in data.notes]
    unused = int((lengths < counts[0]).sum())
    if unused:
        lines.append(f"  {unused} have fewer than {counts[0]} frames and are skipped")
    short = int((lengths < counts[-1]).sum()) - unused
    if short:
        lines.append(f"  {short} have fewer than {counts[-1]} frames and serve steps with fewer only")
    return lines


def _millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"

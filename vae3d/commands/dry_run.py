"""The part of vae3d.config.validate that needs the model: built on the meta device, without memory or weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from hydra.errors import InstantiationException
from torch import nn

from vae3d import loading
from vae3d.adversarial.base import Adversary
from vae3d.checkpoints.export import to_layout
from vae3d.checkpoints.formats import CheckpointError, read_checkpoint
from vae3d.commands import train
from vae3d.commands.summary import frame_counts
from vae3d.errors import UserError
from vae3d.inference import scale
from vae3d.losses.distillation import FeatureDistillation
from vae3d.losses.objective import Objective
from vae3d.metrics import METRICS, MetricError
from vae3d.metrics.registry import columns_of, find_files, resolve
from vae3d.models.compiled import blocks_of
from vae3d.models.forward import attach_decoder
from vae3d.models.interface import nearest_frames, share_frames
from vae3d.models.taehv import TAEHV
from vae3d.pretrained.weights import WeightsMissing
from vae3d.schedules import ALL_ON
from vae3d.training.distillation import Distillation, TeacherError
from vae3d.training.freeze import PartError, params_without_grad, train_parts
from vae3d.types import Clip, Reconstruction

if TYPE_CHECKING:
    from vae3d.config.schema import TrainConfig


def errors(config: TrainConfig) -> list[str]:
    """What does not fit between model, stage, losses and data."""
    found = list(_metric_errors(config))
    try:
        with torch.device("meta"):
            model = loading.instantiate(config.model)
            objective = train.objective(config.loss)
    except (InstantiationException, ValueError) as error:
        return [*dict.fromkeys(found), f"model or loss cannot be built: {_cause(error)}"]
    found += [*_size_errors(config, model), *_init_errors(config, model), *_layout_errors(config, model)]
    try:
        train_parts(model, config.stage.train)
    except PartError as error:
        return [*found, f"stage.train: {error}"]
    found += _frozen_random(config, model)
    found += _weight_errors(config, objective)
    if found:
        return list(dict.fromkeys(found))  # several terms and metrics may miss the same file
    try:
        distillation = train.distillation(config, teacher_on_meta(config), model)
        adversary = loading.instantiate(config.adversary)
    except InstantiationException as error:
        return [f"adversary cannot be built: {_cause(error)}"]
    except UserError as error:
        return [str(error)]
    found = [*_unread_features(distillation, objective), *_frame_errors(config, model, distillation)]
    return found or list(_step_errors(config, model, objective, adversary, distillation))


def _metric_errors(config: TrainConfig) -> Iterator[str]:
    """Metrics of the validation that do not exist, cannot score such clips, or miss their weights; and a best score
    that they do not give."""
    size, frames = min(config.data.height, config.data.width), config.validation.frames
    known = []
    for key in ("metrics", "slow_metrics"):
        try:
            names = resolve(getattr(config.validation, key))
        except MetricError as error:
            yield f"validation.{key}: {error}"
            return
        for name in names if config.validation.every else []:
            kind = METRICS[name].kind
            if size < kind.min_size:
                yield f"validation.{key}: {name} needs at least {kind.min_size} pixels; data has {size}"
            elif frames < kind.min_frames:
                yield f"validation.{key}: {name} needs validation.frames of at least {kind.min_frames}"
            else:
                yield from find_files([name])[1].get(name, ())
        known += names
    best, columns = config.trainer.best, columns_of(known)
    if best is not None and columns.get(best) is None:
        ranked = ", ".join(column for column, better in columns.items() if better is not None)
        yield (
            f"trainer.best={best} is no score that can be ranked of validation.metrics and validation.slow_metrics; "
            f"use one of {ranked or 'none, for there are no metrics'}, or name its metric there"
        )


def _layout_errors(config: TrainConfig, model: nn.Module) -> Iterator[str]:
    """What cannot be compiled or written of this model."""
    if config.trainer.compile and not blocks_of(model):
        yield f"trainer.compile=true: a {type(model).__name__} has no blocks that are known; use false"
    if config.trainer.publish.final_model and not isinstance(model, TAEHV):
        yield "trainer.publish.final_model is of TAEHV alone; use trainer.publish.prefix, or the export"
    if config.trainer.publish.measure_scale and (why := scale.unscalable_reason(model)):
        yield f"trainer.publish.measure_scale={config.trainer.publish.measure_scale}: {why}; use 0"
    if config.trainer.publish.prefix is not None:
        try:
            to_layout(model.state_dict(), config.trainer.publish.layout)
        except CheckpointError as error:
            yield f"trainer.publish.layout: {error}"


def meta_clip(frames: int, height: int, width: int) -> Clip:
    video = torch.zeros(1, 3, frames, height, width, device="meta")
    return Clip(video, torch.full((1,), -1), [""])


def _size_errors(config: TrainConfig, model: nn.Module) -> Iterator[str]:
    stride = model.spec.space_stride
    for side in ("height", "width"):
        size = getattr(config.data, side)
        if size % stride:
            near = " or ".join(str(s) for s in (size // stride * stride, -(-size // stride) * stride) if s)
            yield f"data.{side}={size} is not a multiple of the model's stride {stride}; use {near}"
    for count in frame_counts(config.data).all():
        if not model.frames_valid(count):
            yield f"data.frames: the model does not take {count} frames{_nearest(count, model.frames_valid)}"
            return


def teacher_on_meta(config: TrainConfig) -> nn.Module | None:
    """The teacher without weights. Raises CheckpointError if its checkpoint cannot be read."""
    if config.teacher.path is None:
        return None
    with torch.device("meta"):
        return loading.build_from_checkpoint(read_checkpoint(config.teacher.path))


def _frame_errors(config: TrainConfig, model: nn.Module, distillation: Distillation | None) -> Iterator[str]:
    """Frame counts that the teacher would extend, and latents that do not come in the same shape."""
    if distillation is None:
        return
    data, teacher = config.data, distillation.teacher
    size = (data.height, data.width)

    def fits(frames: int) -> bool:
        return share_frames(model, teacher, frames, *size)

    for count in frame_counts(data).all():
        if not fits(count):
            shapes = [_shape(network.latent_shape(count, *size)) for network in (teacher, model)]
            yield (
                f"data.frames: teacher and model do not both take {count} frames of {size[0]}x{size[1]} whole, to "
                f"latents of one shape (teacher {shapes[0]}, model {shapes[1]}){_nearest(count, fits)}"
            )
            return


def _unread_features(distillation: Distillation | None, objective: Objective) -> Iterator[str]:
    """Features that no loss term reads: their projections would get no gradient."""
    weights = [t.weight for t in objective.terms.values() if isinstance(t.term, FeatureDistillation)]
    if distillation is not None and distillation.features and not any(weights):
        yield "teacher.features: no loss term reads them; set loss.terms.features.weight, or leave them out"


def _nearest(count: int, fits: Callable[[int], bool]) -> str:
    """The four frame counts nearest to `count` that fit, to end a message with."""
    near = nearest_frames(count, fits)
    return f"; nearest are {', '.join(map(str, near))}" if near else ""


def _shape(latents: tuple[int, ...]) -> str:
    return "x".join(map(str, latents))


def _init_errors(config: TrainConfig, model: nn.Module) -> Iterator[str]:
    init = config.stage.init_from
    names = {name for name, _ in model.named_modules() if name}
    for name in init if isinstance(init, dict) else []:
        if name not in names:
            children = ", ".join(dict(model.named_children()))
            yield f"stage.init_from.{name}: the model has no such submodule; it has {children}"


def _frozen_random(config: TrainConfig, model: nn.Module) -> list[str]:
    """A frozen part with random weights would stay random."""
    init = config.stage.init_from
    given = [f"{name}." for name, path in init.items() if path != "random"] if isinstance(init, dict) else []
    if isinstance(init, str) and init != "random":
        return []
    covered = {id(p) for name, p in model.named_parameters() if name.startswith(tuple(given))}
    frozen = _parts_with(model, lambda p: not p.requires_grad and id(p) not in covered)
    if not frozen:
        return []
    return [f"stage {config.stage.name} freezes {', '.join(frozen)} with random weights; set stage.init_from"]


def _weight_errors(config: TrainConfig, objective: Objective) -> Iterator[str]:
    """Pretrained networks that loss terms measure with, and that are not here."""
    needed = [t.term.find_weights for t in objective.terms.values() if hasattr(t.term, "find_weights")]
    for find in needed:
        try:
            find()
        except WeightsMissing as error:
            yield str(error)


def _parts_with(model: nn.Module, holds: Callable[[nn.Parameter], bool]) -> list[str]:
    """Parts of the model that have a parameter of which `holds` is true."""
    return [
        part
        for part, modules in model.trainable_parts().items()
        if any(holds(parameter) for module in modules for parameter in module.parameters())
    ]


def _step_errors(
    config: TrainConfig,
    model: nn.Module,
    objective: Objective,
    adversary: Adversary,
    distillation: Distillation | None,
) -> Iterator[str]:
    """Forward and backward on shapes alone: do the terms apply, and does every trained part get a gradient?"""
    adversary.load(model, torch.device("meta"), config.run.seed, rank=0)
    counts = frame_counts(config.data).all()
    for frames in counts[:2]:  # one frame and several: what holds for two holds for more
        clip = meta_clip(frames, config.data.height, config.data.width)
        try:
            out, clip = _forward(model, clip, objective, distillation)
            loss, _ = objective(clip, out, ALL_ON)
        except (ValueError, RuntimeError, TeacherError) as error:
            yield f"loss: a clip of {frames} frames of {config.data.height}x{config.data.width} fails: {error}"
            return
        try:
            adversary.generator_loss(clip, out, loss, step=ALL_ON)
        except (ValueError, RuntimeError) as error:
            yield f"adversary: a clip of {frames} frames fails: {error}"
            return
        model.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if params_without_grad(model):
            parts = _parts_with(model, lambda p: p.requires_grad and p.grad is None)
            yield (
                f"stage.train: no loss term reaches {', '.join(parts)} on clips of {frames} frames; "
                "freeze it, or choose a loss that reads it"
            )
            return


def _forward(
    model: nn.Module, clip: Clip, objective: Objective, distillation: Distillation | None
) -> tuple[Reconstruction, Clip]:
    if distillation is None:
        return attach_decoder(model(clip.video, pixels=objective.needs_pixels), model), clip
    clip = distillation.compute_targets(clip)
    student = distillation.wrap_student(model, clip.video.shape[2])
    latents = distillation.latents(clip, step=0)
    out = student(clip.video, latents=latents, encode=objective.needs_posterior, pixels=objective.needs_pixels)
    return attach_decoder(out, model), clip


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"

"""Errors of a configuration that need the model, built on the meta device without memory or weights."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from torch import nn

from vae3d import loading
from vae3d.adversarial.base import Adversary
from vae3d.adversarial.gan import Gan
from vae3d.adversarial.seraena import Seraena
from vae3d.checkpoints.export import check_final_model, flat_state
from vae3d.checkpoints.formats import Checkpoint, CheckpointError, meta_model, read_checkpoint
from vae3d.commands import builders
from vae3d.commands.training_data import clip_sizes, pixel_channels
from vae3d.config.issues import NO_VALUE, ConfigIssue, is_within, raise_if_any
from vae3d.config.overrides import key_of
from vae3d.config.sources import of_source, sources_of
from vae3d.config.validate import training_issues
from vae3d.data.batches.aspects import AUTO
from vae3d.data.batches.batch_schedule import BatchShape
from vae3d.errors import UserError
from vae3d.latents import scale
from vae3d.losses.distillation import FeatureDistillation
from vae3d.losses.objective import Objective
from vae3d.metrics import METRICS, MetricError
from vae3d.metrics.base import Better
from vae3d.metrics.registry import columns_of, find_files, resolve
from vae3d.models.compiled import blocks_of
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import nearest_frames, share_frames
from vae3d.pretrained.weights import WeightsMissing, fetch_command, file_lines, find, search_path
from vae3d.pruning.layers import PruningError
from vae3d.pruning.match import match_layers
from vae3d.schedules import ALL_ON
from vae3d.text import plural
from vae3d.training.freeze import PartError, parameters_behind, train_parts
from vae3d.training.student import build_student, reconstruct
from vae3d.training.teacher import Distillation
from vae3d.training.vae_validation import BETTER
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    from vae3d.config.schema import TrainConfig

Size = tuple[int, int, int]  # frames, height and width of a clip


def issues(config: TrainConfig) -> list[ConfigIssue]:
    """What does not fit between model, stage, losses and data."""
    sizes = [size for _, size in _sizes(config)]
    found = list(_metric_issues(config, sizes))
    with torch.device("meta"):
        model = built("model", config, builders.build_model, found)
        objective = built("loss", config.loss, builders.build_objective, found)
    if model is None or objective is None:
        return found
    found += [
        *_channel_issues(config, model),
        *_size_issues(config, model),
        *_init_issues(config, model),
        *_layout_issues(config, model),
    ]
    try:
        train_parts(model, config.stage.train)
    except PartError as error:
        return [*found, ConfigIssue("stage.train", NO_VALUE, str(error))]
    found += [*_frozen_random(config, model), *_weight_issues(objective)]
    weights = [issue for issue in found if issue.weights]  # no reason to leave out the other checks
    found = [issue for issue in found if not issue.weights]
    return [*weights, *(found or _training_issues(config, model, objective, sizes))]


def check_bucket_sizes(config: TrainConfig, shapes: Sequence[BatchShape]) -> None:
    """Raises ConfigError for metrics, losses and an adversary that do not take clips of these shapes: with
    data.buckets.aspects=auto they follow from the data, which `issues` does not know."""
    sizes = sorted({(shape.frames, shape.height, shape.width) for shape in shapes})
    if {size for _, size in _sizes(config)}.issuperset(sizes):
        return
    with torch.device("meta"):
        model, objective = builders.build_model(config), builders.build_objective(config.loss)
    found = [*_metric_issues(config, sizes), *_training_issues(config, model, objective, sizes)]
    hint = "these are the data's aspect ratios: raise data.height and data.width, or list data.buckets.aspects"
    raise_if_any([replace(issue, hint=issue.hint or hint) for issue in found if not issue.weights])


def _training_issues(
    config: TrainConfig, model: nn.Module, objective: Objective, sizes: Sequence[Size]
) -> list[ConfigIssue]:
    """What does not fit between model, teacher, losses and adversary."""
    found: list[ConfigIssue] = []
    teacher = None
    try:
        if config.teacher.path is not None:
            with torch.device("meta"):
                teacher = loading.build_from_checkpoint(read_checkpoint(config.teacher.path))
        distillation = builders.build_distillation(config, teacher, model)
    except UserError as error:
        found.append(ConfigIssue("teacher", NO_VALUE, str(error)))
    adversary = built("adversary", config.adversary, loading.instantiate, found)
    if found:
        return found
    if distillation is not None:
        found = [*_unread_features(distillation, objective), *_shape_issues(config, model, distillation.teacher)]
    found += [*_replay_issues(config, adversary), *_adaptive_issues(objective, adversary)]
    return found or list(_step_issues(config, model, objective, adversary, distillation, sizes))


def built(key: str, node: Any, build: Callable[[Any], Any], found: list[ConfigIssue]) -> Any:
    """build(node), or None and an issue in `found`."""
    try:
        return build(node)
    except (InstantiationException, ValueError) as error:
        first: BaseException = error
        while first.__cause__ is not None and not isinstance(first, UserError):
            first = first.__cause__
        said = str(first) if isinstance(first, UserError) else f"{type(first).__name__}: {first}"
        found.append(ConfigIssue(key, NO_VALUE, f"cannot be built: {said}"))
        return None


def _metric_issues(config: TrainConfig, sizes: Sequence[Size]) -> Iterator[ConfigIssue]:
    """Metrics of the validation that do not exist, cannot score such clips, or lack their weights; and a best score
    that they do not give."""
    size, frames = min(min(size[1:]) for size in sizes), config.validation.frames
    known = []
    for name in ("metrics", "slow_metrics"):
        key, given = f"validation.{name}", getattr(config.validation, name)
        try:
            metrics = resolve(given)
        except MetricError as error:
            yield ConfigIssue(key, given, str(error))
            return
        for metric in metrics if config.validation.every else []:
            kind = METRICS[metric].kind
            if size < kind.min_size:
                yield ConfigIssue(key, given, f"{metric} needs at least {kind.min_size} pixels; data has {size}")
            elif frames < kind.min_frames:
                yield ConfigIssue(key, given, f"{metric} needs validation.frames of at least {kind.min_frames}")
            else:
                for names in METRICS[metric].files:
                    yield from _found(key, given, partial(find, *names))
        known += metrics
    best, columns = config.trainer.best, columns_of(known) | _other_columns(config)
    if best is not None and columns.get(best) is None:
        ranked = ", ".join(column for column, better in columns.items() if better is not None)
        yield ConfigIssue(
            "trainer.best",
            best,
            "is no score that this run computes and can rank",
            f"{f'use one of {ranked}, or ' if ranked else ''}add its metric to validation.metrics",
        )


def _other_columns(config: TrainConfig) -> dict[str, Better]:
    """Scores that the validation gives beside those of its metrics, and which values are better."""
    channels, depth = pixel_channels(config.model), config.data.depth.mapping is not None
    given = {
        "roll_psnr": config.validation.roll,
        "abs_rel": depth,
        "delta1": depth,
        "alpha_psnr": channels == 4,
        "other_psnr": channels > 4,
    }
    return {name: BETTER[name] for name, there in given.items() if there}


def _layout_issues(config: TrainConfig, model: nn.Module) -> Iterator[ConfigIssue]:
    """What cannot be compiled or written of this model."""
    publish = config.trainer.publish
    if config.trainer.compile and not blocks_of(model):
        yield ConfigIssue("trainer.compile", True, f"a {type(model).__name__} has no blocks to compile", "use false")
    weights = Checkpoint(config.model, model.state_dict(), Path("the model"), "export")
    if publish.final_model:
        try:
            check_final_model(weights)
        except CheckpointError as error:
            hint = "use trainer.publish.prefix, or the export"
            yield ConfigIssue("trainer.publish.final_model", True, str(error), hint)
    if publish.measure_scale and (why := scale.unscalable_reason(model)):
        yield ConfigIssue("trainer.publish.measure_scale", publish.measure_scale, why, "use 0")
    if publish.prefix is not None:
        try:
            flat_state(weights, publish.layout)
        except CheckpointError as error:
            yield ConfigIssue("trainer.publish.layout", publish.layout, str(error))


def _channel_issues(config: TrainConfig, model: nn.Module) -> Iterator[ConfigIssue]:
    """Channels that no file gives."""
    channels = pixel_channels(config.model)
    if config.data.depth.mapping is None and channels not in (3, 4):
        message = "files give 3 channels, colours, or 4, colours and alpha"
        yield ConfigIssue("model.pixel_channels", channels, message, "use 3 or 4, or data.depth.mapping for depth")


def _sizes(config: TrainConfig) -> list[tuple[str, tuple[int, int, int]]]:
    """(name of the source, frames, height and width) of all clips; see clip_sizes."""
    return [(name, size) for name, own in sources_of(config.data).items() for size in clip_sizes(own)]


def _size_issues(config: TrainConfig, model: nn.Module) -> Iterator[ConfigIssue]:
    stride = model.spec.space_stride
    sides: dict[str, int] = {}
    for name, own in sources_of(config.data).items():
        if own.buckets is None:
            sides |= {of_source(name, f"data.{side}"): getattr(own, side) for side in ("height", "width")}
        elif own.buckets.shapes is None:
            sides[of_source(name, "data.buckets.multiple")] = own.buckets.multiple
        else:
            for i, shape in enumerate(own.buckets.shapes):
                key = of_source(name, f"data.buckets.shapes[{i}]")
                sides |= {f"{key}.{side}": getattr(shape, side) for side in ("height", "width")}
    for key, size in sides.items():
        if size % stride:
            near = " or ".join(str(s) for s in (size // stride * stride, -(-size // stride) * stride) if s)
            message = f"is not a multiple of the model's stride {stride}"
            yield ConfigIssue(key, size, message, f"use {near}")
    yield from _frame_issues(
        config,
        lambda size: model.frames_valid(size[0]),
        lambda size: f"the model does not take {plural(size[0], 'frame')}",
    )


def _frame_issues(
    config: TrainConfig, fits: Callable[[Size], bool], message: Callable[[Size], str]
) -> Iterator[ConfigIssue]:
    """The first frame count of the data that does not fit, of each source, with the nearest that do."""
    for name, own in sources_of(config.data).items():
        for size in clip_sizes(own):
            if not fits(size):
                near = nearest_frames(size[0], lambda count, size=size: fits((count, *size[1:])))
                hint = f"nearest are {', '.join(map(str, near))}" if near else ""
                key = "data.frames" if own.buckets is None else "data.buckets"
                yield ConfigIssue(of_source(name, key), NO_VALUE, message(size), hint)
                break


def _shape_issues(config: TrainConfig, model: nn.Module, teacher: nn.Module) -> Iterator[ConfigIssue]:
    """Frame counts that the teacher would extend, and latents that do not come in the same shape."""

    def message(size: Size) -> str:
        shapes = ["x".join(map(str, network.latent_shape(*size))) for network in (teacher, model)]
        return (
            f"teacher and model do not both take {plural(size[0], 'frame')} of {size[1]}x{size[2]} whole, to latents "
            f"of one shape (teacher {shapes[0]}, model {shapes[1]})"
        )

    yield from _frame_issues(config, lambda size: share_frames(model, teacher, *size), message)


def _replay_issues(config: TrainConfig, adversary: Adversary) -> Iterator[ConfigIssue]:
    """Seraena keeps images of earlier steps, which must have one size."""
    if not isinstance(adversary, Seraena):
        return
    sizes = {size[1:] for _, size in _sizes(config)}
    for name, own in sources_of(config.data).items():
        auto = own.buckets is not None and own.buckets.shapes is None and AUTO in own.buckets.aspects
        if auto or len(sizes) > 1:
            key = "data.height" if own.buckets is None else "data.buckets"
            message = "Seraena keeps images of earlier steps beside those of this one, and the clips have several sizes"
            yield ConfigIssue(of_source(name, key), NO_VALUE, message, "use one size, or another adversary")
            return


def _adaptive_issues(objective: Objective, adversary: Adversary) -> Iterator[ConfigIssue]:
    """A GAN that takes its weight from the terms on pixels, and begins before any of them."""
    if not isinstance(adversary, Gan) or not (adversary.adaptive and adversary.weight and objective.needs_pixels):
        return
    first = adversary.start + (adversary.ramp > 0)  # whose weight is above 0
    if not any(t.term.needs_pixels and t.weight_at(first) for t in objective.terms.values()):
        message = "adversary.adaptive takes the weight from the terms on pixels, and at this step none has begun"
        hint = "begin a term before (loss.terms.NAME.ramp), or use adversary.adaptive=false"
        yield ConfigIssue("adversary.start", adversary.start, message, hint)


def _unread_features(distillation: Distillation, objective: Objective) -> Iterator[ConfigIssue]:
    """Features that no loss term reads: their projections would get no gradient."""
    weights = [t.weight for t in objective.terms.values() if isinstance(t.term, FeatureDistillation)]
    if distillation.features and not any(weights):
        hint = "set loss.terms.features.weight, or leave them out"
        yield ConfigIssue("teacher.features", NO_VALUE, "no loss term reads them", hint)


def _init_issues(config: TrainConfig, model: nn.Module) -> Iterator[ConfigIssue]:
    init = config.stage.init_from
    names = {name for name, _ in model.named_modules() if name}
    if isinstance(init, dict) and "prune" in init:
        yield from _prune_issues(init["prune"], model)
        return
    for name in init if isinstance(init, dict) else []:
        if name not in names:
            children = ", ".join(dict(model.named_children()))
            yield ConfigIssue(
                f"stage.init_from.{name}", NO_VALUE, "the model has no such submodule", f"it has {children}"
            )


def _prune_issues(path: str, model: nn.Module) -> Iterator[ConfigIssue]:
    """A larger model that does not load, or has other layers."""
    try:
        variant, adapter = getattr(model, "variant", None), isinstance(model, DiffusersVAE)
        source = meta_model(read_checkpoint(path, variant, adapter=adapter).config, path)
        match_layers(source, model, lambda runs: [names[:count] for names, count in runs])
    except (CheckpointError, PruningError) as error:
        yield ConfigIssue("stage.init_from.prune", path, str(error))


def _frozen_random(config: TrainConfig, model: nn.Module) -> Iterator[ConfigIssue]:
    """A frozen part with random weights would stay random."""
    init = config.stage.init_from
    if (isinstance(init, str) and init != "random") or (isinstance(init, dict) and "prune" in init):
        return
    given = [f"{name}." for name, path in init.items() if path != "random"] if isinstance(init, dict) else []
    covered = {id(p) for name, p in model.named_parameters() if name.startswith(tuple(given))}
    if frozen := _parts_with(model, lambda p: not p.requires_grad and id(p) not in covered):
        message = f"stage {config.stage.name} freezes {', '.join(frozen)} with random weights"
        yield ConfigIssue("stage.init_from", init, message, "set it to a checkpoint")


def _weight_issues(objective: Objective) -> Iterator[ConfigIssue]:
    """Pretrained networks of loss terms that are not on this machine."""
    for name, weighted in objective.terms.items():
        yield from _found(f"loss.terms.{name}", NO_VALUE, weighted.term.find_weights)


def _found(key: str, value: Any, find: Callable[[], Any]) -> Iterator[ConfigIssue]:
    """The error of a network whose file `find` does not find."""
    try:
        find()
    except WeightsMissing as error:
        yield ConfigIssue(key, value, str(error), weights=(error.name,) if error.name else ())


def lacking_weights(config: TrainConfig) -> list[str]:
    """Lines on the files of pretrained networks that the run will need and that are not here, for debug=dry."""
    clips = [size for _, size in _sizes(config)]
    with torch.device("meta"):
        found = [*_metric_issues(config, clips), *_weight_issues(builders.build_objective(config.loss))]
    if not (names := list(dict.fromkeys(name for issue in found for name in issue.weights))):
        return []
    return [
        "will need, and not on this machine:",
        *(f"  {line}" for line in file_lines(names)),
        f"  {fetch_command(names)}",
    ]


def missing_weights(config: TrainConfig, found: Sequence[ConfigIssue]) -> ConfigIssue:
    """One error for all that lack the file of a pretrained network, with the one command that fetches all files, and
    the settings that need none."""
    names = list(dict.fromkeys(name for issue in found for name in issue.weights))
    lines = [
        "pretrained networks are not on this machine",
        *file_lines(names),
        f"searched {', '.join(map(str, search_path()))}",
        f"fetch on a connected machine: {fetch_command(names)}",
    ]
    if not os.environ.get("VAE3D_WEIGHTS"):
        lines.append("or, if they are elsewhere: export VAE3D_WEIGHTS=FOLDER")
    if settings := _settings_without(config, found):
        lines.append(f"or go on without: {' '.join(map(shlex.quote, settings))}")
    return ConfigIssue(", ".join(dict.fromkeys(issue.key for issue in found)), NO_VALUE, "\n    ".join(lines))


def _settings_without(config: TrainConfig, found: Sequence[ConfigIssue]) -> list[str]:
    """Settings with which the command line runs without the missing files; [] if there are none.

    They are tried: the configuration is composed and checked with them, so a loss that does not fit model and stage is
    not offered.
    """
    settings = []
    if any(is_within(issue.key, "loss") for issue in found):
        if config.teacher.path is not None:  # a student learns its teacher's latents by terms that recon_kl lacks
            return []
        settings.append("loss=recon_kl")
    scores: list[str] = []
    for key in ("metrics", "slow_metrics"):
        names = resolve(getattr(config.validation, key))
        kept = [name for name in names if not find_files([name])[1]]
        scores += kept
        if kept != names:
            settings.append(f"validation.{key}=[{','.join(kept)}]")
    if config.trainer.best is not None and config.trainer.best not in columns_of(scores) | _other_columns(config):
        settings.append("trainer.best=null")
    if not (GlobalHydra.instance().is_initialized() and HydraConfig.initialized()):
        return []
    keys = [setting.partition("=")[0] for setting in settings]
    given = [o for o in HydraConfig.get().overrides.task if key_of(o) not in keys]
    try:
        changed, wrong = training_issues(compose("train", [*given, *settings]))
    except HydraException:  # such as loss.terms.lpips.weight=1 of the command line, for a term that is gone
        return []
    return [] if wrong or issues(changed) else settings


def _parts_with(model: nn.Module, holds: Callable[[nn.Parameter], bool]) -> list[str]:
    """Parts of the model that have a parameter of which `holds` is true and that no part before them has."""
    found, seen = [], set()
    for part, modules in model.trainable_parts().items():
        parameters = {parameter for module in modules for parameter in module.parameters()} - seen
        if any(map(holds, parameters)):
            found.append(part)
        seen |= parameters
    return found


def _step_issues(
    config: TrainConfig,
    model: nn.Module,
    objective: Objective,
    adversary: Adversary,
    distillation: Distillation | None,
    sizes: Sequence[Size],
) -> Iterator[ConfigIssue]:
    """Forward on shapes alone: do the terms apply, and does every trained part get a gradient?"""
    adversary.load(model, torch.device("meta"), config.run.seed, rank=0)
    sizes = sorted(set(sizes))
    counts = sorted({size[0] for size in sizes})[:2]  # the two smallest: what holds for two holds for more
    tried = [next(size for size in sizes if size[0] == count) for count in counts]
    tried.append(min(sizes, key=lambda size: min(size[1:])))
    for frames, height, width in dict.fromkeys(tried):
        batch = ClipBatch(
            torch.zeros(1, model.pixel_channels, frames, height, width, device="meta"), torch.full((1,), -1), [""]
        )
        try:
            student, _ = build_student(config, model, objective, distillation, frames)
            batch, out = reconstruct(config, student, model, objective, distillation, batch, ALL_ON)
            loss, _ = objective(batch, out, ALL_ON)
        except (ValueError, RuntimeError) as error:
            yield ConfigIssue(
                "loss", NO_VALUE, f"a clip of {plural(frames, 'frame')} of {height}x{width} fails: {error}"
            )
            return
        try:
            adversary.generator_loss(batch, out, loss, step=ALL_ON)
        except (ValueError, RuntimeError) as error:
            clip = f"a clip of {plural(frames, 'frame')} of {height}x{width}"
            yield ConfigIssue("adversary", NO_VALUE, f"{clip} fails: {error}")
            return
        if missed := {p for p in model.parameters() if p.requires_grad} - parameters_behind(loss):
            parts = _parts_with(model, missed.__contains__)
            message = f"no loss term reaches {', '.join(parts)} on clips of {plural(frames, 'frame')}"
            yield ConfigIssue("stage.train", NO_VALUE, message, "freeze it, or choose a loss that reads it")
            return

"""Model, losses and teacher of a training configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vae3d.loading import instantiate
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.models.interface import VideoAutoencoder
from vae3d.precision import DTYPES
from vae3d.training.teacher import Distillation

if TYPE_CHECKING:
    from vae3d.config.schema import Loss, TrainConfig


def build_model(config: TrainConfig) -> VideoAutoencoder:
    """With random weights; it codes clips whole with stage.no_micro_batching."""
    model = instantiate(config.model)
    if config.stage.no_micro_batching and hasattr(model, "micro_frames"):
        model.micro_frames = None
    return model


def build_objective(config: Loss) -> Objective:
    """The loss; terms of weight 0 are built only if they are logged."""
    terms = {
        name: WeightedTerm(
            instantiate(term.term, f"loss.terms.{name}.term"), term.weight, tuple(term.ramp), term.log, term.reduction
        )
        for name, term in config.terms.items()
        if term.weight or term.log
    }
    weight = config.pixel_weight and instantiate(config.pixel_weight, "loss.pixel_weight")
    return Objective(terms, config.reduction, weight, logvar=config.logvar)


def build_distillation(config: TrainConfig, teacher: nn.Module | None, student: nn.Module) -> Distillation | None:
    if teacher is None:
        return None
    settings = config.teacher
    return Distillation(
        teacher,
        student,
        dtype=DTYPES[settings.precision],
        sample=settings.sample,
        decode=settings.decode,
        features=settings.features,
        seed=config.run.seed,
        cache=settings.cache,
        cache_gib=settings.cache_gib,
    )

"""The module that a training step calls, and its forward pass; commands/step_cost.py counts and meta_check.py tries
the same two functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae3d.losses.objective import Objective
from vae3d.models.interface import VideoAutoencoder, attach_decoder
from vae3d.precision import DTYPES
from vae3d.training.freeze import set_mode, train_parts
from vae3d.training.teacher import Distillation, StudentWithProjections
from vae3d.types import ClipBatch, Reconstruction

if TYPE_CHECKING:
    from vae3d.config.schema import TrainConfig


def build_student(
    config: TrainConfig,
    network: VideoAutoencoder,
    objective: Objective,
    distillation: Distillation | None,
    frames: int,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Freeze what config.stage does not train. Returns the module to train, and the optimizer's parameter groups.

    The module is the network or, if a teacher's features are matched, the network with projections. Groups have `part`
    and `lr_scale`: those of train_parts, then the projections and the learned log-variance, if there are any. frames:
    of the longest clips. Raises PartError as train_parts does, and TeacherError for features that do not match.
    """
    device, precision = next(network.parameters()).device, config.trainer.precision
    groups = train_parts(network, config.stage.train)
    set_mode(network, config.stage.train)
    turn_on_autocast(network, device, precision)
    student: nn.Module = network
    if distillation is not None:
        student = distillation.wrap_student(network, frames)
    if isinstance(student, StudentWithProjections):
        turn_on_autocast(student, device, precision)
        groups.append({"params": list(student.projections.parameters()), "part": "projections", "lr_scale": 1.0})
    if objective.logvar is not None:
        logvar = {"params": [objective.logvar], "part": "logvar", "lr_scale": config.loss.logvar_lr}
        groups.append({**logvar, "weight_decay": 0.0})
    return student, groups


def turn_on_autocast(module: nn.Module, device: torch.device, precision: str) -> None:
    """Make the module's own forward run in `precision`, except on the meta device, which has no autocast.

    An autocast around it would not do: DeepSpeed turns that off, and loss terms call the network outside of it.
    """
    if precision != "fp32" and device.type != "meta":
        module.forward = torch.autocast(device.type, DTYPES[precision])(module.forward)


def reconstruct(
    config: TrainConfig,
    student: nn.Module,
    network: VideoAutoencoder,
    objective: Objective,
    distillation: Distillation | None,
    batch: ClipBatch,
    step: int,
    host_pixels: Tensor | None = None,
) -> tuple[ClipBatch, Reconstruction]:
    """Forward pass of a step. Returns the clips, with the teacher's targets, and what the losses are given.

    student: of build_student, maybe wrapped by a strategy. network: the one inside, which loss terms call. batch: on
    the device. host_pixels: see `pixels` of Distillation.compute_targets.
    """
    settings: dict[str, Any] = {
        "pixels": objective.needs_pixels,
        "noise": config.stage.latent_noise,
        "generator": batch.generators(config.run.seed, batch.video.device),
    }
    if distillation is not None:
        batch = distillation.compute_targets(batch, host_pixels)
        settings["latents"] = distillation.latents(batch, step)
        settings["encode"] = objective.needs_posterior
    return batch, attach_decoder(student(batch.video, **settings), network)

"""Adversary interface, a no-op, and what the adversaries share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae3d.arguments import ArgumentError
from vae3d.distributed import all_reduce_mean
from vae3d.types import Clip, Reconstruction


class UpdatePhase(NamedTuple):
    """Which networks a step updates."""

    generator: bool
    discriminator: bool


class Adversary(Protocol):
    """Discriminators with their optimizer and state.

    The generator's loss uses a frozen discriminator, the discriminator's loss detached reconstructions. In each step
    the trainer computes and differentiates both for every micro-batch, then calls `sync_remaining`, and then, on all
    ranks alike, `step` or `reset_step`. `step` and `generator_loss` may communicate between ranks; `sync_remaining`
    makes up for the calls of generator_loss that this rank skipped.
    """

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        """Build on the device of training; called once, before anything else.

        model: the generator, with its frozen parts frozen. seed: the run's.
        """

    def update_phase(self, step: int) -> UpdatePhase: ...

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss to add to the objective's `loss`, and metrics."""

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]: ...

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        """Join the collectives of generator_loss calls that this rank skipped in this step (memory, files)."""

    def step(self) -> None:
        """Average the discriminator's gradients over ranks, update it and zero the gradients."""

    def reset_step(self) -> None:
        """Zero the gradients and drop all else that this optimizer step computed."""

    def state_dict(self) -> dict[str, Any]:
        """State that is equal on all ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def rank_state_dict(self) -> dict[str, Any]:
        """State of this rank alone, such as a replay buffer; may be empty."""

    def load_rank_state_dict(self, state: dict[str, Any]) -> None: ...


class NoAdversary:
    """Trains without a discriminator."""

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        pass

    def update_phase(self, step: int) -> UpdatePhase:
        return UpdatePhase(generator=True, discriminator=False)

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros((), device=clip.video.device), {}

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("there is no discriminator")

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        pass

    def step(self) -> None:
        raise AssertionError("there is no discriminator")

    def reset_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary has the state of a discriminator, and this run has none")

    rank_state_dict = state_dict
    load_rank_state_dict = load_state_dict


def require_pair(name: str, clip: Clip, out: Reconstruction) -> tuple[Tensor, Tensor]:
    """The clip's pixels and their reconstruction, [B, 3, T, H, W]. name: of the adversary, for errors.

    Raises ValueError if there is no reconstruction, or one of another size, or one without gradient.
    """
    if out.video is None:
        raise ValueError(f"{name} needs reconstructed pixels, but no loss term does; add one, such as loss=recon_kl")
    real, fake = list(clip.video.shape), list(out.video.shape)
    if fake != real:
        raise ValueError(f"the clip is {real}, its reconstruction {fake}; they must agree")
    return clip.video, out.video


def require_grad(name: str, out: Reconstruction) -> None:
    """Raises ValueError if the reconstruction has no gradient to train the generator with."""
    if not out.video.requires_grad:
        raise ValueError(f"no trained part reaches the pixels, on which {name} works; use adversary=none")


def update_discriminator(
    discriminator: nn.Module,
    optimizer: Optimizer,
    buffers: Mapping[str, Tensor],
    grad_clip: float | None,
    *,
    also_reduce: Sequence[Tensor] = (),
) -> float:
    """Average gradients, `buffers` and `also_reduce` over ranks, clip, and step; returns the norm before clipping.

    buffers: the discriminator's running statistics after this step's micro-batches. Each rank normalised by its own
    clips, so all continue with the mean. If the norm is not finite (on all ranks alike), nothing is updated.
    """
    parameters = list(discriminator.parameters())
    statistics = [buffer for buffer in buffers.values() if buffer.is_floating_point()]
    all_reduce_mean([*(p.grad for p in parameters), *statistics, *also_reduce])
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    if math.isfinite(norm):
        optimizer.step()
        for name, buffer in discriminator.named_buffers():
            buffer.copy_(buffers[name])
    return norm


def check_settings(
    settings: Mapping[str, Any], choices: Mapping[str, Collection[str]], minimums: Mapping[str, float]
) -> None:
    """Raises ValueError for an adversary's setting that is not among its choices or below its minimum."""
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise ValueError(f"adversary.{key} is {settings[key]!r}; use {' or '.join(allowed)}")
    for key, minimum in minimums.items():
        if settings[key] < minimum:
            raise ValueError(f"adversary.{key} is {settings[key]}; use {minimum} or more")
    if settings["discriminator_start"] > settings["start"]:
        raise ValueError(
            f"adversary.discriminator_start is {settings['discriminator_start']}, after "
            f"adversary.start={settings['start']}: the generator would train against random weights; use that or less, "
            "or null"
        )

"""The seam through which adversarial training enters the training step, and its absence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae3d.arguments import ArgumentError
from vae3d.distributed import all_reduce_mean
from vae3d.types import Clip, Reconstruction


class UpdatePhase(NamedTuple):
    """Who is updated in a step."""

    generator: bool
    discriminator: bool


class Adversary(Protocol):
    """Owns its networks, their optimizer and all their state.

    The discriminator is frozen in the generator's pass, and sees detached reconstructions in its own. In an optimizer
    step the two losses are asked for each micro-batch and differentiated by the trainer; then comes `sync_remaining`, and
    after it either `step`, on all ranks, or `reset_step`, on all ranks. `step` may communicate, and so may
    `generator_loss`, as long as `sync_remaining` makes up for a rank that could not call it.
    """

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        """Move to the device that training runs on; called once, before anything else. model: what trains, as its
        stage has frozen it. seed: the run's."""

    def update_phase(self, step: int) -> UpdatePhase: ...

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss to add to the objective's `loss`, and metrics."""

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]: ...

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        """Take part in what other ranks ask of each other in their generator losses of this step, as often as this
        rank has not: memory or files may have failed it. Called on every rank."""

    def step(self) -> None:
        """Average the discriminator's gradients over ranks, update it and clear them."""

    def reset_step(self) -> None:
        """Forget the gradients, and what else of this optimizer step was kept: it is skipped."""

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def rank_state_dict(self) -> dict[str, Any]:
        """What every rank has of its own, such as a replay buffer; empty if there is nothing."""

    def load_rank_state_dict(self, state: dict[str, Any]) -> None: ...


def require_pair(name: str, clip: Clip, out: Reconstruction) -> tuple[Tensor, Tensor]:
    """The clip's pixels and their reconstruction, [B, 3, T, H, W]; name: of who reads them.

    Raises ValueError if there is none, or of another size.
    """
    if out.video is None:
        raise ValueError(f"{name} reads pixels, which no loss term asks for; add one on pixels, such as loss=recon_kl")
    real, fake = list(clip.video.shape), list(out.video.shape)
    if fake != real:
        raise ValueError(f"the clip is {real}, its reconstruction {fake}; they must agree")
    return clip.video, out.video


def update(
    discriminator: nn.Module,
    optimizer: Optimizer,
    buffers: Mapping[str, Tensor],
    grad_clip: float | None,
    *,
    also: Sequence[Tensor] = (),
) -> float:
    """Average gradients, `buffers` and `also` over ranks, clip, and step; the gradient's norm before clipping.

    Where it is not finite, on all ranks alike, nothing of the discriminator changes. buffers: of the discriminator, as
    the step's micro-batches left them; each rank's norms have normalised by its own clips, so the mean of their
    statistics is what all go on with.
    """
    parameters = list(discriminator.parameters())
    all_reduce_mean([*(p.grad for p in parameters), *(b for b in buffers.values() if b.is_floating_point()), *also])
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    if math.isfinite(norm):
        optimizer.step()
        for name, buffer in discriminator.named_buffers():
            buffer.copy_(buffers[name])
    return norm


class NoAdversary:
    """Plain reconstruction training: the generator's turn, always, and nothing to add to its loss."""

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        pass

    def update_phase(self, step: int) -> UpdatePhase:
        return UpdatePhase(generator=True, discriminator=False)

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros((), device=clip.video.device), {}

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("it is never the discriminator's turn")

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        pass

    def step(self) -> None:
        raise AssertionError("it is never the discriminator's turn")

    def reset_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary is that of a discriminator, and this run has none")

    def rank_state_dict(self) -> dict[str, Any]:
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary is that of a discriminator, and this run has none")

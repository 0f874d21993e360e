"""The seam through which adversarial training enters the training step, and its absence."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vae3d.types import Clip, Reconstruction


class Turn(NamedTuple):
    """Who is updated in a step."""

    generator: bool
    discriminator: bool


class Adversary(Protocol):
    """Owns its networks, their optimizer and all their state.

    The discriminator is frozen in the generator's pass, and sees detached reconstructions in its own.
    """

    def turn(self, step: int) -> Turn: ...

    def generator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss to add to the objective, and metrics."""

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]: ...

    def step(self) -> None:
        """Update the discriminator and clear its gradients."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NoAdversary:
    """Plain reconstruction training: the generator's turn, always, and nothing to add to its loss."""

    def turn(self, step: int) -> Turn:
        return Turn(generator=True, discriminator=False)

    def generator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros((), device=clip.video.device), {}

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("it is never the discriminator's turn")

    def step(self) -> None:
        raise AssertionError("it is never the discriminator's turn")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, "a checkpoint with a discriminator was given to a run without one"

"""How ranks share a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vae3d import distributed
from vae3d.distributed import RanksDiffer


class Strategy(ABC):
    """Runs backward passes, and updates the weights with the gradients of all ranks.

    In each step `run_guarded` is called, or `skip_local` on a rank without data; then, on all ranks,
    `average_gradients` and `clip_gradients` if the model trains and all losses are finite; then `finish_step`, or
    `discard_gradients` if there is nothing to update. A strategy whose ranks have state of their own also has
    rank_state_dict and load_rank_state_dict, see checkpointer.Stateful.

    model: what a step calls. optimizer: of the weights that this rank updates.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def run_guarded(self, forward_backward: Callable[[], None]) -> str | None:
        """Run this rank's forward and backward passes. Returns the error message if memory runs out."""

    @abstractmethod
    def skip_local(self) -> None:
        """Called instead of run_guarded by a rank without data."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def no_update(self) -> AbstractContextManager[None]:
        """Inside, a step of one micro-batch leaves no trace."""

    @abstractmethod
    def average_gradients(self) -> None:
        """Average over ranks, and undo fp16 loss scaling."""

    @abstractmethod
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Returns the norm before clipping, on the device; 0 if it is known after finish_step only."""

    @abstractmethod
    def skips_overflow(self) -> bool:
        """Whether finish_step leaves the weights as they are if a gradient is not finite."""

    @abstractmethod
    def finish_step(self, grad_norm: float) -> tuple[bool, float]:
        """Update the weights and drop the gradients. grad_norm: from clip_gradients.

        Returns whether the weights changed, and the norm before clipping.
        """

    @abstractmethod
    def discard_gradients(self) -> None:
        """Drop the gradients of a step that does not update the weights."""

    @abstractmethod
    def can_skip_step(self) -> bool:
        """Whether a step that is not applied leaves no trace."""

    @abstractmethod
    def params_without_grad(self) -> list[str]:
        """Names of trainable parameters that the backward pass inside no_update did not reach."""

    @abstractmethod
    def params_with_grad(self) -> list[str]:
        """Names of parameters that have a gradient; none if that is unknown."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State that all ranks share."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ResumeError for the state of another strategy."""


def check_same_weights(model: nn.Module) -> None:
    """Raises RanksDiffer unless all ranks begin with the same weights."""
    if not distributed.is_distributed():
        return
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    differs = distributed.max_minus_min(sums) > 1e-9 * (1 + sums.abs())  # different GPUs may add in another order
    if bool(differs.any()):
        names = [name for (name, _), bad in zip(model.named_parameters(), differs.tolist(), strict=True) if bad]
        raise RanksDiffer(
            f"{len(names)} parameters, such as {names[0]}, differ between ranks before the first step; do all ranks "
            "read the same stage.init_from and the same run.seed?"
        )

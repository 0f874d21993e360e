"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.schedules import ema_decay


class Ema:
    """Shadow copies of `model`'s trainable parameters; frozen ones never differ and are not kept.

    decay 0 keeps no shadow: `state_dict` is empty and `applied` changes nothing. warmup: see
    schedules.ema_decay. every: update after every n-th step, with the decay of n steps.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True, every: int = 1) -> None:
        self.decay, self.warmup, self.every = decay, warmup, every
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (0-based)."""
        if not self.shadow or (step + 1) % self.every:
            return
        decay = ema_decay(step, decay=self.decay, warmup=self.warmup) ** self.every
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            p.data, self.shadow[name] = self.shadow[name], p.data

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.shadow.keys():
            raise UserError(
                f"the checkpoint holds averages of {len(state)} parameters, this run keeps {len(self.shadow)}; "
                "trainer.ema cannot be turned on or off in the middle of a run"
            )
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])

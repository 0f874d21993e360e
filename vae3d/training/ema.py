"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.restore import check_like
from vae3d.schedules import ema_decay


class Ema:
    """Shadow copies of `model`'s trainable parameters; frozen ones never differ and are not kept.

    decay 0 keeps no shadow: `state_dict` is empty and `applied` changes nothing. warmup: see
    schedules.ema_decay. every: update after every n-th step, with the decay of n steps. device: where the shadow
    lies, `model` or `cpu`. In host memory it costs no GPU memory but one parameter's at a time: it is averaged on the
    model's device all the same, copied there and back in stream order, so that the processor waits for nothing.
    """

    def __init__(
        self, model: nn.Module, decay: float, warmup: bool = True, every: int = 1, device: str = "model"
    ) -> None:
        self.decay, self.warmup, self.every, self.on_host = decay, warmup, every, device == "cpu"
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.shadow = {
            name: _pinned(p.detach()) if self.on_host else p.detach().clone() for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (0-based)."""
        if not self.shadow or (step + 1) % self.every:
            return
        weight = 1.0 - ema_decay(step, decay=self.decay, warmup=self.warmup) ** self.every
        if not self.on_host:
            torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), weight)
            return
        for name, p in self.parameters.items():
            average = self.shadow[name].to(p.device, non_blocking=True)
            self.shadow[name].copy_(average.lerp_(p, weight), non_blocking=True)

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
            if self.on_host:
                average = self.shadow[name].to(p.device, non_blocking=True, copy=True)
                self.shadow[name].copy_(p, non_blocking=True)
                p.copy_(average)
            else:
                p.data, self.shadow[name] = self.shadow[name], p.data

    def state_dict(self) -> dict[str, Tensor]:
        self._wait()
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises UserError if only one of both keeps averages, ArgumentError for averages of other parameters."""
        if bool(state) != bool(self.shadow):
            raise UserError(
                f"the checkpoint holds averages of {len(state)} parameters, this run keeps {len(self.shadow)}; "
                "trainer.ema cannot be turned on or off in the middle of a run"
            )
        check_like(state, self.shadow, "ema")
        self._wait()
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])

    def _wait(self) -> None:
        """Until copies to and from host memory have arrived; everything on the GPU is in order by itself."""
        if self.on_host and torch.cuda.is_available():
            torch.cuda.synchronize()


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in host memory, from where a GPU copies without the processor's help."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)

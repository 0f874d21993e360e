"""Exponential moving averages of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.arguments import check_value
from vae3d.checkpoints.state import ResumeError
from vae3d.restore import check_like
from vae3d.schedules import ema_decay


class Ema:
    """Averages of `model`'s trainable parameters; frozen ones never change and are not stored.

    decay: 0 stores nothing: `state_dict` is empty and `applied` does nothing. warmup: see schedules.ema_decay. every:
    update after every n-th step, with the decay of n steps. device: `model` stores the averages beside the weights;
    `cpu` in pinned host memory, from where each is copied to the GPU to be updated, without blocking the CPU.
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
        """Update after optimizer step `step` (0-based)."""
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
        """Inside this context the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self._wait()  # a state_dict of before holds this memory, and is written from the CPU

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            if self.on_host:
                average = self.shadow[name].to(p.device, non_blocking=True, copy=True)
                self.shadow[name].copy_(p, non_blocking=True)
                p.copy_(average)
            else:
                p.data, self.shadow[name] = self.shadow[name], p.data

    def in_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages of `state`, a state_dict of this object, under the keys of the model's state_dict.

        A parameter that the model has under two names is there under both.
        """
        names = {parameter: name for name, parameter in self.parameters.items()}
        entries = model.state_dict(keep_vars=True).items()
        return {key: state[names[value]] for key, value in entries if value in names}

    def state_dict(self) -> dict[str, Tensor]:
        self._wait()
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], name: str = "ema") -> None:
        """Raises ResumeError if EMA was turned on or off, ArgumentError for averages of other parameters."""
        check_value(state, Mapping, name)
        if bool(state) != bool(self.shadow):
            raise ResumeError(
                f"the checkpoint has averages of {len(state)} parameters, this run of {len(self.shadow)}; trainer.ema "
                "cannot be turned on or off when a run resumes"
            )
        check_like(state, self.shadow, name)
        self._wait()
        for parameter, shadow in self.shadow.items():
            shadow.copy_(state[parameter])

    def _wait(self) -> None:
        """Wait for copies to and from host memory; on the GPU everything is in stream order."""
        if self.on_host and torch.cuda.is_available():
            torch.cuda.synchronize()


class MultiEma:
    """Averages of one model at several decay rates (EDM2, Karras et al., 2024); the first is used for validation."""

    def __init__(self, model: nn.Module, rates: Sequence[float], **settings: Any) -> None:
        self.rates = {rate: Ema(model, rate, **settings) for rate in rates}

    def update(self, step: int) -> None:
        for ema in self.rates.values():
            ema.update(step)

    def applied(self) -> AbstractContextManager[None]:
        return next(iter(self.rates.values())).applied()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {str(rate): ema.state_dict() for rate, ema in self.rates.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Raises ResumeError for other rates, and as Ema does."""
        check_value(state, Mapping[str, Mapping], "ema")
        names = {str(rate): ema for rate, ema in self.rates.items()}
        if state.keys() != names.keys():
            raise ResumeError(
                f"has averages at the rates {', '.join(state)}, but trainer.ema.rates={list(names)}; they cannot be "
                "changed when a run resumes"
            )
        for name, ema in names.items():
            ema.load_state_dict(state[name], f"ema['{name}']")


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)

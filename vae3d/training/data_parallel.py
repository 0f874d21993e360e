"""Data parallelism in which a step that fails on one rank is skipped by all.

torch's DistributedDataParallel all-reduces during backward, so a rank that runs out of memory there leaves the others
hanging (pytorch#44353). Here each rank runs forward and backward by itself. In one all-reduce of a small table, a row
per rank, all agree that every rank finished with finite losses. Then gradients are averaged and clipped, and all decide
alike, without further communication, whether to apply the step. DDP's overlap would save the time of one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import distributed
from vae3d.arguments import check_value
from vae3d.checkpoints.state import ResumeError
from vae3d.restore import check_like, load_optimizer
from vae3d.training.freeze import params_without_grad
from vae3d.training.memory import catch_out_of_memory, free_cache
from vae3d.training.strategy import Strategy, check_same_weights


class ReplicatedDataParallel(Strategy):
    """Every rank holds the whole model and optimizer."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = {p: name for name, p in model.named_parameters()}
        self._names = [names.get(p, f"parameter {number}") for number, p in enumerate(self.parameters)]
        self._unscaled = False
        # Allocated here, not when it is needed: then all ranks have agreed on the step, and would wait for one that has
        # no memory for it.
        self._buffer = distributed.reduction_buffer(self.parameters)
        check_same_weights(model)

    def run_guarded(self, forward_backward: Callable[[], None]) -> str | None:
        _, error = catch_out_of_memory(forward_backward)
        if error is not None:
            self.optimizer.zero_grad()
            free_cache()
        return error

    def skip_local(self) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    @contextmanager
    def no_update(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.discard_gradients()

    def average_gradients(self) -> None:
        distributed.all_reduce_mean((p.grad for p in self.parameters if p.grad is not None), self._buffer)
        self.accelerator.unscale_gradients()
        self._unscaled = True

    def clip_gradients(self, max_norm: float) -> Tensor:
        # Accelerate's own would unscale fp16 gradients, which are unscaled already.
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def skips_overflow(self) -> bool:
        """An fp16 loss scaler does, and lowers its scale; at 1 that cannot help any more."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def finish_step(self, grad_norm: float) -> tuple[bool, float]:
        self.optimizer.step()
        self._unscaled = False
        self.optimizer.zero_grad()
        # Accelerate's step_was_skipped is False for a fused optimizer, which skips inside of its own step.
        return math.isfinite(grad_norm), grad_norm

    def discard_gradients(self) -> None:
        if self._unscaled and self.accelerator.scaler is not None:  # a scaler must not unscale twice
            self.accelerator.scaler.update()
        self._unscaled = False
        self.optimizer.zero_grad()

    def can_skip_step(self) -> bool:
        return True

    def params_without_grad(self) -> list[str]:
        return params_without_grad(self.model)

    def params_with_grad(self) -> list[str]:
        return [name for name, p in zip(self._names, self.parameters, strict=True) if p.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state == {}:
            raise ResumeError("holds its optimizer in DeepSpeed's shards; go on with the same trainer/strategy")
        load_optimizer(self.optimizer, state)


class ScalerState:
    """State of the fp16 loss scaler; empty without one, so that trainer.precision may change when a run resumes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_value(state, Mapping[str, float], "scaler")
        if state and self.accelerator.scaler is not None:
            check_like(state, self.accelerator.scaler.state_dict(), "scaler")
            self.accelerator.scaler.load_state_dict(state)

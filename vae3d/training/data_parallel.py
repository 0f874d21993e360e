"""Data parallelism in which a step that fails on one rank is skipped by all.

torch's DistributedDataParallel all-reduces during backward, so a rank that runs out of memory there leaves the others
hanging (pytorch#44353). Here each rank runs forward and backward by itself, a one-row all-reduce decides whether the
step counts, and then gradients are averaged. What DDP's overlap would save is the time of one all-reduce.
"""

from __future__ import annotations

import hashlib
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
from vae3d.distributed import RanksDiffer
from vae3d.restore import check_like
from vae3d.training.freeze import params_without_grad
from vae3d.training.memory import catch_out_of_memory, free_cache
from vae3d.training.optim import load_optimizer_state


class ReplicatedDataParallel:
    """Every rank holds the whole model and optimizer.

    model: what a step calls. In each step `run_guarded` is called, or `skip_local` on a rank without data; then, on all
    ranks, `average_gradients` and `clip_gradients` if the generator trains and all losses are finite; then
    `optimizer.step`, or `discard_gradients` if the step is skipped.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = {p: name for name, p in model.named_parameters()}
        self._names = [names.get(p, f"parameter {number}") for number, p in enumerate(self.parameters)]
        self._unscaled = False
        self.grad_norm = 0.0  # before clipping
        check_same_weights(model)

    def run_guarded(self, forward_backward: Callable[[], None]) -> str | None:
        """Run this rank's forward and backward passes. Returns the error message if memory runs out."""
        self._unscaled = False
        _, error = catch_out_of_memory(forward_backward)
        if error is not None:
            self.optimizer.zero_grad()
            free_cache()
        return error

    def skip_local(self) -> None:
        """Called instead of run_guarded by a rank without data."""

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Inside, a step leaves no trace: its gradients are dropped at the end."""
        try:
            yield
        finally:
            self.discard_gradients()

    def average_gradients(self) -> None:
        """Average over ranks, and undo fp16 loss scaling."""
        distributed.all_reduce_mean(p.grad for p in self.parameters if p.grad is not None)
        self.accelerator.unscale_gradients()
        self._unscaled = True

    def clip_gradients(self, max_norm: float) -> float:
        """The norm before clipping; 0 under an fp16 loss scaler unless its scale is 1, since it skips overflows."""
        # Accelerate's own would unscale fp16 gradients, which are unscaled already.
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.parameters, max_norm))
        scaler = self.accelerator.scaler
        return 0.0 if scaler is not None and scaler.get_scale() > 1 else self.grad_norm

    def step_was_applied(self) -> bool:
        """Whether the last optimizer.step changed the weights: an fp16 loss scaler skips gradients that overflowed."""
        # Accelerate's step_was_skipped is False for a fused optimizer, which skips inside of its own step.
        return math.isfinite(self.grad_norm)

    def discard_gradients(self) -> None:
        """Drop the gradients of a step that is skipped."""
        if self._unscaled and self.accelerator.scaler is not None:  # a scaler must not unscale twice
            self.accelerator.scaler.update()
        self._unscaled = False
        self.optimizer.zero_grad()

    def can_skip_step(self) -> bool:
        """Whether a step that is not taken leaves no trace."""
        return True

    def params_without_grad(self) -> list[str]:
        """Names of trainable parameters that the last backward pass did not reach."""
        return params_without_grad(self.model)

    def params_with_grad(self) -> list[str]:
        return [name for name, p in zip(self._names, self.parameters, strict=True) if p.grad is not None]

    def gradient_digest(self) -> int:
        """Digest of the set of parameters that have a gradient on this rank; exact in a float64."""
        flags = bytes(p.grad is not None for p in self.parameters)
        return int.from_bytes(hashlib.blake2b(flags, digest_size=6).digest(), "big")

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state == {}:
            raise ResumeError("holds its optimizer in DeepSpeed's shards; go on with the same trainer/strategy")
        load_optimizer_state(self.optimizer, state)


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

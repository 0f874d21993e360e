"""Data parallelism that survives a rank's bad step: every rank holds the whole model, and gradients are averaged in one
explicit all-reduce once all ranks have agreed to take the step.

torch's DistributedDataParallel averages while backward runs, so a rank that leaves backward early, out of memory or
after a NaN, leaves the others waiting for ever (pytorch#44353). What its overlap would save is the time of one
all-reduce.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import distributed
from vae3d.checkpoints.state import ResumeError, from_weights
from vae3d.restore import load_optimizer
from vae3d.training.agreement import RanksDiffer
from vae3d.training.freeze import without_gradient
from vae3d.training.memory import attempted, release


class Replicas:
    """model: what training calls. optimizer: what steps.

    In a step comes `run_guarded` or, for a rank that cannot take part, `skip_local`; once all ranks have voted, either
    `average_gradients`, `clip` and `step`, or `skip`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._finite = True  # the gradient that was clipped last
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = {p: name for name, p in model.named_parameters()}
        self._names = [names.get(p, f"parameter {number}") for number, p in enumerate(self.parameters)]
        check_same_weights(model)

    can_skip_steps = True  # a step that a rank could not finish leaves no trace

    def run_guarded(self, run: Callable[[], None]) -> str | None:
        """run(), this rank's forward and backward passes; what it said if memory ran out in them."""
        _, error = attempted(run)
        if error is not None:
            self.optimizer.zero_grad()
            release()
        return error

    def skip_local(self) -> None:
        """In place of `run_guarded`, for a rank without clips; nobody waits for it before the vote."""

    rehearsal_clips = 1

    def params_without_grad(self) -> list[str]:
        """Trainable parameters without a gradient."""
        return without_gradient(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def gradients(self) -> int:
        """Digest, exact in a float64, of the set of parameters that have a gradient on this rank."""
        flags = bytes(p.grad is not None for p in self.parameters)
        return int.from_bytes(hashlib.blake2b(flags, digest_size=6).digest(), "big")

    def with_gradient(self) -> list[str]:
        """The names of those parameters."""
        return [name for name, p in zip(self._names, self.parameters, strict=True) if p.grad is not None]

    def average_gradients(self) -> None:
        """Over ranks, and as they were before an fp16 scaler."""
        distributed.all_reduce_mean(p.grad for p in self.parameters if p.grad is not None)
        self.accelerator.unscale_gradients()

    def clip(self, max_norm: float) -> float:
        """Clip the gradients; their norm before."""
        # Accelerate's own would unscale fp16 gradients, which are unscaled already.
        norm = float(nn.utils.clip_grad_norm_(self.parameters, max_norm))
        self._finite = math.isfinite(norm)
        return norm

    def step(self) -> bool:
        """Whether the optimizer stepped; an fp16 scaler skips what overflowed, and learns from it."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Accelerate's step_was_skipped is False for a fused optimizer, which skips inside of its own step.
        return self._finite

    def skip(self, unscaled: bool) -> None:
        """Forget the gradients. unscaled: average_gradients was called, which an fp16 scaler must not meet twice."""
        if unscaled and self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def rank_state(self) -> dict[str, Any]:
        """What this rank has of its own: nothing."""
        return {}

    def load_optimizer(self, state: Mapping[str, Any], own: Mapping[str, Any], checkpoint: Path) -> None:
        """Raises ResumeError if the checkpoint was written under another strategy, ArgumentError if its state does not
        fit."""
        if not state:
            raise ResumeError(
                f"{checkpoint} holds its optimizer in DeepSpeed's shards; go on with the same trainer/strategy, or "
                f"start anew from its weights: {from_weights(checkpoint)}"
            )
        load_optimizer(self.optimizer, state)


def check_same_weights(model: nn.Module) -> None:
    """Raises RanksDiffer unless all ranks begin with the same weights."""
    if not distributed.is_distributed():
        return
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    differs = distributed.max_minus_min(sums) > 1e-9 * (1 + sums.abs())  # GPUs of two kinds may add in another order
    if bool(differs.any()):
        names = [name for (name, _), bad in zip(model.named_parameters(), differs.tolist(), strict=True) if bad]
        raise RanksDiffer(
            f"{len(names)} parameters, such as {names[0]}, differ between ranks before the first step; do all ranks "
            "read the same stage.init_from and the same run.seed?"
        )

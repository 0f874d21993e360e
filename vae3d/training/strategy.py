"""How ranks share a step: the interface, and data parallelism. deepspeed.py has another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import distributed
from vae3d.arguments import check_value
from vae3d.checkpoints.state import ResumeError
from vae3d.distributed import RanksDiffer
from vae3d.restore import check_like, load_optimizer
from vae3d.training.freeze import params_without_grad
from vae3d.training.memory import catch_out_of_memory, free_cache


class Strategy(ABC):
    """Runs backward passes, and updates the weights with the gradients of all ranks.

    In each step `run_guarded` is called, or `skip_local` on a rank without data; then, on all ranks,
    `average_gradients` and `clip_gradients` if the model trains and all losses are finite; then `optimizer.step` and
    `finish_step`, or `discard_gradients` if there is nothing to update. A strategy whose ranks have state of their own
    also has rank_state_dict and load_rank_state_dict, see checkpointer.Stateful.

    model: what a step calls. optimizer: has `step` and `param_groups`.
    """

    model: nn.Module
    optimizer: Any

    @abstractmethod
    def run_guarded(self, forward_backward: Callable[[], None]) -> str | None:
        """Run this rank's forward and backward passes. Returns the error message if memory runs out."""

    @abstractmethod
    def skip_local(self) -> None:
        """Called instead of run_guarded by a rank without data."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def no_update(self, micro_batches: int) -> AbstractContextManager[None]:
        """Inside, a step of so many micro-batches leaves no trace."""

    @abstractmethod
    def average_gradients(self) -> None:
        """Average over ranks, and undo fp16 loss scaling."""

    @abstractmethod
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Returns the norm before clipping, on the device; 0 if it is known after finish_step only. None: no limit."""

    def loss_scale(self) -> dict[str, Tensor]:
        """loss_scale: the factor of an fp16 loss scaler, on the device; empty without one."""
        return {}

    @abstractmethod
    def skips_overflow(self, loss_scale: float | None) -> bool:
        """Whether optimizer.step leaves the weights as they are if a gradient is not finite."""

    @abstractmethod
    def finish_step(self, grad_norm: float) -> tuple[bool, float]:
        """Called after optimizer.step: drop the gradients. grad_norm: from clip_gradients.

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


class ReplicatedDataParallel(Strategy):
    """Every rank holds the whole model and optimizer; a step that fails on one rank is skipped by all.

    torch's DistributedDataParallel all-reduces during backward, so a rank that runs out of memory there leaves the
    others hanging (pytorch#44353). Here each rank runs forward and backward by itself. In one all-reduce of a small
    table, a row per rank, all agree that every rank finished with finite losses. Then gradients are averaged and
    clipped, and all decide alike, without further communication, whether to apply the step. DDP's overlap would save
    the time of one all-reduce.

    reduce_dtype: in which gradients are summed over ranks. bfloat16 halves the traffic; each sum is rounded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = {p: name for name, p in model.named_parameters()}
        self._names = [names.get(p, f"parameter {number}") for number, p in enumerate(self.parameters)]
        self._unscaled = False
        self._reduce_dtype = reduce_dtype
        # Allocated here, not when it is needed: then all ranks have agreed on the step, and would wait for one that has
        # no memory for it.
        self._buffer = distributed.reduction_buffer(self.parameters, reduce_dtype)
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
    def no_update(self, micro_batches: int) -> Iterator[None]:
        try:
            yield
        finally:
            self.discard_gradients()

    def average_gradients(self) -> None:
        gradients = (p.grad for p in self.parameters if p.grad is not None)
        distributed.all_reduce_mean(gradients, self._buffer, self._reduce_dtype)
        self.accelerator.unscale_gradients()
        self._unscaled = True

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        # Accelerate's own would unscale fp16 gradients, which are unscaled already.
        return nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def loss_scale(self) -> dict[str, Tensor]:
        scaler = self.accelerator.scaler
        if scaler is None:
            return {}
        return {"loss_scale": scaler.scale(torch.ones((), device=self.accelerator.device))}  # get_scale() would wait

    def skips_overflow(self, loss_scale: float | None) -> bool:
        """An fp16 loss scaler does, and lowers its scale; at 1 that cannot help any more."""
        return loss_scale is not None and loss_scale > 1

    def finish_step(self, grad_norm: float) -> tuple[bool, float]:
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


def check_same_weights(model: nn.Module) -> None:
    """Raises RanksDiffer unless all ranks begin with the same weights."""
    if not distributed.is_distributed():
        return
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    sums = sums.nan_to_num(1e300, 2e300, -2e300)  # numbers that compare: no NaN is greater than another number
    differs = distributed.max_minus_min(sums) > 1e-9 * (1 + sums.abs())  # different GPUs may add in another order
    if bool(differs.any()):
        names = [name for (name, _), bad in zip(model.named_parameters(), differs.tolist(), strict=True) if bad]
        raise RanksDiffer(
            f"{len(names)} parameters, such as {names[0]}, differ between ranks before the first step; do all ranks "
            "read the same stage.init_from and the same run.seed?"
        )


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

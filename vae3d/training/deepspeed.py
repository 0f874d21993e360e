"""DeepSpeed's ZeRO-2 in place of replicas: gradients and optimizer state shared out among the ranks.

The weights are fp32 on every rank and half precision is autocast, so that checkpoints, averages and exports are those
of Replicas. Each rank saves the tensors of its own shard; DeepSpeed's checkpoint files would need code to be unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import distributed
from vae3d.checkpoints.state import ResumeError, from_weights
from vae3d.errors import UserError
from vae3d.restore import load_optimizer
from vae3d.training.data_parallel import check_same_weights
from vae3d.training.memory import first_line, out_of_memory, release


class StrategyError(UserError):
    """A DeepSpeed configuration that cannot be used."""


class PeerFailed(Exception):
    """Another rank has left the step before its backward pass."""


class Zero:
    """See Replicas, whose methods these are. told: DeepSpeed's configuration, without what is filled in here.

    DeepSpeed averages gradients while backward runs. So the ranks ask each other before each backward pass whether all
    have got there: where one has no clips, or no memory, all leave the step. What went before of its micro-batches
    cannot be taken back, so that for want of memory the run must be restarted.
    Raises StrategyError for keys that DeepSpeed does not know, or if it clips otherwise than `grad_clip` says.
    """

    can_skip_steps = False

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        told: Mapping[str, Any],
        *,
        micro_batch: int,
        accumulate: int,
        grad_clip: float,
    ) -> None:
        deepspeed = import_deepspeed(accelerator.device)
        check_known_keys(told)
        check_same_weights(model)
        filled = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "train_batch_size": micro_batch * accumulate * accelerator.num_processes,
            "gradient_clipping": grad_clip,
        }
        self.accelerator = accelerator
        join_alone(accelerator.device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={**told, **filled}, dist_init_required=False
        )
        if self.engine.gradient_clipping() != grad_clip or self.optimizer.clip_grad != grad_clip:
            raise StrategyError(f"DeepSpeed clips at {self.optimizer.clip_grad}, not at optim.grad_clip={grad_clip}")
        self.optimizer.check_grad_overflow = True  # which DeepSpeed turns off for fp32 weights
        self.model = self.engine
        self.rehearsal_clips = self.accumulate = accumulate  # DeepSpeed drops whole steps only
        self._backwards, self._in_backward = 0, False

    def run_guarded(self, run: Callable[[], None]) -> str | None:
        """run(); what it said if memory ran out here before a backward pass.

        In a backward pass the error is raised on: the others are waiting inside of it, and torchrun must end them.
        """
        reason, self._backwards = None, 0
        try:
            run()
        except PeerFailed:  # the other rank tells of it in the vote
            pass
        except (RuntimeError, MemoryError) as error:
            if self._in_backward or not out_of_memory(error):
                raise
            reason = first_line(error)
        if reason is not None:
            release()
            if self._backwards < self.accumulate:  # after the last one nobody waits before the vote
                distributed.all_ranks_ok(False, self.accelerator.device)
        return reason

    def skip_local(self) -> None:
        """In place of `run_guarded`, for a rank without clips: the others need not wait for its backward pass."""
        self._backwards = 0
        distributed.all_ranks_ok(False, self.accelerator.device)

    def params_without_grad(self) -> list[str]:
        """Not known: DeepSpeed takes gradients away as soon as they are there."""
        return []

    def backward(self, loss: Tensor) -> None:
        """Raises PeerFailed if another rank has failed meanwhile."""
        if not distributed.all_ranks_ok(True, loss.device):
            raise PeerFailed
        self._backwards, self._in_backward = self._backwards + 1, True
        self.engine.set_gradient_accumulation_boundary(self._backwards == self.accumulate)
        self.engine.backward(loss, scale_wrt_gas=False)
        self._in_backward = False

    def gradients(self) -> int:
        """0: the gradients are DeepSpeed's, which holds their shards."""
        return 0

    def with_gradient(self) -> list[str]:
        return []

    def average_gradients(self) -> None:
        """Done while backward ran."""

    def clip(self, max_norm: float) -> float:
        """DeepSpeed clips inside of its step, so this is the step; the norm before, infinite if it was dropped."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def step(self) -> bool:
        return not self.optimizer.overflow

    def skip(self, unscaled: bool) -> None:
        """Let DeepSpeed drop gradients that `clip` has not met, as it drops those that are not finite."""
        if not unscaled and self._backwards == self.accumulate:
            self._spoil()
            self.engine.step()

    def _spoil(self) -> None:
        """Make DeepSpeed find all gradients that it holds not finite."""
        if self.optimizer.cpu_offload:
            self.optimizer.local_overflow = True
            return
        for gradients in self.optimizer.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(torch.nan)

    def optimizer_state(self) -> dict[str, Any]:
        """Nothing that all ranks share."""
        return {}

    def rank_state(self) -> dict[str, Any]:
        """This rank's shard: the fp32 weights that it updates, flat, and their moments."""
        inner = self.optimizer.optimizer.state_dict()
        return {"optimizer": inner, "partitions": list(self.optimizer.single_partition_of_fp32_groups)}

    def load_optimizer(self, state: Mapping[str, Any], own: Mapping[str, Any], checkpoint: Path) -> None:
        """Raises ResumeError if the checkpoint's shards are not this run's."""
        partitions = self.optimizer.single_partition_of_fp32_groups
        saved = own.get("partitions", [])
        if [getattr(p, "shape", None) for p in saved] != [p.shape for p in partitions]:
            raise ResumeError(
                f"{checkpoint} holds no optimizer shards for rank {self.accelerator.process_index} of "
                f"{self.accelerator.num_processes}; DeepSpeed's go on with the same number of ranks and the same "
                f"strategy only. To start anew from its weights: {from_weights(checkpoint)}"
            )
        load_optimizer(self.optimizer.optimizer, own.get("optimizer"), "strategy.optimizer")
        with torch.no_grad():
            for mine, theirs in zip(partitions, saved, strict=True):
                mine.copy_(theirs)


def import_deepspeed(device: torch.device) -> Any:
    """Raises StrategyError if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise StrategyError(
            "trainer/strategy=deepspeed_... needs DeepSpeed, which cannot be imported "
            f"({error}); pip install -e .[deepspeed], or leave trainer/strategy at ddp"
        ) from error
    return deepspeed


def join_alone(device: torch.device) -> None:
    """Make a process group of this process, if it is in none: one GPU, for the sake of the offloaded optimizer."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed insists on
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def check_known_keys(told: Mapping[str, Any]) -> None:
    """DeepSpeed checks the keys inside of zero_optimization, but passes over others that it does not know.

    Raises StrategyError, also for those that are filled in from the run's settings.
    """
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization"}
    filled = {
        "train_micro_batch_size_per_gpu": "data.batch_size",
        "train_batch_size": "data.batch_size",
        "gradient_accumulation_steps": "trainer.accumulate",
        "gradient_clipping": "optim.grad_clip",
        "optimizer": "optim",
        "scheduler": "optim.schedule",
        "bf16": "trainer.precision",
        "fp16": "trainer.precision",
        "amp": "trainer.precision",
        "torch_autocast": "trainer.precision",
    }
    errors = [f"{key} is set by {filled[key]}" for key in told if key in filled]
    errors += [f"DeepSpeed has no key {key}" for key in told if key not in known]
    if told.get("zero_optimization", {}).get("stage") not in (1, 2):
        errors.append("zero_optimization.stage must be 1 or 2: other stages communicate inside of forward passes too")
    if errors:
        raise StrategyError("trainer.strategy.deepspeed: " + "; ".join(errors))

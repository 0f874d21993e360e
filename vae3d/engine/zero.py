"""DeepSpeed's ZeRO-2 in place of replicas: gradients and optimizer state shared out among the ranks.

The weights are fp32 on every rank and half precision is autocast, so that checkpoints, averages and exports are those
of Replicas. Each rank saves the tensors of its own shard; DeepSpeed's checkpoint files would need code to be unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import ranks
from vae3d.checkpoints.state import ResumeError, from_weights
from vae3d.engine.memory import out_of_memory, release
from vae3d.engine.replicas import refuse_different_starts
from vae3d.errors import UserError

FAILED, UNSOUND, WELL = 0, 1, 2  # what ranks tell each other before a backward pass, of which the lowest counts
AUTOCAST = {"no": None, "bf16": torch.bfloat16}


class StrategyError(UserError):
    """A DeepSpeed configuration that cannot be used."""


class PeerFailed(Exception):
    """Another rank ran out of memory before its backward pass."""


class Zero:
    """See Replicas, whose methods these are. told: DeepSpeed's configuration, without what is filled in here.

    DeepSpeed averages gradients while backward runs. So the ranks tell each other how they fared before each backward
    pass: where a loss is not finite, all ranks make it NaN, whose step DeepSpeed drops everywhere; where one is out of
    memory, all leave the step, whose earlier micro-batches cannot be taken back: the run must be restarted.
    Raises StrategyError for keys that DeepSpeed does not know, or if it clips otherwise than `grad_clip` says.
    """

    recovers = False

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
        refuse_unknown_keys(told)
        refuse_different_starts(model)
        filled = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "train_batch_size": micro_batch * accumulate * accelerator.num_processes,
            "gradient_clipping": grad_clip,
        }
        self.accelerator, self.dtype = accelerator, AUTOCAST[accelerator.mixed_precision]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={**told, **filled}, dist_init_required=False
        )
        if self.engine.gradient_clipping() != grad_clip or self.optimizer.clip_grad != grad_clip:
            raise StrategyError(f"DeepSpeed clips at {self.optimizer.clip_grad}, not at optim.grad_clip={grad_clip}")
        self.rehearsal_clips = self.accumulate = accumulate  # DeepSpeed drops whole steps only
        self._backwards, self._in_backward, self._rehearses = 0, False, False

    def model(self, video: Tensor, **how: Any) -> Any:
        with self._autocast():
            return self.engine(video, **how)

    def attempt(self, run: Callable[[], None]) -> str | None:
        """run(); what it said if memory ran out here before a backward pass.

        In a backward pass the error is raised on: the others are waiting inside of it, and torchrun must end them.
        """
        fault, self._backwards = None, 0
        try:
            run()
        except PeerFailed:
            release()  # the other rank tells of it in the vote
        except (RuntimeError, MemoryError) as error:
            if self._in_backward or not out_of_memory(error):
                raise
            fault = str(error).splitlines()[0]
            ranks.lowest(FAILED, self.accelerator.device)
        if fault is not None:
            release()
        return fault

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside this context gradients become NaN, so that DeepSpeed drops them."""
        self._rehearses = True
        try:
            yield
        finally:
            self._rehearses = False

    def unreached(self) -> list[str]:
        """Not known: DeepSpeed takes gradients away as soon as they are there."""
        return []

    def backward(self, loss: Tensor) -> None:
        """Raises PeerFailed if another rank has failed meanwhile."""
        verdict = ranks.lowest(WELL if bool(loss.isfinite()) else UNSOUND, loss.device)
        if verdict == FAILED:
            raise PeerFailed
        self._backwards, self._in_backward = self._backwards + 1, True
        self.engine.set_gradient_accumulation_boundary(self._backwards == self.accumulate)
        poisoned = verdict == UNSOUND or self._rehearses
        self.engine.backward(loss * float("nan") if poisoned else loss, scale_wrt_gas=False)
        self._in_backward = False

    def gradients(self) -> int:
        """0: the gradients are DeepSpeed's, which holds their shards."""
        return 0

    def average_gradients(self) -> None:
        """Done while backward ran."""

    def clip(self, max_norm: float) -> float:
        """DeepSpeed clips inside of its step, so this is the step; the norm before, infinite if it was dropped."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def step(self) -> bool:
        return not self.optimizer.overflow

    def skip(self, unscaled: bool) -> None:
        """Let DeepSpeed drop gradients that `clip` has not met: they are NaN."""
        if not unscaled and self._backwards == self.accumulate:
            self.engine.step()
        self._backwards = 0

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
        if [p.shape for p in saved] != [p.shape for p in partitions]:
            raise ResumeError(
                f"{checkpoint} holds no optimizer shards for rank {self.accelerator.process_index} of "
                f"{self.accelerator.num_processes}; DeepSpeed's go on with the same number of ranks and the same "
                f"strategy only. To start anew from its weights: {from_weights(checkpoint)}"
            )
        self.optimizer.optimizer.load_state_dict(own["optimizer"])
        self.refresh(saved)

    @torch.no_grad()
    def refresh(self, partitions: list[Tensor] | None = None) -> None:
        """Give DeepSpeed the weights that the model holds now. partitions: this rank's, if they were saved."""
        if partitions is None:
            self.optimizer.refresh_fp32_params()
        else:
            for mine, saved in zip(self.optimizer.single_partition_of_fp32_groups, partitions, strict=True):
                mine.copy_(saved)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(
            self.accelerator.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        )


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


def refuse_unknown_keys(told: Mapping[str, Any]) -> None:
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
    }
    faults = [f"{key} is set by {filled[key]}" for key in told if key in filled]
    faults += [f"DeepSpeed has no key {key}" for key in told if key not in known]
    if told.get("zero_optimization", {}).get("stage") not in (1, 2):
        faults.append("zero_optimization.stage must be 1 or 2: other stages communicate inside of forward passes too")
    if faults:
        raise StrategyError("trainer.strategy.deepspeed: " + "; ".join(faults))

"""DeepSpeed's ZeRO-2: gradients and optimizer state are sharded over ranks.

Weights are fp32 on every rank and half precision is autocast, so checkpoints, averages and exports are those of
ReplicatedDataParallel. Each rank saves its shard as plain tensors; DeepSpeed's own checkpoints need unsafe unpickling.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import distributed
from vae3d.arguments import check_fields
from vae3d.checkpoints.state import ResumeError
from vae3d.errors import UserError
from vae3d.restore import load_optimizer
from vae3d.training.memory import first_line, free_cache, is_out_of_memory
from vae3d.training.strategy import Strategy, check_same_weights


class StrategyError(UserError):
    """A DeepSpeed configuration that cannot be used."""


class RankFailed(Exception):
    """Another rank left the step before its backward pass."""


class _RankState(TypedDict):
    optimizer: Mapping[str, Any]
    partitions: Sequence[Tensor]


class DeepSpeedZero(Strategy):
    """ZeRO-2.

    DeepSpeed averages gradients during backward, so ranks agree before each backward pass that all reached it; if one
    has no data or no memory, all leave the step. It cannot undo a backward pass: a step that fails later ends the run.

    config: DeepSpeed's own, without what is filled in here. optimizer: its parameters become this rank's partitions,
    flat and fp32.
    Raises StrategyError for keys that DeepSpeed does not have.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        *,
        micro_batch: int,
        accumulate: int,
        grad_clip: float | None,
    ) -> None:
        deepspeed = import_deepspeed(accelerator.device)
        check_keys(config)
        check_same_weights(model)
        filled = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "train_batch_size": micro_batch * accumulate * accelerator.num_processes,
            "gradient_clipping": grad_clip or 0.0,
        }
        self.accelerator = accelerator
        init_single_process(accelerator.device)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={**config, **filled}, dist_init_required=False
        )
        self.engine.optimizer.check_grad_overflow = True  # which DeepSpeed 0.19 turns off for fp32 weights
        self.model, self.sharded = self.engine, optimizer
        self.optimizer = EngineOptimizer(self.engine, optimizer)
        self._accumulate = accumulate
        self._backwards, self._in_backward = 0, False  # backward passes begun in this step
        self._without_grad: list[str] = []  # in the last pass inside no_update

    def run_guarded(self, forward_backward: Callable[[], None]) -> str | None:
        """Run this rank's forward and backward passes. Returns an error message if memory runs out between backwards.

        Inside a backward pass the error propagates: the other ranks wait in it, and torchrun must end them.
        """
        self._backwards, self._in_backward, message = 0, False, None
        try:
            forward_backward()
        except RankFailed:  # the other rank reports why
            pass
        except (RuntimeError, MemoryError) as error:
            if self._in_backward or not is_out_of_memory(error):
                raise
            message = first_line(error)
        if message is not None:
            free_cache()
            if self._backwards < self._accumulate:  # after the last backward pass no rank waits
                distributed.all_ranks_ok(False, self.accelerator.device)
        return message

    def skip_local(self) -> None:
        self._backwards = 0
        distributed.all_ranks_ok(False, self.accelerator.device)

    def backward(self, loss: Tensor) -> None:
        """Raises RankFailed if another rank failed meanwhile."""
        if not distributed.all_ranks_ok(True, loss.device):
            raise RankFailed
        self._backwards, self._in_backward = self._backwards + 1, True
        self.engine.set_gradient_accumulation_boundary(self._backwards == self._accumulate)
        self.engine.backward(loss, scale_wrt_gas=False)
        self._in_backward = False

    @contextmanager
    def no_update(self, micro_batches: int) -> Iterator[None]:
        """Inside, gradients are computed without the engine, and dropped."""
        accumulate, backward = self._accumulate, self.backward

        def compute_gradients(loss: Tensor) -> None:
            if not distributed.all_ranks_ok(True, loss.device):
                raise RankFailed
            self._backwards += 1
            parameters = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            self._without_grad = [n for n, g in zip(parameters, gradients, strict=True) if g is None]

        self.model, self._accumulate, self.backward = self.engine.module, micro_batches, compute_gradients
        try:
            yield
        finally:
            self.model, self._accumulate, self.backward = self.engine, accumulate, backward
            self._backwards = 0

    def average_gradients(self) -> None:
        """Nothing: backward did it."""

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Nothing: optimizer.step clips."""
        return torch.zeros((), device=self.accelerator.device)

    def skips_overflow(self, loss_scale: float | None) -> bool:
        return True

    def finish_step(self, grad_norm: float) -> tuple[bool, float]:
        if not self.engine.was_step_applied():
            return False, math.inf  # the engine's norm may be that of the step before
        return True, float(self.engine.get_global_grad_norm())

    def discard_gradients(self) -> None:
        """Nothing: DeepSpeed cannot drop finite gradients, see can_skip_step."""

    def can_skip_step(self) -> bool:
        """Only if no backward pass ran in it."""
        return self._backwards == 0

    def params_without_grad(self) -> list[str]:
        return self._without_grad

    def params_with_grad(self) -> list[str]:
        """Unknown: DeepSpeed takes gradients away during backward."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state != {}:
            raise ResumeError("holds a whole optimizer, not DeepSpeed's shards; go on with the same trainer/strategy")

    def rank_state_dict(self) -> dict[str, Any]:
        """This rank's shard: the flat fp32 weights that it updates, and their moments."""
        return {"optimizer": self.sharded.state_dict(), "partitions": self.partitions()}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ResumeError if the checkpoint has no shard for this rank, ArgumentError for another form."""
        partitions = self.partitions()
        if not state:
            raise ResumeError(
                f"has no optimizer shard for rank {self.accelerator.process_index} of "
                f"{self.accelerator.num_processes}; DeepSpeed resumes with the same number of ranks and the same "
                "trainer/strategy only"
            )
        check_fields(state, _RankState, key="optimizer")
        if [getattr(p, "shape", None) for p in state["partitions"]] != [p.shape for p in partitions]:
            raise ResumeError("has optimizer shards of another size; DeepSpeed resumes with the same number of ranks")
        load_optimizer(self.sharded, state["optimizer"], "optimizer.optimizer")
        with torch.no_grad():
            for mine, saved in zip(partitions, state["partitions"], strict=True):
                mine.copy_(saved)

    def partitions(self) -> list[Tensor]:
        return [p for group in self.sharded.param_groups for p in group["params"]]


class EngineOptimizer:
    """A DeepSpeed engine's step under the names of torch's optimizers.

    sharded: the optimizer given to deepspeed.initialize; its parameters are then this rank's flat fp32 partitions.
    """

    def __init__(self, engine: Any, sharded: torch.optim.Optimizer) -> None:
        self.engine, self.sharded = engine, sharded

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.sharded.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:
        return self.sharded.state

    def step(self) -> None:
        """Clip, update this rank's partitions, gather the weights, and clear the gradients."""
        self.engine.step()


def import_deepspeed(device: torch.device) -> Any:
    """Raises StrategyError if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise StrategyError(
            f"trainer/strategy=deepspeed_... needs DeepSpeed, which cannot be imported ({error}); "
            "pip install -e .[deepspeed], or use trainer/strategy=replicated"
        ) from error
    return deepspeed


def init_single_process(device: torch.device) -> None:
    """Create a process group of one, which DeepSpeed needs, unless torchrun has created one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def check_keys(config: Mapping[str, Any]) -> None:
    """DeepSpeed checks the keys inside zero_optimization, but ignores unknown ones beside it.

    Raises StrategyError, also for keys that are filled in from the run's settings.
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
    errors = [f"{key} is set by {filled[key]}" for key in config if key in filled]
    errors += [f"DeepSpeed has no key {key}" for key in config if key not in known]
    if config.get("zero_optimization", {}).get("stage") not in (1, 2):
        errors.append("zero_optimization.stage must be 1 or 2: other stages communicate inside forward passes too")
    if errors:
        raise StrategyError("trainer.strategy.deepspeed: " + "; ".join(errors))

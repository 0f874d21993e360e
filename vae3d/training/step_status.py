"""What a step computed, and how it went, which all ranks agree on before any of them updates its weights.

completed: every rank ran the forward and backward passes of all its micro-batches. finite: completed, and the losses of
all ranks are finite. applied: the weights were updated. A step may be finite and not applied: its loss is a spike, or
its gradient overflowed. A step that is not applied is skipped by all ranks, and changes no weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from vae3d import distributed
from vae3d.arguments import Size, check_value
from vae3d.data.media import DataError
from vae3d.distributed import RanksDiffer
from vae3d.errors import UserError
from vae3d.training.failures import SpikeGuard
from vae3d.transfer import host_buffer, read


class StepMetrics:
    """Values of one step, kept on the device. A name that only some micro-batches have is averaged over those."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    @property
    def names(self) -> list[str]:
        return sorted(self._values)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value.detach().float())

    def losses(self) -> dict[str, Tensor]:
        """StatusTable.LOSSES: `loss` is a mean over micro-batches, the others are maxima; NaN if one is NaN."""
        losses = {}
        if "loss" in self._values:
            values = torch.stack(self._values["loss"])
            losses = {"loss": values.mean(), "largest": values.max()}
        if "loss_discriminator" in self._values:
            losses["largest_discriminator"] = torch.stack(self._values["loss_discriminator"]).max()
        return losses

    def means(self) -> dict[str, Tensor]:
        """By name, the mean over micro-batches, a scalar on the device."""
        return {name: torch.stack(values).mean() for name, values in self._values.items()}


class MeanMeter:
    """Between two log lines: means of the metrics of applied steps, and `skipped`, the number of the other steps."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, float], *, applied: bool) -> None:
        self._values["skipped"].append(float(not applied))
        for name, value in metrics.items() if applied else ():
            self._values[name].append(value)

    def flush(self) -> dict[str, float]:
        skipped = sum(self._values.pop("skipped", []))
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return {**means, "skipped": skipped}

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        check_value(state, Mapping[str, Annotated[Sequence[Real], Size(1, 10**6)]], "meter")
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})


class Decision(NamedTuple):
    """Whether to apply the step. If not, the reason, and the ranks on which it lies.

    error: raised to stop the run instead of skipping the step.
    """

    apply: bool
    reason: str = ""
    ranks: tuple[int, ...] = ()
    error: UserError | None = None


@dataclass(frozen=True)
class StepStatus:
    """How a step went on all ranks.

    loss: mean over ranks. largest: by rank, the largest loss of any micro-batch; neither counts unless `finite`.
    out_of_memory, unreadable: ranks that could not complete the step. no_data: ranks whose data loader failed.
    not_finite: ranks with a loss, also of the discriminator, that is NaN or infinite. stop: signal that a rank
    received, or 0. read_errors: number of failed reads. mismatch: a gradient or metric that only some ranks have, and
    which ranks; empty if there is none. metrics: means over ranks; meaningless unless `completed`. adversary_error:
    see Adversary.error. saving: whether a rank is still writing a checkpoint.
    """

    loss: float
    largest: tuple[float, ...]
    out_of_memory: tuple[int, ...]
    unreadable: tuple[int, ...]
    no_data: tuple[int, ...]
    not_finite: tuple[int, ...]
    stop: int
    read_errors: int
    mismatch: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    adversary_error: bool = False
    saving: bool = False

    @property
    def completed(self) -> bool:
        """Whether every rank did all its micro-batches, with gradients and metrics of the same names."""
        return not (self.out_of_memory or self.unreadable or self.no_data or self.mismatch)

    @property
    def finite(self) -> bool:
        return self.completed and not self.not_finite

    @property
    def worst(self) -> float:
        """The largest loss of any micro-batch on any rank."""
        return max(self.largest)

    def decide(self, grad_norm: float | None, spikes: SpikeGuard | None) -> Decision:
        """What all ranks do with the step.

        grad_norm: None if there is none, or if the strategy skips gradients that overflow. spikes: its running mean is
        updated; None for a step that trains the discriminator only.
        """
        if self.mismatch:
            error = RanksDiffer(
                f"the ranks differ after the same step: {self.mismatch}; a loss term that applies to some clips only "
                "must use the same parameters, and return metrics of the same names, on every rank"
            )
            return Decision(False, str(error), error=error)
        if self.no_data:
            error = DataError(f"rank {_join(self.no_data)} has no more data")
            return Decision(False, str(error), self.no_data, error)
        finite = self.finite and (grad_norm is None or math.isfinite(grad_norm))
        accepted, limit = finite, ""
        if self.completed and spikes is not None:
            limit = f"{spikes.factor} x the running mean {spikes.mean:g}"
            accepted = spikes.should_step(self.loss, self.worst, finite=finite)
        if accepted:
            return Decision(True)
        if not self.finite:
            return Decision(False, self.failure(), (*self.out_of_memory, *self.unreadable, *self.not_finite))
        if not finite:
            return Decision(False, f"gradient norm {grad_norm:g}")
        ranks = tuple(rank for rank, loss in enumerate(self.largest) if loss == self.worst)
        return Decision(False, f"loss {self.worst:g} is a spike, above {limit}: rank {_join(ranks)}", ranks)

    def failure(self) -> str:
        """Why the step is not finite, with the ranks; empty if it is."""
        failures = {
            "out of memory": self.out_of_memory,
            "without a readable file": self.unreadable,
            "loss not finite": self.not_finite,
        }
        return "; ".join(f"{what}: rank {_join(ranks)}" for what, ranks in failures.items() if ranks)


@dataclass(frozen=True)
class StepResult:
    """What Trainer.train_step did; equal on all ranks.

    metrics: means over micro-batches and ranks, and loss_max; empty unless the step is finite. reason: why it was not
    applied; empty if it was.
    """

    status: StepStatus
    metrics: dict[str, float]
    applied: bool
    reason: str


class StatusTable:
    """One row per rank, and the sums of all metrics, in a tensor that one all-reduce fills and one copy reads.

    It is the only collective of a step that is not finite, unless an adversary or DeepSpeed has its own. The tensor is
    allocated once: a rank that is out of memory could not allocate it, and one with fewer metrics must still give a
    tensor of the same size. So a step has room for MAX_METRICS of them.
    """

    LOSSES = ("loss", "largest", "largest_discriminator")
    COLUMNS = (*LOSSES, "adversary_error", "out_of_memory", "unreadable", "no_data", "stop", "read_errors", "saving")
    COLUMNS += ("names",)
    MAX_METRICS = 512

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        rows = world_size * len(self.COLUMNS)
        self.packed = torch.zeros(rows + self.MAX_METRICS, device=device, dtype=torch.float64)
        self.row = self.packed[:rows].view(world_size, -1)[rank]
        self.sums = self.packed[rows:]
        self.world_size = world_size
        self.host_row = host_buffer(self.row.shape, self.row.dtype, device)

    def sync(
        self,
        on_device: Mapping[str, Tensor],
        names: Sequence[str],
        metrics: Mapping[str, Tensor] | None = None,
        **columns: float,
    ) -> StepStatus:
        """All-reduce this rank's row and metrics, and read those of all. Every rank must call it.

        on_device: columns that are on the device. columns: the others, if they are not 0. metrics: scalars on the
        device. names: of gradients and metrics, which must be equal on all ranks that finish the step.
        Raises ValueError for more than MAX_METRICS metrics.
        """
        metrics = metrics or {}
        if len(metrics) > self.MAX_METRICS:
            raise ValueError(
                f"a step has {len(metrics)} metrics, and at most {self.MAX_METRICS} can be averaged over ranks"
            )
        self.packed.zero_()
        values = {**dict.fromkeys(self.COLUMNS, 0.0), "names": _digest(names), **columns}
        # The device has read this buffer: the last step waited for what followed.
        self.host_row.copy_(torch.tensor([float(value) for value in values.values()], dtype=torch.float64))
        self.row.copy_(self.host_row, non_blocking=True)
        for column, value in on_device.items():
            self.row[self.COLUMNS.index(column)] = value
        if metrics:
            self.sums[: len(metrics)] = torch.stack([metrics[name] for name in sorted(metrics)])
        distributed.all_reduce_sum(self.packed)

        numbers, width = read(self.packed), len(self.COLUMNS)
        rows = [numbers[rank * width : (rank + 1) * width] for rank in range(self.world_size)]
        ranks = dict(zip(self.COLUMNS, zip(*rows, strict=True), strict=True))
        sums = numbers[self.world_size * width :][: len(metrics)]
        means = dict(
            zip(sorted(metrics), (torch.tensor(sums, dtype=torch.float32) / self.world_size).tolist(), strict=True)
        )
        losses_of_ranks = zip(*(ranks[column] for column in self.LOSSES), strict=True)
        status = StepStatus(
            loss=sum(ranks["loss"]) / len(ranks["loss"]),
            largest=ranks["largest"],
            out_of_memory=_where(ranks["out_of_memory"]),
            unreadable=_where(ranks["unreadable"]),
            no_data=_where(ranks["no_data"]),
            not_finite=_where(not all(map(math.isfinite, losses)) for losses in losses_of_ranks),
            stop=round(max(ranks["stop"])),
            read_errors=round(sum(ranks["read_errors"])),
            metrics={name: means[name] for name in metrics},
            adversary_error=any(ranks["adversary_error"]),
            saving=any(ranks["saving"]),
        )
        if status.completed and len(set(ranks["names"])) > 1:
            return dataclasses.replace(status, mismatch=_mismatch(names))
        return status


def _digest(names: Sequence[str]) -> int:
    """Exact in a float64."""
    return int.from_bytes(hashlib.blake2b("\n".join(names).encode(), digest_size=6).digest(), "big")


def _mismatch(names: Sequence[str]) -> str:
    """The first name that only some ranks have. Every rank must call it."""
    ranks = [set(names) for names in distributed.all_gather_object(list(names))]
    name = min(set.union(*ranks) - set.intersection(*ranks))
    has, lacks = ([rank for rank, mine in enumerate(ranks) if (name in mine) == wanted] for wanted in (True, False))
    return f"rank {_join(has)} has {name} and rank {_join(lacks)} has not"


def _where(flags: Iterable[float]) -> tuple[int, ...]:
    """The ranks whose flag is set."""
    return tuple(rank for rank, flag in enumerate(flags) if flag)


def _join(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))

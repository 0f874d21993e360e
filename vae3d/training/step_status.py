"""Step status, all-reduced before any rank updates its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.distributed as dist

from vae3d import distributed
from vae3d.data.media import DataError
from vae3d.distributed import RanksDiffer
from vae3d.errors import UserError
from vae3d.training.spike import SpikeGuard, worst


class Action(Enum):
    TAKE = "take"
    SKIP = "skip"
    STOP = "stop"


class Decision(NamedTuple):
    """reason: why the step is skipped or the run stops. error: what is raised to stop it."""

    action: Action
    reason: str = ""
    error: type[UserError] = UserError


@dataclass(frozen=True)
class StepStatus:
    """How a step went on all ranks.

    loss: mean over ranks. worst: largest loss of any micro-batch, NaN if any is NaN; neither counts unless `complete`.
    out_of_memory, unreadable: ranks that could not finish the step. no_data: ranks whose data loader failed.
    stop: signal that a rank received, or 0. broken: number of failed reads. mismatch: a parameter that has a gradient
    on some ranks only, and which; empty if there is none.
    """

    loss: float
    worst: float
    out_of_memory: tuple[int, ...]
    unreadable: tuple[int, ...]
    no_data: tuple[int, ...]
    stop: int
    broken: int
    mismatch: str = ""

    @property
    def complete(self) -> bool:
        """Whether every rank finished its micro-batches, with gradients of the same parameters."""
        return not (self.out_of_memory or self.unreadable or self.no_data or self.mismatch)

    @property
    def finite(self) -> bool:
        """Whether every rank finished, and all losses are finite."""
        return self.complete and math.isfinite(self.loss) and math.isfinite(self.worst)

    def decide(self, grad_norm: float, spikes: SpikeGuard | None) -> Decision:
        """What all ranks do with the step.

        spikes: its running mean is updated; None for a step that trains the discriminator only.
        Raises SpikeError if too many consecutive steps were not finite.
        """
        if self.mismatch:
            return Decision(
                Action.STOP,
                f"after the same step the ranks have gradients of different parameters: {self.mismatch}; a loss term "
                "that applies to some clips only must use the same parameters on every rank",
                RanksDiffer,
            )
        if self.no_data:
            return Decision(Action.STOP, f"rank {_join(self.no_data)} has no more data", DataError)
        if not self.complete:
            return Decision(Action.SKIP, self.failure())
        if self.finite if spikes is None else spikes.should_step(self.loss, self.worst, grad_norm):
            return Decision(Action.TAKE)
        return Decision(Action.SKIP, f"loss {self.loss:g}, at worst {self.worst:g}, gradient norm {grad_norm:g}")

    def failure(self) -> str:
        """Why some ranks did not finish the step; empty if all did."""
        failures = {"out of memory": self.out_of_memory, "without a readable file": self.unreadable}
        return "; ".join(f"{what}: rank {_join(ranks)}" for what, ranks in failures.items() if ranks)


class StatusTable:
    """One row per rank in a table that one all-reduce fills.

    It is the only collective of a failed step, unless an adversary or DeepSpeed has its own.

    The table is allocated once: a rank that is out of memory could not allocate it.
    """

    COLUMNS = ("loss", "worst", "out_of_memory", "unreadable", "no_data", "stop", "broken", "gradients")

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.table = torch.zeros(world_size, len(self.COLUMNS), device=device, dtype=torch.float64)

    def sync(self, with_gradient: Callable[[], Sequence[str]], **columns: float) -> StepStatus:
        """All-reduce this rank's values, one per column. Every rank must call it.

        gradients: digest of the set of parameters that have a gradient. with_gradient: returns their names, which are
        compared if the digests differ.
        """
        self.table.zero_()
        row = torch.tensor([float(columns[name]) for name in self.COLUMNS], dtype=torch.float64)
        self.table[self.rank].copy_(row)
        if distributed.is_distributed():
            dist.all_reduce(self.table)
        ranks = dict(zip(self.COLUMNS, zip(*self.table.tolist(), strict=True), strict=True))
        status = StepStatus(
            loss=sum(ranks["loss"]) / len(ranks["loss"]),
            worst=worst(ranks["worst"]),
            out_of_memory=_nonzero(ranks["out_of_memory"]),
            unreadable=_nonzero(ranks["unreadable"]),
            no_data=_nonzero(ranks["no_data"]),
            stop=round(max(ranks["stop"])),
            broken=round(sum(ranks["broken"])),
        )
        if status.complete and len(set(ranks["gradients"])) > 1:
            return dataclasses.replace(status, mismatch=_mismatch(with_gradient()))
        return status


def _mismatch(with_gradient: Sequence[str]) -> str:
    """The first parameter that has a gradient on some ranks only. Every rank must call it."""
    names = [set(names) for names in distributed.all_gather_object(list(with_gradient))]
    name = min(set.union(*names) - set.intersection(*names))
    has, lacks = ([rank for rank, mine in enumerate(names) if (name in mine) == wanted] for wanted in (True, False))
    return f"{name} has one on rank {_join(has)} and none on rank {_join(lacks)}"


def _nonzero(flags: Iterable[float]) -> tuple[int, ...]:
    return tuple(rank for rank, flag in enumerate(flags) if flag)


def _join(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))

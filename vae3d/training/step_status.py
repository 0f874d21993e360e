"""How a step went on every rank, told to all before any of them acts on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from vae3d import distributed
from vae3d.training.agreement import RanksDiffer
from vae3d.training.spike import worst


@dataclass(frozen=True)
class StepStatus:
    """loss: mean over ranks. worst: the largest loss of any micro-batch, NaN if one is; neither counts where a rank did
    not finish. out_of_memory, unreadable: ranks that could not. no_data: ranks whose loader failed, for good. stop: the
    signal that a rank was sent, or 0. broken: reads that failed."""

    loss: float
    worst: float
    out_of_memory: tuple[int, ...]
    unreadable: tuple[int, ...]
    no_data: tuple[int, ...]
    stop: int
    broken: int

    @property
    def complete(self) -> bool:
        """Whether every rank got through its micro-batches."""
        return not self.out_of_memory and not self.unreadable and not self.no_data

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.worst)

    def error(self) -> str:
        """Why the step cannot be taken, for the log."""
        told = {
            "out of memory": self.out_of_memory,
            "without a readable file": self.unreadable,
            "without data": self.no_data,
        }
        return "; ".join(f"{what}: rank {', '.join(map(str, who))}" for what, who in told.items() if who)


class StatusTable:
    """One row per rank in a table that an all-reduce fills: the only collective of a step that goes wrong.

    The table is made at the start, since a rank that is out of memory could not make it then.
    """

    COLUMNS = ("loss", "worst", "out_of_memory", "unreadable", "no_data", "stop", "broken", "gradients")

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.table = torch.zeros(world_size, len(self.COLUMNS), device=device, dtype=torch.float64)

    def cast(self, with_gradient: Callable[[], Sequence[str]], **mine: float) -> StepStatus:
        """All-reduce the step status of all ranks.

        gradients: digest of the set of parameters that have a gradient here. with_gradient: their names, for the error.
        Raises RanksDiffer if ranks that finished have gradients of different parameters, which cannot be averaged.
        """
        self.table.zero_()
        self.table[self.rank].copy_(torch.tensor([float(mine[name]) for name in self.COLUMNS], dtype=torch.float64))
        if distributed.is_distributed():
            dist.all_reduce(self.table)
        columns = dict(zip(self.COLUMNS, zip(*self.table.tolist(), strict=True), strict=True))
        status = StepStatus(
            loss=sum(columns["loss"]) / len(columns["loss"]),
            worst=worst(columns["worst"]),
            out_of_memory=_where(columns["out_of_memory"]),
            unreadable=_where(columns["unreadable"]),
            no_data=_where(columns["no_data"]),
            stop=round(max(columns["stop"])),
            broken=round(sum(columns["broken"])),
        )
        if status.complete and len(set(columns["gradients"])) > 1:
            raise RanksDiffer(
                "after the same step the ranks have gradients of different parameters: "
                f"{_difference(with_gradient())}; a loss term that applies to some clips only must reach the same "
                "parameters on every rank"
            )
        return status


def _difference(mine: Sequence[str]) -> str:
    """The first parameter that one rank has a gradient of and another has not. Every rank must call it."""
    everyone = [set(names) for names in gather_object([list(mine)])]
    name = min(set.union(*everyone) - set.intersection(*everyone))
    has = [rank for rank, names in enumerate(everyone) if name in names]
    lacks = [rank for rank, names in enumerate(everyone) if name not in names]
    return f"{name} has one on rank {', '.join(map(str, has))} and none on rank {', '.join(map(str, lacks))}"


def _where(flags: Iterable[float]) -> tuple[int, ...]:
    return tuple(rank for rank, flag in enumerate(flags) if flag)

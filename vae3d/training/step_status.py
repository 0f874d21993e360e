"""What a step computed, and how it went: all-reduced before any rank updates its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        """Columns of StatusTable: `loss` is a mean over micro-batches, the others are maxima; NaN if one is NaN."""
        losses = {}
        if "loss" in self._values:
            values = torch.stack(self._values["loss"])
            losses = {"loss": values.mean(), "worst": values.max()}
        if "loss_discriminator" in self._values:
            losses["worst_discriminator"] = torch.stack(self._values["loss_discriminator"]).max()
        return losses

    def means(self) -> dict[str, float]:
        return {name: float(torch.stack(values).mean()) for name, values in self._values.items()}

    def reduce(self, **equal: Tensor) -> dict[str, float]:
        """Means over micro-batches and ranks, in one all-reduce and one transfer. All ranks need the same names.

        equal: further scalars, which are equal on all ranks.
        """
        means = torch.stack([torch.stack(self._values[name]).mean() for name in self.names])
        distributed.all_reduce_mean([means])
        packed = torch.cat([means, *(value.reshape(1).to(means.device) for value in equal.values())])
        values = dict(zip([*self.names, *equal], packed.tolist(), strict=True))
        return {name: values[name] for name in [*self._values, *equal]}


class MeanMeter:
    """Means of step metrics between two log lines."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def flush(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        check_value(state, Mapping[str, Annotated[Sequence[Real], Size(1, 10**6)]], "meter")
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})


class Decision(NamedTuple):
    """Whether to take the step and, if not, the reason. error: raised to stop the run instead of skipping the step."""

    take: bool
    reason: str = ""
    error: UserError | None = None


@dataclass(frozen=True)
class StepStatus:
    """How a step went on all ranks.

    loss: mean over ranks. worst: largest loss of any micro-batch, NaN if any is NaN; neither counts unless `complete`.
    out_of_memory, unreadable: ranks that could not finish the step. no_data: ranks whose data loader failed.
    stop: signal that a rank received, or 0. broken: number of failed reads. mismatch: a gradient or metric that only
    some ranks have, and which ranks; empty if there is none.
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
        """Whether every rank finished its micro-batches, with gradients and metrics of the same names."""
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
            error = RanksDiffer(
                f"the ranks differ after the same step: {self.mismatch}; a loss term that applies to some clips only "
                "must use the same parameters, and return metrics of the same names, on every rank"
            )
            return Decision(False, str(error), error)
        if self.no_data:
            error = DataError(f"rank {_join(self.no_data)} has no more data")
            return Decision(False, str(error), error)
        if not self.complete:
            return Decision(False, self.failure())
        if self.finite if spikes is None else spikes.should_step(self.loss, self.worst, grad_norm):
            return Decision(True)
        return Decision(False, f"loss {self.loss:g}, at worst {self.worst:g}, gradient norm {grad_norm:g}")

    def failure(self) -> str:
        """Why some ranks did not finish the step; empty if all did."""
        failures = {"out of memory": self.out_of_memory, "without a readable file": self.unreadable}
        return "; ".join(f"{what}: rank {_join(ranks)}" for what, ranks in failures.items() if ranks)


class StatusTable:
    """One row per rank in a table that one all-reduce fills.

    It is the only collective of a failed step, unless an adversary or DeepSpeed has its own.

    The table is allocated once: a rank that is out of memory could not allocate it.
    """

    COLUMNS = ("loss", "worst", "worst_discriminator", "out_of_memory", "unreadable", "no_data", "stop", "broken")
    COLUMNS += ("names",)

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.table = torch.zeros(world_size, len(self.COLUMNS), device=device, dtype=torch.float64)

    def sync(self, losses: Mapping[str, Tensor], names: Sequence[str], **columns: float) -> StepStatus:
        """All-reduce this rank's row, and read all rows. Every rank must call it.

        losses: columns that are on the device. columns: the others, if they are not 0. names: of gradients and metrics,
        which must be equal on all ranks that finish the step.
        """
        row = self.table.zero_()[self.rank]
        values = {**dict.fromkeys(self.COLUMNS, 0.0), "names": _digest(names), **columns}
        row.copy_(torch.tensor([float(value) for value in values.values()], dtype=torch.float64), non_blocking=True)
        for column, loss in losses.items():
            row[self.COLUMNS.index(column)] = loss
        distributed.all_reduce_sum(self.table)
        ranks = dict(zip(self.COLUMNS, zip(*self.table.tolist(), strict=True), strict=True))
        status = StepStatus(
            loss=sum(ranks["loss"]) / len(ranks["loss"]),
            worst=_worst(ranks["worst"]) if all(map(math.isfinite, ranks["worst_discriminator"])) else math.nan,
            out_of_memory=_nonzero(ranks["out_of_memory"]),
            unreadable=_nonzero(ranks["unreadable"]),
            no_data=_nonzero(ranks["no_data"]),
            stop=round(max(ranks["stop"])),
            broken=round(sum(ranks["broken"])),
        )
        if status.complete and len(set(ranks["names"])) > 1:
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


def _worst(losses: Iterable[float]) -> float:
    """The largest; NaN counts as larger than any number."""
    return max(losses, key=lambda loss: math.inf if math.isnan(loss) else loss)


def _nonzero(flags: Iterable[float]) -> tuple[int, ...]:
    return tuple(rank for rank, flag in enumerate(flags) if flag)


def _join(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))

"""Fault-tolerance limits: which steps are skipped, and after how many failures the run stops."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from vae3d.arguments import Range, Size, check_fields, check_value
from vae3d.data.media import DataError
from vae3d.errors import UserError

log = logging.getLogger("vae3d")

Count = Annotated[int, Range(0, 10**12)]
MIN_READS = 50  # before which read errors do not stop the run


class TooManyFailures(UserError):
    """The same failure in too many consecutive steps or saves."""


class SpikeError(TooManyFailures):
    """Too many consecutive steps were skipped, or the run ends on skipped steps."""


class SaveError(UserError):
    """A checkpoint or an output of it could not be written. what: only that; lost: the consequence if the run ends."""

    def __init__(self, what: str, lost: str) -> None:
        super().__init__(f"{what}; {lost}")
        self.what, self.lost = what, lost


class _SpikeState(TypedDict):
    mean: float
    accepted: Count
    consecutive_skips: Count
    all_finite: bool


class SpikeGuard:
    """Skips steps whose loss or gradient is not finite, or whose loss is far above its running mean.

    All ranks must pass the same numbers; there is no collective.

    factor: skip a step if any loss in it exceeds this many times the running mean; None skips only steps that are not
    finite. warmup: accepted steps before the factor applies. max_consecutive_skips: if all of these were finite, the
    loss has moved to a new level, which is accepted; otherwise check_limit raises. 0: no limit.
    """

    MOMENTUM = 0.98

    def __init__(self, factor: float | None = None, warmup: int = 0, max_consecutive_skips: int = 0) -> None:
        self.factor, self.warmup, self.max_consecutive_skips = factor, warmup, max_consecutive_skips
        self.mean = 0.0
        self.accepted = 0
        self.consecutive_skips = 0
        self.all_finite = True  # of the consecutive skips

    def should_step(self, mean: float, worst: float, *, finite: bool) -> bool:
        """Whether to apply the step; updates the running mean.

        mean, worst: of the loss over micro-batches and ranks; a mean over many ranks hides one spike. finite: whether
        all losses and the averaged gradient are.
        """
        warm = self.factor is not None and self.accepted >= self.warmup
        if finite and not (warm and worst > self.factor * self.mean):
            momentum = min(self.MOMENTUM, self.accepted / (self.accepted + 1))
            self.mean = momentum * self.mean + (1.0 - momentum) * mean
            self.accepted += 1
            self.consecutive_skips, self.all_finite = 0, True
            return True
        self.consecutive_skips += 1
        self.all_finite = self.all_finite and finite
        if self.at_limit and self.all_finite:
            log.warning(
                f"{self.consecutive_skips} steps in a row were skipped: loss {mean:g} (worst {worst:g}), running mean "
                f"of the loss {self.mean:g}; training continues at this level"
            )
            # Not just the mean: a rank whose loss stays far above the others' would be skipped forever.
            self.mean, self.consecutive_skips = max(mean, worst / self.factor), 0
        return False

    @property
    def at_limit(self) -> bool:
        return 0 < self.max_consecutive_skips <= self.consecutive_skips

    def check_limit(self, reason: str) -> None:
        """Raises SpikeError after too many skipped steps. reason: why the last one was skipped."""
        if self.at_limit:
            raise SpikeError(
                f"{self.consecutive_skips} steps in a row were skipped, the last because of {reason}; the running mean "
                f"of the loss is {self.mean:g}. For each step the log names the loss terms that are not finite and the "
                "clips: take those clips out if they are always the same ones, or lower optim.lr"
            )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SpikeState.__annotations__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_fields(state, _SpikeState, key="spikes")
        vars(self).update({name: state[name] for name in _SpikeState.__annotations__})


class FailureCounter:
    """Stops a run after `limit` consecutive failures; 0: never. All ranks must count the same.

    key: of the limit in the configuration. what: the failure, as in "10 steps in a row ...". hint: what to do.
    """

    def __init__(self, limit: int, key: str, what: str, hint: str) -> None:
        self.limit, self.key, self.what, self.hint = limit, key, what, hint
        self.consecutive = 0

    def record(self, reason: str) -> None:
        """Count a failure. Raises TooManyFailures at the limit."""
        self.consecutive += 1
        if self.limit and self.consecutive >= self.limit:
            raise TooManyFailures(
                f"{self.consecutive} {self.what} ({self.key} is the limit); {self.hint}\n  the last: {reason}"
            )

    def reset(self) -> None:
        self.consecutive = 0

    def state_dict(self) -> int:
        return self.consecutive

    def load_state_dict(self, state: int) -> None:
        check_value(state, Count, "number of failures")
        self.consecutive = state


class ReadErrors:
    """Stops a run if more than the share `max_broken` of all reads failed, but not before MIN_READS."""

    def __init__(self, max_broken: float, folder: Path) -> None:
        self.max_broken, self.folder = max_broken, folder
        self.reads = self.broken = 0

    def record(self, reads: int, broken: int) -> None:
        """Raises DataError, and resets the counts, so that a run can go on once the files have been repaired."""
        self.reads, self.broken = self.reads + reads, self.broken + broken
        if self.reads >= MIN_READS and self.broken / self.reads > self.max_broken:
            reads, broken = self.reads, self.broken
            self.reads = self.broken = 0
            raise DataError(
                f"{broken} of {reads} reads failed, a larger share than data.max_broken={self.max_broken}; "
                f"{self.folder}/data_errors*.jsonl list the files"
            )

    def state_dict(self) -> list[int]:
        return [self.reads, self.broken]

    def load_state_dict(self, state: Sequence[int]) -> None:
        check_value(state, Annotated[Sequence[Count], Size(2, 2)], "reads")
        self.reads, self.broken = state

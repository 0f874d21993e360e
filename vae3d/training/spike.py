"""Steps that must not be taken: a loss that is not finite, or far above what it was."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from vae3d.errors import UserError

log = logging.getLogger("vae3d")


class SpikeError(UserError):
    """Too many steps in a row were skipped."""


class SpikeGuard:
    """Decides whether an optimizer step is taken. Feed it the same numbers on every rank: it holds no collective.

    factor: skip a step if any loss in it is above this many times the running mean of accepted steps (None: only
    non-finite ones). warmup: accepted steps before the factor counts. max_consecutive_skips: after so many skipped steps in a
    row the loss is taken to have moved to a new level, unless one of them was not finite, which raises SpikeError.
    """

    MOMENTUM = 0.98

    def __init__(
        self, factor: float | None, warmup: int, max_consecutive_skips: int, warn: Callable[[str], None] = log.warning
    ) -> None:
        self.factor, self.warmup, self.max_consecutive_skips, self.warn = factor, warmup, max_consecutive_skips, warn
        self.mean = 0.0
        self.accepted = 0
        self.skipped_in_row = 0
        self.finite_row = True  # of the skipped steps

    def accept(self, mean: float, worst: float, grad_norm: float) -> bool:
        """Whether to step.

        mean: of the loss over micro-batches and ranks. worst: the largest of them, for one spike among many is lost
        in their mean. grad_norm: of the reduced gradient.
        """
        finite = math.isfinite(mean) and math.isfinite(worst) and math.isfinite(grad_norm)
        judged = self.factor is not None and self.accepted >= self.warmup
        if finite and not (judged and worst > self.factor * self.mean):
            momentum = min(self.MOMENTUM, self.accepted / (self.accepted + 1))
            self.mean = momentum * self.mean + (1.0 - momentum) * mean
            self.accepted += 1
            self.skipped_in_row, self.finite_row = 0, True
            return True
        self.skipped_in_row += 1
        self.finite_row = self.finite_row and finite
        if self.skipped_in_row >= self.max_consecutive_skips:
            self._lose_patience(mean, worst, grad_norm)
        return False

    def _lose_patience(self, mean: float, worst: float, grad_norm: float) -> None:
        told = (
            f"{self.skipped_in_row} steps in a row were skipped: loss {mean:g} (worst {worst:g}), gradient norm "
            f"{grad_norm:g}, running mean of the loss {self.mean:g}"
        )
        if not self.finite_row:
            raise SpikeError(f"{told}; lower optim.lr, or look at the data in data_errors.jsonl")
        self.warn(f"{told}; this is the new level, and training goes on")
        # One rank of many that keeps losing far more than the others would be skipped for ever at their mean.
        self.mean, self.skipped_in_row = max(mean, worst / self.factor), 0

    def state_dict(self) -> dict[str, float | int]:
        names = ("mean", "accepted", "skipped_in_row", "finite_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.mean, self.accepted = state["mean"], state["accepted"]
        self.skipped_in_row, self.finite_row = state["skipped_in_row"], state.get("finite_row", True)


def worst(losses: Iterable[float]) -> float:
    """The largest; NaN counts as larger than anything."""
    return max(losses, key=lambda loss: math.inf if math.isnan(loss) else loss)

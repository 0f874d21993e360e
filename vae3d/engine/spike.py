"""Steps that must not be taken: a loss that is not finite, or far above what it was."""

from __future__ import annotations

import math

from vae3d.errors import UserError


class SpikeError(UserError):
    """Too many steps in a row were skipped."""


class SpikeGuard:
    """Decides whether an optimizer step is taken. Feed it the same numbers on every rank: it holds no collective.

    factor: skip losses above this many times the running mean of accepted ones (None: only non-finite ones).
    warmup: accepted steps before the factor counts. patience: skipped steps in a row after which
    SpikeError is raised.
    """

    MOMENTUM = 0.98

    def __init__(self, factor: float | None, warmup: int, patience: int) -> None:
        self.factor, self.warmup, self.patience = factor, warmup, patience
        self.mean = 0.0
        self.accepted = 0
        self.skipped_in_row = 0

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether to step on this loss and gradient norm, both already reduced over ranks."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        judged = self.factor is not None and self.accepted >= self.warmup
        if finite and not (judged and loss > self.factor * self.mean):
            momentum = min(self.MOMENTUM, self.accepted / (self.accepted + 1))
            self.mean = momentum * self.mean + (1.0 - momentum) * loss
            self.accepted += 1
            self.skipped_in_row = 0
            return True
        self.skipped_in_row += 1
        if self.skipped_in_row >= self.patience:
            raise SpikeError(
                f"{self.skipped_in_row} steps in a row were skipped: loss {loss:g}, gradient norm {grad_norm:g}, "
                f"running mean of the loss {self.mean:g}; lower optim.lr, or look at the data in faults.jsonl"
            )
        return False

    def state_dict(self) -> dict[str, float | int]:
        return {"mean": self.mean, "accepted": self.accepted, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.mean, self.accepted = state["mean"], state["accepted"]
        self.skipped_in_row = state["skipped_in_row"]

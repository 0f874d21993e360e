"""The best validation score of a run, whose weights are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from vae3d.arguments import Size, check_fields
from vae3d.metrics.base import Better, goodness
from vae3d.training.failures import SaveError

BEST = "best"  # not step-*: it is neither pruned nor loaded as the newest export


class _BestState(TypedDict):
    column: str | None
    value: float | None
    step: int | None
    validated: int
    missed: Annotated[Sequence[float], Size(2, 2)] | None


class BestExport:
    """The best validation score so far, whose weights are in exports/best.

    column: name of the score; None keeps nothing. columns: all scores, and which values are better. validated: step of
    the last validation, whatever its score; -1 before the first.
    """

    def __init__(self, column: str | None, columns: Mapping[str, Better]) -> None:
        self.column, self.better = column, columns.get(column)
        self.value: float | None = None
        self.step: int | None = None
        self.validated = -1
        self.missed: tuple[float, int] | None = None  # value and step of a better export that could not be written

    def beaten_by(self, value: float) -> bool:
        """Whether `value` is better; an equal one is not."""
        if not math.isfinite(value):
            return False
        return self.value is None or goodness(value, self.better) > goodness(self.value, self.better)

    def require_written(self) -> None:
        """Raises SaveError if exports/best is not of the best validation."""
        if self.missed is None or not self.beaten_by(self.missed[0]):
            return
        value, step = self.missed
        written = "there is none" if self.step is None else f"exports/{BEST} is of step {self.step}, {self.value:.6g}"
        raise SaveError(
            f"exports/{BEST} of step {step}, whose {self.column} is {value:.6g}, could not be written",
            f"{written}. Everything else of the run is complete",
        )

    def state_dict(self) -> dict[str, Any]:
        best = {"column": self.column, "value": self.value, "step": self.step, "missed": self.missed}
        return {**best, "validated": self.validated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The best under another score counts for nothing."""
        check_fields(state, _BestState, key="best")
        self.validated = state["validated"]
        if state["column"] == self.column:
            self.value, self.step, self.missed = state["value"], state["step"], state["missed"]

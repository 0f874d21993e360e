"""The averaged weights of the best validation so far, as exports/best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vae3d.engine.saving import export, tried_by_all
from vae3d.metrics.base import Better, goodness

if TYPE_CHECKING:
    from vae3d.engine.trainer import Trainer

FOLDER = "best"  # no step-*: it is neither pruned nor taken for a run's newest export


class Best:
    """The best value of a validation's score. column: its name; None keeps nothing. columns: those that the metrics
    give, and what is better."""

    def __init__(self, column: str | None, columns: Mapping[str, Better]) -> None:
        self.column, self.better = column, columns.get(column)
        self.value: float | None = None
        self.step: int | None = None

    def beaten_by(self, value: float) -> bool:
        """Whether `value` is better; an equal one is not."""
        if not math.isfinite(value):
            return False
        return self.value is None or goodness(value, self.better) > goodness(self.value, self.better)

    def state_dict(self) -> dict[str, Any]:
        return {"column": self.column, "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was kept under another score, or by a run that kept none, counts for nothing."""
        if state.get("column") == self.column:
            self.value, self.step = state["value"], state["step"]


def keep_best(trainer: Trainer, scores: Mapping[str, float]) -> None:
    """Export the averaged weights if `scores`, the same on every rank, beat all before. Where that fails on the disk,
    the run goes on with the best that there was."""
    best = trainer.best
    value = scores.get(f"val/{best.column}")
    if value is None or not best.beaten_by(value):
        return
    folder = trainer.folder / "exports" / FOLDER
    told = {"best": {best.column: value}}
    main = trainer.accelerator.is_main_process
    if fault := tried_by_all(trainer.device, lambda: export(trainer, folder, **told) if main else None):
        trainer.log.warn(f"{folder} is not of step {trainer.step}, the best so far: {fault}; training goes on")
        return
    best.value, best.step = value, trainer.step
    trainer.log.say(f"{best.column} {value:.6g} is the best so far: {folder}")

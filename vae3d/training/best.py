"""The averaged weights of the best validation so far, as exports/best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from vae3d.arguments import Size, check_fields
from vae3d.metrics.base import Better, goodness
from vae3d.training.checkpointer import SaveError, export, run_on_all_ranks

if TYPE_CHECKING:
    from vae3d.training.vae_trainer import Trainer

FOLDER = "best"  # no step-*: it is neither pruned nor taken for a run's newest export


class _Older(TypedDict, total=False):
    missed: Annotated[Sequence[float], Size(2, 2)] | None


class _Saved(_Older):
    value: float | None
    step: int | None


class Best:
    """The best value of a validation's score. column: its name; None keeps nothing. columns: those that the metrics
    give, and what is better."""

    def __init__(self, column: str | None, columns: Mapping[str, Better]) -> None:
        self.column, self.better = column, columns.get(column)
        self.value: float | None = None
        self.step: int | None = None
        self.missed: tuple[float, int] | None = None  # value and step of a better one that could not be written

    def beaten_by(self, value: float) -> bool:
        """Whether `value` is better; an equal one is not."""
        if not math.isfinite(value):
            return False
        return self.value is None or goodness(value, self.better) > goodness(self.value, self.better)

    def state_dict(self) -> dict[str, Any]:
        return {"column": self.column, "value": self.value, "step": self.step, "missed": self.missed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was kept under another score, or by a run that kept none, counts for nothing."""
        if state and state.get("column") == self.column:
            check_fields(state, _Saved, key="best")
            self.value, self.step, self.missed = state["value"], state["step"], state.get("missed")


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
    if reason := run_on_all_ranks(trainer.device, lambda: export(trainer, folder, **told) if main else None):
        trainer.log.warn(f"{folder} is not of step {trainer.step}, the best so far: {reason}; training goes on")
        best.missed = value, trainer.step
        return
    best.value, best.step = value, trainer.step
    trainer.log.say(f"{best.column} {value:.6g} is the best so far: {folder}")


def require_best(trainer: Trainer) -> None:
    """Raises SaveError at the end of a run whose exports/best is not of its best validation."""
    best = trainer.best
    if best.missed is None or not best.beaten_by(best.missed[0]):
        return
    value, step = best.missed
    there = "there is none" if best.step is None else f"what is there is of step {best.step}, {best.value:.6g}"
    raise SaveError(
        f"exports/{FOLDER} of step {step}, whose {best.column} is {value:.6g}, could not be written",
        f"those weights are lost; {there}. The run is complete but for that",
    )

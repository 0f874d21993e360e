"""Schedules as pure functions of the optimizer step: nothing to checkpoint, easy to plot and to test."""

from __future__ import annotations

import math
import sys

# No run gets so far: at this step and the next, which are of either turn, every ramp has ended and all has started.
ALL_ON = sys.maxsize - 1


def ramp(step: int, start: int, end: int) -> float:
    """0 up to `start`, linear to 1 at `end`, 1 after; with start == end a switch at that step."""
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return (step - start) / (end - start)


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def learning_rate(
    step: int,
    *,
    lr: float,
    warmup_steps: int = 0,
    decay_start: int | None = None,
    schedule: str = "constant",
    max_steps: int = 0,
    min_lr: float = 0.0,
    cycles: int = 1,
    power: float = 1.0,
) -> float:
    """Learning rate of optimizer step `step` (0-based), by the names of `get_scheduler` in diffusers and transformers.

    Linear warm-up from 0 at step 0 to `lr` at step `warmup_steps` under every schedule, so that `constant` and
    `constant_with_warmup` are the same here (theirs differ: `constant` leaves the warm-up out). Then `lr` for ever, or
    until step `decay_start` (None: no hold), and from there down to `min_lr` at `max_steps` and after: `linear`; along
    half a `cosine`; `cosine_with_restarts`, back at `lr` after each of `cycles` descents; `polynomial`,
    (1 - progress) ** `power` (theirs ends at 1e-7, which is min_lr here).
    Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return lr * step / warmup_steps
    if schedule.startswith("constant"):
        return lr
    start = warmup_steps if decay_start is None else decay_start
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    if schedule == "cosine_with_restarts":
        progress = progress * cycles % 1.0 if progress < 1.0 else 1.0
    if schedule.startswith("cosine"):
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (lr - min_lr) * (1.0 - progress) ** (power if schedule == "polynomial" else 1.0)


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """EMA decay after `step` updates; with warm-up min(decay, (1 + step) / (10 + step)), as in TensorFlow's
    ExponentialMovingAverage(num_updates)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay

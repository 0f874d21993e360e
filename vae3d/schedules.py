"""Schedules as pure functions of the optimizer step: nothing to checkpoint, easy to plot and to test."""

from __future__ import annotations

import math


def ramp(step: int, start: int, end: int) -> float:
    """0 up to `start`, linear to 1 at `end`, 1 after; with start == end a switch at that step."""
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return (step - start) / (end - start)


def learning_rate(
    step: int, *, lr: float, warmup_steps: int = 0, schedule: str = "constant", max_steps: int = 0, min_lr: float = 0.0
) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Linear warm-up reaches `lr` at step `warmup_steps`; then `constant`, or `cosine` down to `min_lr` at
    `max_steps`. Raises ValueError for an unknown schedule.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule is {schedule!r}; use 'constant' or 'cosine'")


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """EMA decay after `step` updates; with warm-up min(decay, (1 + step) / (10 + step)), as in TensorFlow's
    ExponentialMovingAverage(num_updates)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay

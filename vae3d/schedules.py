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
    step: int,
    *,
    lr: float,
    warmup_steps: int = 0,
    decay_start: int | None = None,
    schedule: str = "constant",
    max_steps: int = 0,
    min_lr: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Linear warm-up from 0 at step 0 to `lr` at step `warmup_steps`, as in Hugging Face's schedules; then `constant`,
    or `cosine`: held until step `decay_start` (None: no hold), then down to `min_lr` at `max_steps`.
    Raises ValueError for an unknown schedule.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        start = warmup_steps if decay_start is None else decay_start
        progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule is {schedule!r}; use 'constant' or 'cosine'")


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """EMA decay after `step` updates; with warm-up min(decay, (1 + step) / (10 + step)), as in TensorFlow's
    ExponentialMovingAverage(num_updates)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay

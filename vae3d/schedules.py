"""Schedules as pure functions of the optimizer step, so there is nothing to checkpoint."""

from __future__ import annotations

import math
import sys
from typing import Literal, Protocol

# A step that no run reaches, where every ramp has ended. Alternating updates train one network here, the other at the
# next step.
ALL_ON = sys.maxsize - 1


def ramp(step: int, start: int, end: int) -> float:
    """0 up to `start`, linear to 1 at `end`, then 1. With start == end it switches to 1 at that step."""
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return (step - start) / (end - start)


Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class RateSettings(Protocol):
    """The fields of config.optim and of Gan that learning_rate reads."""

    lr: float
    warmup_steps: int
    decay_start: int | None
    schedule: Schedule
    min_lr: float
    cycles: int
    power: float


def learning_rate(settings: RateSettings, step: int, max_steps: int) -> float:
    """Learning rate at optimizer step `step` (0-based). Schedules have the names of diffusers' `get_scheduler`.

    All warm up linearly from 0 at step 0 to `lr` at step `warmup_steps`, so `constant` equals `constant_with_warmup`
    (in diffusers `constant` has no warm-up). The others then hold `lr` until step `decay_start` (None: no hold) and
    decay to `min_lr` at `max_steps`: `linear`; `cosine`, half a period; `cosine_with_restarts`, back at `lr` after each
    of `cycles` descents; `polynomial`, (1 - progress) ** `power` (in diffusers it ends at 1e-7, here at min_lr).
    """
    lr, min_lr, schedule = settings.lr, settings.min_lr, settings.schedule
    if step < settings.warmup_steps:
        return lr * step / settings.warmup_steps
    if schedule.startswith("constant"):
        return lr
    start = settings.warmup_steps if settings.decay_start is None else settings.decay_start
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    if schedule == "cosine_with_restarts":
        progress = progress * settings.cycles % 1.0 if progress < 1.0 else 1.0
    if schedule.startswith("cosine"):
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (lr - min_lr) * (1.0 - progress) ** (settings.power if schedule == "polynomial" else 1.0)


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """EMA decay at optimizer step `step`; with warmup min(decay, (1 + step) / (10 + step)), as in TensorFlow's
    ExponentialMovingAverage(num_updates)."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay

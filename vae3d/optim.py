"""AdamW, in the form that a device runs fastest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

FUSED = ("cpu", "cuda", "xpu")  # of torch 2.6 and later; on MPS nothing trains, see distributed.init_training


class AdamWSettings(Protocol):
    """The fields of config.optim and of an adversary that adamw reads."""

    betas: Sequence[float]
    eps: float
    weight_decay: float


def adamw(params: Iterable[Any], settings: AdamWSettings, device: torch.device | None) -> torch.optim.AdamW:
    """AdamW of parameters or groups, fused if torch has that on `device`, where it will step; None: not known.

    Fused means one pass over memory. On a CPU it takes an eighth of the time. The learning rate is set before each
    step, see schedules.learning_rate.
    """
    fused = device is not None and device.type in FUSED
    betas = tuple(map(float, settings.betas))  # torch refuses an integer beside a float, such as [0, 0.99]
    return torch.optim.AdamW(params, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=fused)

"""AdamW and its learning rate from the `optim` settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vae3d.restore import load_optimizer
from vae3d.schedules import learning_rate

if TYPE_CHECKING:
    from vae3d.config.schema import Optim


def adamw_settings(optim: Optim) -> dict[str, Any]:
    """Arguments of torch.optim.AdamW beside its parameters and learning rate."""
    return {"betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}


def lr_at(optim: Optim, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` of a run of `max_steps`."""
    return learning_rate(
        step,
        lr=optim.lr,
        warmup_steps=optim.warmup_steps,
        decay_start=optim.decay_start,
        schedule=optim.schedule,
        max_steps=max_steps,
        min_lr=optim.min_lr,
        cycles=optim.cycles,
        power=optim.power,
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], name: str = "optimizer") -> None:
    """Load an optimizer's moments and learning rates. Other settings stay those of the configuration.

    Raises ArgumentError.
    """
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    load_optimizer(optimizer, state, name)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)

"""What the `optim` settings mean to an optimizer: for autoencoders and for diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vae3d.schedules import learning_rate

if TYPE_CHECKING:
    from vae3d.config.schema import Optim


def adamw_settings(optim: Optim) -> dict[str, Any]:
    """Arguments of torch.optim.AdamW beside its parameters and rate."""
    return {"betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}


def rate_at(optim: Optim, step: int, max_steps: int) -> float:
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

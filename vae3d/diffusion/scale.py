"""Check that latents have the scale that diffusion needs: mean 0 and standard deviation 1 per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vae3d import distributed
from vae3d.diffusion.data import LatentData
from vae3d.errors import UserError
from vae3d.inference.scale import TOLERANCE, off_scale
from vae3d.running_stats import RunningStats


class LatentScaleError(UserError):
    """Latents whose mean is not about 0 or whose standard deviation is not about 1."""


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation per channel, [C] fp64, of `count` latents on all ranks."""

    count: int
    mean: Tensor
    std: Tensor

    @classmethod
    def over_ranks(cls, stats: RunningStats, count: int) -> LatentStats:
        """Merge the statistics of all ranks, which have seen `count` latents together. Every rank must call it."""
        stats.all_reduce()
        return cls(count, stats.mean.cpu(), stats.variance.sqrt().cpu())

    @property
    def rms(self) -> float:
        """Root mean square of all values of all channels."""
        return float((self.mean.square() + self.std.square()).mean().sqrt())

    def table(self) -> str:
        """Means and standard deviations of all channels, a line each."""
        means, stds = (", ".join(f"{value:.3f}" for value in values.tolist()) for values in (self.mean, self.std))
        return f"  mean {means}\n  std  {stds}"

    def __str__(self) -> str:
        means, stds = (f"{values.min():.3f} to {values.max():.3f}" for values in (self.mean, self.std))
        return f"per-channel statistics of {self.count} latents: mean {means}, std {stds}"

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "std": self.std.tolist()}


def measure(data: LatentData, count: int, device: torch.device) -> LatentStats:
    """Statistics of at least `count` latents, from the first training steps, even where a run overfits one batch.

    Raises LatentScaleError if no file can be read.
    """
    data = replace(data, schedule=replace(data.schedule, overfit=False))
    stats = RunningStats(data.latent_shape[0], device)
    seen = torch.zeros((), dtype=torch.int64, device=device)
    for batch in data.batches(0, math.ceil(count / data.schedule.batch_size)):
        if batch.values is not None:
            z = data.latents(batch, device)
            stats.update_channels(z)
            seen += len(z)
    distributed.all_reduce_sum(seen)
    latent_stats = LatentStats.over_ranks(stats, int(seen))
    if not latent_stats.count:
        raise LatentScaleError("the latents cannot be measured: no file of the first steps can be read")
    return latent_stats


def check_latent_scale(stats: LatentStats, hint: str) -> None:
    """Raises LatentScaleError, with the statistics and `hint`, the command that fixes them, if they are off."""
    if outside := off_scale(stats.mean.tolist(), stats.std.tolist()):
        raise LatentScaleError(
            f"latents of channel {', '.join(map(str, outside))} do not have mean 0 and standard deviation 1 "
            f"(within {TOLERANCE} each), as diffusion needs. Over {stats.count} latents, per channel\n"
            f"{stats.table()}\n{hint}"
        )

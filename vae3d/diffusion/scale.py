"""Whether latents are of the scale that diffusion needs: measured on what is trained on, before the first step."""

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


class ScaleRefused(UserError):
    """Latents that are not of about mean 0 and deviation 1."""


@dataclass(frozen=True)
class Scale:
    """Per channel, [C] fp64, over `count` latents of all ranks."""

    count: int
    mean: Tensor
    std: Tensor

    def outside(self) -> list[int]:
        """Channels that are not of about mean 0 and deviation 1."""
        return off_scale(self.mean.tolist(), self.std.tolist())

    @property
    def rms(self) -> float:
        """The root of the mean square of all values of all channels."""
        return float((self.mean.square() + self.std.square()).mean().sqrt())

    def told(self) -> str:
        means, stds = (", ".join(f"{value:.3f}" for value in values.tolist()) for values in (self.mean, self.std))
        return f"  means      {means}\n  deviations {stds}"

    def __str__(self) -> str:
        means, stds = (f"{values.min():.3f} to {values.max():.3f}" for values in (self.mean, self.std))
        return f"{self.count} latents have means {means} and deviations {stds} per channel"

    def facts(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "std": self.std.tolist()}


class Sums:
    """Of latents of `channels` channels, which add up over batches and ranks."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.total = torch.zeros(2 + 2 * channels, dtype=torch.float64, device=device)
        self.channels = channels

    @torch.no_grad()
    def add(self, z: Tensor) -> None:
        """[B, C, t, h, w]."""
        places = z.double().transpose(0, 1).flatten(1)
        counts = places.new_tensor([len(z), places.shape[1]])
        self.total += torch.cat([counts, places.sum(1), places.square().sum(1)])

    def scale(self) -> Scale:
        """Of what all ranks have added. Every rank must call it, once."""
        distributed.all_reduce_sum(self.total)
        mean, square = (self.total[2:] / self.total[1]).cpu().split(self.channels)
        return Scale(round(float(self.total[0])), mean, (square - mean.square()).clamp(min=0).sqrt())


def measure(data: LatentData, count: int, device: torch.device) -> Scale:
    """Of the latents of the first steps, at least `count` of them; of all data, also where a run overfits one batch."""
    data = replace(data, schedule=replace(data.schedule, overfit=False))
    sums = Sums(data.latent_shape[0], device)
    for batch in data.batches(0, math.ceil(count / data.schedule.batch_size)):
        if batch.values is not None:
            sums.add(data.latents(batch, device))
    scale = sums.scale()
    if not scale.count:
        raise ScaleRefused("the scale of the latents cannot be measured: no file of the first steps can be read")
    return scale


def check_latent_scale(scale: Scale, hint: str) -> None:
    """Raises ScaleRefused, with what was measured. hint: the command that mends it."""
    if not (outside := scale.outside()):
        return
    raise ScaleRefused(
        f"latents of channel {', '.join(map(str, outside))} are not of mean 0 and deviation 1 (within "
        f"{TOLERANCE} each), which diffusion needs. Of {scale.count} latents, per channel\n"
        f"{scale.told()}\n{hint}"
    )

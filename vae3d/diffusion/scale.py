"""Whether latents are of the scale that diffusion needs: measured on what is trained on, before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vae3d import ranks
from vae3d.diffusion.data import LatentData
from vae3d.errors import UserError
from vae3d.inference.scale import WIDEST, off_scale


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

    def facts(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "std": self.std.tolist()}


@torch.no_grad()
def measure(data: LatentData, count: int, device: torch.device) -> Scale:
    """Of the latents of the first steps, at least `count` of them; of all data, also where a run overfits one batch."""
    data = replace(data, plan=replace(data.plan, overfit=False))
    channels = data.latent_shape[0]
    sums = torch.zeros(2 + 2 * channels, dtype=torch.float64, device=device)  # latents, places, values, squares
    for batch in data.batches(0, math.ceil(count / data.plan.batch_size)):
        if batch.values is None:
            continue
        z = data.latents(batch, device).double().transpose(0, 1).flatten(1)
        counts = z.new_tensor([len(batch.positions), z.shape[1]])
        sums += torch.cat([counts, z.sum(1), z.square().sum(1)])
    ranks.average([sums])
    if not sums[0]:
        raise ScaleRefused("the scale of the latents cannot be measured: no file of the first steps can be read")
    mean, square = (sums[2:] / sums[1]).cpu().split(channels)
    return Scale(round(float(sums[0]) * data.plan.world_size), mean, (square - mean.square()).clamp(min=0).sqrt())


def refuse_other_scale(scale: Scale, remedy: str) -> None:
    """Raises ScaleRefused, with what was measured. remedy: the command that mends it."""
    if not (outside := scale.outside()):
        return
    means, stds = (", ".join(f"{value:.3f}" for value in values.tolist()) for values in (scale.mean, scale.std))
    raise ScaleRefused(
        f"latents of channel {', '.join(map(str, outside))} are not of mean 0 and deviation 1 (within "
        f"{WIDEST} each), which diffusion needs. Of {scale.count} latents, per channel\n"
        f"  means      {means}\n  deviations {stds}\n{remedy}"
    )

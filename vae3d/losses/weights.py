"""How much each pixel counts in the losses on pixels. A weighting gives one number per row, of mean 1, so that the
weights of the terms keep their meaning."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vae3d.panorama import latitude_weights


class PixelWeight(Protocol):
    def __call__(self, height: int, device: torch.device) -> Tensor:
        """[H], mean 1."""


class ErpCosine:
    """Rows of a panorama by the area that they cover on the sphere.

    cos(latitude), at least `floor`, scaled to mean 1: w. Then (1 - blend) + blend * w: blend 1 is the sphere's area,
    0 the picture's. Beyond 60 degrees lie 33 % of the pixels and 13 % of the area; a floor or a blend below 1 gives
    ceilings and floors some of their pixels' weight back.
    Raises ValueError if either is not between 0 and 1.
    """

    def __init__(self, floor: float = 0.0, blend: float = 1.0) -> None:
        if not (0 <= floor <= 1 and 0 <= blend <= 1):
            raise ValueError(f"floor is {floor} and blend is {blend}; both must lie between 0 and 1")
        self.floor, self.blend = floor, blend

    def __call__(self, height: int, device: torch.device) -> Tensor:
        area = latitude_weights(height, device).clamp_min(self.floor)
        return ((1 - self.blend) + self.blend * area / area.mean()).float()


def mean_one(weight: Tensor) -> Tensor:
    """[B, ...] non-negative weights, scaled to mean 1 for every clip; a clip whose weights are all 0 keeps them."""
    mean = weight.flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))
    return weight / torch.where(mean > 0, mean, 1.0)

"""Weights of rows in the losses on pixels. Their mean is 1, so that they do not change the scale of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vae3d.arguments import Range, check_fields
from vae3d.panorama import latitude_weights

PixelWeight = Callable[[int, torch.device], Tensor]  # (height, device) -> [height], mean 1


@dataclass(eq=False)
class ErpCosine:
    """Weights rows of a panorama by their area on the sphere.

    w = max(cos(latitude), floor), scaled to mean 1; the weight is (1 - blend) + blend * w. blend=1 weights by area,
    blend=0 all rows alike. 33 % of the pixels but 13 % of the area lie beyond 60 degrees; a higher floor or a lower
    blend gives them more weight. Raises ValueError if either is not between 0 and 1.
    """

    floor: Annotated[float, Range(0, 1)] = 0.0
    blend: Annotated[float, Range(0, 1)] = 1.0

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self))

    def __call__(self, height: int, device: torch.device) -> Tensor:
        area = latitude_weights(height, device).clamp_min(self.floor)
        return ((1 - self.blend) + self.blend * area / area.mean()).float()


def mean_one(weight: Tensor) -> Tensor:
    """Scale non-negative weights [B, ...] to mean 1 for each clip; weights that are all 0 stay 0."""
    mean = weight.flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))
    return weight / torch.where(mean > 0, mean, 1.0)

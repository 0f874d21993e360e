"""Linear codes of groups of numbers, for paths beside an encoder and a decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOGVAR_START = -6.0  # of a posterior that starts from a linear code: a standard deviation of 0.05


def cosines(size: int) -> Tensor:
    """The waves of a DCT-II over `size` samples, [frequency, sample]: the first is 1, all have a mean square of 1."""
    sample = torch.arange(size)
    waves = torch.cos(math.pi / size * sample[:, None] * (sample + 0.5))
    waves[1:] *= math.sqrt(2)
    return waves


@torch.no_grad()
def set_linear_code(
    inward: nn.Module,
    outward: nn.Module,
    code: Tensor,
    back: Tensor,
    mean: Tensor | None = None,
) -> None:
    """Make 1 x 1 convolutions z = code @ (x - mean) and x = back @ z + mean.

    inward: n -> latents; outward: latents -> n. code: [k, n]; back: [n, k]. If there are more latents than k, the rest
    is 0; if fewer, the first rows of `code` and columns of `back` are used.
    """
    for parameter in (*inward.parameters(), *outward.parameters()):
        parameter.zero_()
    count = min(len(code), len(inward.weight))
    code, back = code[:count].to(inward.weight), back[:, :count].to(outward.weight)
    inward.weight[:count] = code.view(*code.shape, *inward.weight.shape[2:])
    outward.weight[:, :count] = back.view(*back.shape, *outward.weight.shape[2:])
    if mean is not None:
        inward.bias[:count] = -(code.double() @ mean.double()).to(inward.bias)
        outward.bias.copy_(mean)

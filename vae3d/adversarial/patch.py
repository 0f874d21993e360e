"""Seraena's discriminator: patches of an image, given the latents that the image was decoded from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "group")
HALVING = (1, 2, 3)  # the blocks that halve height and width
STRIDE = 8  # pixels per score, along height and width


class ConditionalPatchDiscriminator(nn.Module):
    """Images [N, C, H, W] in [0, 1] and latents [N, c, h, w] -> scores [N, blocks, H // 8, W // 8].

    `PatchDiscWithContext` of madebyollin/seraena `seraena.py`: blocks of convolution, norm and ReLU over the image in
    [-1, 1] beside the latents at its size (nearest); every block scores by a head of its own,
    averaged to the last size. High is fake. Its state has the published tensors in the published order.
    norm: batch, as published, or group, which needs no statistics of a batch: groups of 16 channels, fewer where 16
    does not divide them. (Groups of one channel would take from every image the contrast that a blurred one lacks.)
    """

    def __init__(self, image_channels: int, context_channels: int, channels: Sequence[int], norm: str) -> None:
        super().__init__()
        widths = [image_channels + context_channels, *channels]
        self.blocks = nn.ModuleList(
            Block(before, width, halve=i in HALVING, norm=norm)
            for i, (before, width) in enumerate(zip(widths, channels, strict=False))
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in channels)

    def forward(self, images: Tensor, context: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = torch.cat([images * 2 - 1, F.interpolate(context, (height, width))], 1)
        scores = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            scores.append(F.adaptive_avg_pool2d(head(x), (height // STRIDE, width // STRIDE)))
        return torch.cat(scores, 1)


class Block(nn.Module):
    """Convolution of 3 x 3, or of 4 x 4 that halves the size; norm; ReLU."""

    def __init__(self, before: int, width: int, *, halve: bool, norm: str) -> None:
        super().__init__()
        kernel, stride = (4, 2) if halve else (3, 1)
        self.conv = nn.Conv2d(before, width, kernel, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width // math.gcd(16, width), width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)

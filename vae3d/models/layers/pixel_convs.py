"""The 2D convolutions that read and write pixels. Those of more than RGB are computed apart.

A convolution of four channels may add up in another order than one of three. Apart, a weight of 0 for the other
channels leaves the colours as they are in a model of RGB, bit for bit, on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelInput(nn.Conv2d):
    """The first convolution of a network. patch: side of the patches of pixels whose values are its channels."""

    def __init__(self, pixel_channels: int, out_channels: int, *, patch: int = 1, stride: int = 1) -> None:
        super().__init__(pixel_channels * patch**2, out_channels, 3, stride=stride, padding=1)
        self.colours = 3 * patch**2

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels <= self.colours:
            return super().forward(x)
        dense = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        colours, others = (part.contiguous(memory_format=dense) for part in x.tensor_split([self.colours], 1))
        weights = [part.contiguous(memory_format=dense) for part in self.weight.tensor_split([self.colours], 1)]
        y = F.conv2d(colours, weights[0], self.bias, self.stride, self.padding)
        return y + F.conv2d(others, weights[1], None, self.stride, self.padding)


class PixelOutput(nn.Conv2d):
    """The last convolution of a network; see PixelInput."""

    def __init__(self, in_channels: int, pixel_channels: int, *, patch: int = 1) -> None:
        super().__init__(in_channels, pixel_channels * patch**2, 3, padding=1)
        self.colours = 3 * patch**2

    def forward(self, x: Tensor) -> Tensor:
        if self.out_channels <= self.colours:
            return super().forward(x)
        parts = zip(*(tensor.tensor_split([self.colours]) for tensor in (self.weight, self.bias)), strict=True)
        return torch.cat([F.conv2d(x, weight, bias, padding=self.padding) for weight, bias in parts], 1)

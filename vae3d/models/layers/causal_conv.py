"""Causal 3D convolution of Open-Sora's temporal VAE."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Module):
    """Conv3d over [B, C, T, H, W] with zeros before the first frame and around each frame.

    Open-Sora v1.2 `opensora/models/vae/vae_temporal.py`, after MAGVIT-v2. kernel - stride zero frames stand in front,
    so a stride-2 convolution turns 2n frames into n.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, max(0, kernel - time_stride), 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding) if any(self.padding) else x)

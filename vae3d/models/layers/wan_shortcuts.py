"""The levels of the Wan2.2 VAE: blocks and resampling, plus a shortcut without parameters.

`wan/modules/vae2_2.py` of Wan-Video/Wan2.2 (Down_ResidualBlock, Up_ResidualBlock), after DC-AE (arXiv 2410.10733).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from vae3d.models.layers.wan_blocks import LayerCache, run_chain


class DownBlock(nn.Module):
    """blocks, then down (none or one), plus the average of the input's patches over groups of channels."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: Sequence[nn.Module], down: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList([*blocks, *down])
        self.out_channels = out_channels
        self.space = 2 if down else 1
        self.time = 2 if down and down[0].time_conv is not None else 1
        if in_channels * self.time * self.space**2 % out_channels:
            raise ValueError(f"the patches of {in_channels} channels cannot be averaged to {out_channels}")

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        y, cache = run_chain(self.downsamples, x, cache, return_cache)
        return y + self._shortcut(x), cache

    def _shortcut(self, x: Tensor) -> Tensor:
        """An odd first chunk gets zero frames in front, as published, so its first frame is averaged with zeros."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        patches = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=self.time, j=self.space, k=self.space)
        return reduce(patches, "b (c g) t h w -> b c t h w", "mean", c=self.out_channels)


class UpBlock(nn.Module):
    """blocks, then up (none or one), plus the input's channels repeated and spread over patches."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: Sequence[nn.Module], up: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList([*blocks, *up])
        self.up = bool(up)
        self.time = 2 if up and up[0].time_conv is not None else 1
        self.repeats, rest = divmod(out_channels * self.time * 4, in_channels)
        if self.up and rest:
            raise ValueError(f"{in_channels} channels cannot be spread over patches of {out_channels}")

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        y, new_cache = run_chain(self.upsamples, x, cache, return_cache)
        return y + self._shortcut(x, first=cache is None) if self.up else y, new_cache

    def _shortcut(self, x: Tensor, first: bool) -> Tensor:
        x = x.repeat_interleave(self.repeats, 1)
        x = rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=self.time, j=2, k=2)
        return x[:, :, self.time - 1 :] if first else x

"""Blocks of the Wan2.1 and Wan2.2 VAEs, each a step of a chain: (x, past, keep) -> (y, past).

`wan/modules/vae.py` of Wan-Video/Wan2.1 and `vae2_2.py` of Wan-Video/Wan2.2, whose state-dict keys these modules have.
x: [B, C, T, H, W]. past: what the block remembers of the chunk before, None at the beginning of a clip. keep: whether
to return what the next chunk needs. A chunk at the beginning has 1 + n * stride frames, every later one n * stride;
coding a clip whole or in any such chunks is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.models.layers.borders import POINTWISE, Borders
from vae3d.models.layers.checkpointing import run
from vae3d.models.layers.stream_conv import rms_norm, stream_conv

Past = Any  # of one block: None, a tensor, or a tuple of them


def run_chain(
    layers: Sequence[nn.Module], x: Tensor, past: Sequence[Past] | None, keep: bool, recompute: bool = False
) -> tuple[Tensor, tuple[Past, ...]]:
    """Pass x through `layers`; recompute: keep only each layer's input for backward.

    past: of every layer. A list is emptied on the way, so that frames are freed as others take their place; a tuple
    is left alone.
    """
    remembered = []
    for number, layer in enumerate(layers):
        own = None if past is None else past[number]
        if isinstance(past, list):
            past[number] = None
        x, own = run(layer, x, own, keep, recompute=recompute)
        remembered.append(own)
    return x, tuple(remembered)


def frames_of(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W], without a copy in channels-last memory."""
    return x.transpose(1, 2).flatten(0, 1)


def clips_of(frames: Tensor, batch: int) -> Tensor:
    """Inverse of frames_of."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class RMSNorm(nn.Module):
    """Gain of an RMS norm over channels; `dims` trailing axes, as the published keys have them."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


class Conv(nn.Conv3d):
    """A causal 3 x 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, borders: Borders) -> None:
        super().__init__(in_channels, out_channels, 3)
        self.borders = borders

    def forward(self, x: Tensor, past: Past = None, keep: bool = False) -> tuple[Tensor, Past]:
        return stream_conv(x, past, self, self.borders, keep=keep)


class Head(nn.ModuleDict):
    """Norm, SiLU and the last convolution; keys 0 and 2."""

    def __init__(self, channels: int, out_channels: int, borders: Borders) -> None:
        super().__init__({"0": RMSNorm(channels), "2": nn.Conv3d(channels, out_channels, 3)})
        self.borders = borders

    def forward(self, x: Tensor, past: Past = None, keep: bool = False) -> tuple[Tensor, Past]:
        return stream_conv(x, past, self["2"], self.borders, gamma=self["0"].gamma, keep=keep)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution (keys residual.0, .2, .3, .6), beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, borders: Borders) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": nn.Conv3d(in_channels, out_channels, 3),
                "3": RMSNorm(out_channels),
                "6": nn.Conv3d(out_channels, out_channels, 3),
            }
        )
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.borders = borders

    def forward(self, x: Tensor, past: Past = None, keep: bool = False) -> tuple[Tensor, Past]:
        part = self.residual
        first, second = past or (None, None)
        h, first = stream_conv(x, first, part["2"], self.borders, gamma=part["0"].gamma, keep=keep)
        h, second = stream_conv(h, second, part["6"], self.borders, gamma=part["3"].gamma, keep=keep)
        return h + (x if self.shortcut is None else pointwise(self.shortcut, x)), (first, second) if keep else None


def pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1 x 1 x 1 convolution, frame by frame."""
    return clips_of(F.conv2d(frames_of(x), conv.weight[:, :, 0], conv.bias), len(x))


class AttentionBlock(nn.Module):
    """Single-head attention among the places of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, past: Past = None, keep: bool = False) -> tuple[Tensor, Past]:
        frames = frames_of(x)
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (s c) h w -> s n 1 (h w) c", s=3)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return x + clips_of(self.proj(mixed), len(x)), None


class Downsample(nn.Module):
    """Half the height and width (key resample.1) and then, if `time`, half the frame rate (key time_conv).

    The first frame of a clip passes time_conv by.
    """

    def __init__(self, channels: int, time: bool, borders: Borders) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None
        self.borders = borders

    def forward(self, x: Tensor, past: Past = None, keep: bool = False) -> tuple[Tensor, Past]:
        x = clips_of(self.resample["1"](self._pad(frames_of(x))), len(x))
        if self.time_conv is None:
            return x, None
        last = x[:, :, -1:].clone() if keep else None
        if past is not None:
            x = self.time_conv(torch.cat([past, x], 2))
        elif x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        else:
            x = passed_by(x, self.time_conv)
        return x, last

    def _pad(self, frames: Tensor) -> Tensor:
        """One row below and one column to the right."""
        rows, columns = self.borders.halo
        if not columns:
            return F.pad(frames, (0, 1, 0, 1))
        padded = self.borders.pad(frames)[..., rows:, columns:]
        return padded if rows else F.pad(padded, (0, 0, 0, 1))


class Upsample(nn.Module):
    """Double the frame rate, if `time` (key time_conv), and then height and width (key resample.1).

    The first frame of a clip passes time_conv by, which therefore sees zeros before the second.
    """

    def __init__(self, channels: int, out_channels: int, time: bool, borders: Borders) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, out_channels, 3, padding=1)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if time else None
        self.borders = borders

    def forward(self, x: Tensor, past: Past = None, keep: bool = False) -> tuple[Tensor, Past]:
        remembered = None
        if self.time_conv is not None:
            x, remembered = self._double_frames(x, past, keep)
        conv = self.resample["1"]
        return clips_of(upsample_conv(frames_of(x), conv.weight, conv.bias, self.borders), len(x)), remembered

    def _double_frames(self, x: Tensor, past: Past, keep: bool) -> tuple[Tensor, Past]:
        alone, later = (x[:, :, :1], x[:, :, 1:]) if past is None else (x[:, :, :0], x)
        if not later.shape[2]:
            return passed_by(x, self.time_conv), x[:, :, :0].clone() if keep else None
        pairs, remembered = stream_conv(later, past, self.time_conv, POINTWISE, keep=keep)
        pairs = rearrange(pairs.permute(0, 2, 3, 4, 1), "b t h w (s c) -> b (t s) h w c", s=2).permute(0, 4, 1, 2, 3)
        return torch.cat([alone, pairs], 2) if alone.shape[2] else pairs, remembered


def passed_by(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """x, with a gradient of zero for a convolution that a single frame does not need: DDP waits for every parameter."""
    if not (torch.is_grad_enabled() and conv.weight.requires_grad):
        return x
    return x + 0.0 * (conv.weight.sum() + conv.bias.sum()).to(x.dtype)


def upsample_conv(frames: Tensor, weight: Tensor, bias: Tensor | None, borders: Borders) -> Tensor:
    """conv2d(nearest-neighbour upsampling of [N, C, H, W] by two, 3 x 3 weight), without the upsampled frames.

    Every output pixel sees 2 x 2 different inputs, under weights that are sums of the kernel's: one 2 x 2 convolution
    makes the four pixels that an input becomes, with 4/9 of the multiplications (Shi et al., arXiv 1609.07009).
    """
    height, width = frames.shape[-2:]
    rows = torch.stack([torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2),
                        torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2)])  # fmt: skip
    phases = torch.stack([torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], -1),
                          torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], -1)], 1)  # fmt: skip
    bias = None if bias is None else bias.repeat(4)
    out = F.conv2d(borders.pad(frames), phases.flatten(0, 2), bias, padding=borders.zeros)
    even_odd = [
        piece[..., row : row + height, column : column + width]
        for piece, (row, column) in zip(out.chunk(4, 1), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True)
    ]
    quads = torch.stack([piece.permute(0, 2, 3, 1) for piece in even_odd])
    return rearrange(quads, "(r s) n h w c -> n (h r) (w s) c", r=2).permute(0, 3, 1, 2)

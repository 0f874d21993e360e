"""Networks of the Wan2.1 and Wan2.2 VAEs. Blocks are (x, cache, return_cache) -> (y, cache of the next chunk or None).

State-dict keys are those of `wan/modules/vae.py` in Wan-Video/Wan2.1 and `vae2_2.py` in Wan-Video/Wan2.2.
x: [B, C, T, H, W]. cache: from the chunk before, None at the start of a clip. The first chunk has 1 + n * stride
frames, later ones n * stride; coding a clip whole or in any such chunks gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from vae3d.models.layers.borders import POINTWISE, Borders
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.frames import clips_of, frames_of
from vae3d.models.layers.stream_conv import rms_norm, stream_conv, zero_cache

LayerCache = Any  # None, a tensor, or a tuple of them


def run_chain(
    layers: Sequence[nn.Module],
    x: Tensor,
    cache: Sequence[LayerCache] | None,
    return_cache: bool,
    recompute: bool = False,
) -> tuple[Tensor, tuple[LayerCache, ...]]:
    """Pass x through `layers`. recompute: checkpoint every layer.

    cache: of every layer. A list is emptied on the way, so that old frames are freed before new ones are kept; a tuple
    is left as it is.
    """
    new_cache = []
    for i, layer in enumerate(layers):
        layer_cache = None if cache is None else cache[i]
        if isinstance(cache, list):
            cache[i] = None
        x, layer_cache = maybe_checkpoint(layer, x, layer_cache, return_cache, enabled=recompute)
        new_cache.append(layer_cache)
    return x, tuple(new_cache)


class RMSNorm(nn.Module):
    """RMS norm over channels. dims: trailing axes of its gain, as in the published keys."""

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

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        return stream_conv(x, cache, self, self.borders, return_cache=return_cache)

    def conv_input(self, x: Tensor) -> Tensor:
        """What the kernel slides over, from a clip: with zero frames in front and padded sides."""
        return _padded(F.pad(x, (0, 0, 0, 0, 2, 0)), self.borders)


class Head(nn.ModuleDict):
    """Norm, SiLU and the last convolution; keys 0 and 2."""

    def __init__(self, channels: int, out_channels: int, borders: Borders) -> None:
        super().__init__({"0": RMSNorm(channels), "2": nn.Conv3d(channels, out_channels, 3)})
        self.borders = borders

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        return norm_conv(x, cache, self["0"], self["2"], self.borders, return_cache)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution (keys residual.0, .2, .3, .6), plus a shortcut.

    shortcut: whether it is a convolution; None: where the channels change.
    """

    def __init__(self, in_channels: int, out_channels: int, borders: Borders, shortcut: bool | None = None) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": nn.Conv3d(in_channels, out_channels, 3),
                "3": RMSNorm(out_channels),
                "6": nn.Conv3d(out_channels, out_channels, 3),
            }
        )
        shortcut = in_channels != out_channels if shortcut is None else shortcut
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if shortcut else None
        self.borders = borders

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        block = self.residual
        first, second = cache or (None, None)
        h, first = norm_conv(x, first, block["0"], block["2"], self.borders, return_cache)
        h, second = norm_conv(h, second, block["3"], block["6"], self.borders, return_cache)
        h = h + (x if self.shortcut is None else pointwise(self.shortcut, x))
        return h, (first, second) if return_cache else None


def is_hooked(*layers: nn.Module | None) -> bool:
    """Whether layers must be called as modules, which runs the forward hooks on them; else fused code reads their
    weights. Results differ by rounding. Compiled code does not see hooks."""
    return not torch.compiler.is_compiling() and any(
        layer is not None and (layer._forward_hooks or layer._forward_pre_hooks) for layer in layers
    )


def norm_conv(
    x: Tensor, cache: LayerCache, norm: RMSNorm | None, conv: nn.Conv3d, borders: Borders, return_cache: bool
) -> tuple[Tensor, LayerCache]:
    """Norm and SiLU, unless `norm` is None, then a causal convolution over the frames of `cache` and x."""
    if not is_hooked(norm, conv):
        gamma = None if norm is None else norm.gamma
        return stream_conv(x, cache, conv, borders, gamma=gamma, return_cache=return_cache)
    x = x if norm is None else F.silu(norm(x))
    full = x if cache is None else torch.cat([cache, x], 2)
    missing = 2 - (0 if cache is None else cache.shape[2])
    y = conv(_padded(F.pad(full, (0, 0, 0, 0, missing, 0)), borders))
    return y, full[:, :, -2:].clone() if return_cache else None


def _padded(x: Tensor, borders: Borders) -> Tensor:
    """[B, C, T, H, W] with the padding of a 3 x 3 kernel written out."""
    rows, columns = borders.zero_padding
    frames = F.pad(borders.pad(frames_of(x)), (columns, columns, rows, rows))
    return clips_of(frames, len(x))


def pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1 x 1 x 1 convolution, frame by frame."""
    if is_hooked(conv):
        return conv(x)
    return clips_of(F.conv2d(frames_of(x), conv.weight[:, :, 0], conv.bias), len(x))


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        frames = frames_of(x)
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (s c) h w -> s n 1 (h w) c", s=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return x + clips_of(self.proj(attended), len(x)), None


class Downsample(nn.Module):
    """Halve height and width (key resample.1) and then, if `time`, the frame rate (key time_conv).

    The first frame of a clip skips time_conv.
    """

    def __init__(self, channels: int, time: bool, borders: Borders) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None
        self.borders = borders

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        x = clips_of(self.resample["1"](self._pad(frames_of(x))), len(x))
        if self.time_conv is None:
            return x, None
        last = x[:, :, -1:].clone(memory_format=torch.channels_last_3d) if return_cache else None
        if cache is not None:
            x = self.time_conv(torch.cat([cache, x], 2))
        elif x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        else:
            x = zero_grad_identity(x, self.time_conv)
        return x, last

    def _pad(self, frames: Tensor) -> Tensor:
        """One row below and one column to the right."""
        rows, columns = self.borders.padding
        return F.pad(self.borders.pad(frames)[..., rows:, columns:], (0, 1 - columns, 0, 1 - rows))


class Upsample(nn.Module):
    """Double the frame rate, if `time` (key time_conv), and then height and width (key resample.1).

    The first frame of a clip skips time_conv, which therefore sees zeros before the second.
    """

    def __init__(self, channels: int, out_channels: int, time: bool, borders: Borders) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, out_channels, 3)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if time else None
        self.borders = borders

    def forward(self, x: Tensor, cache: LayerCache = None, return_cache: bool = False) -> tuple[Tensor, LayerCache]:
        new_cache = None
        if self.time_conv is not None:
            x, new_cache = self._double_frames(x, cache, return_cache)
        conv = self.resample["1"]
        if is_hooked(conv):
            return clips_of(conv(frames_of(_padded(_upsampled(x), self.borders))), len(x)), new_cache
        return clips_of(upsample_conv(frames_of(x), conv.weight, conv.bias, self.borders), len(x)), new_cache

    def _double_frames(self, x: Tensor, cache: LayerCache, return_cache: bool) -> tuple[Tensor, LayerCache]:
        first, later = (x[:, :, :1], x[:, :, 1:]) if cache is None else (x[:, :, :0], x)
        if not later.shape[2]:
            return zero_grad_identity(x, self.time_conv), zero_cache(x) if return_cache else None
        pairs, new_cache = norm_conv(later, cache, None, self.time_conv, POINTWISE, return_cache)
        pairs = rearrange(pairs.permute(0, 2, 3, 4, 1), "b t h w (s c) -> b (t s) h w c", s=2).permute(0, 4, 1, 2, 3)
        return torch.cat([first, pairs], 2) if first.shape[2] else pairs, new_cache


class DownBlock(nn.Module):
    """A level of Wan2.2's encoder: blocks, then down (none or one), plus the patches of its input averaged over groups
    of channels. Down_ResidualBlock of `vae2_2.py`, after DC-AE (arXiv 2410.10733)."""

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
    """A level of Wan2.2's decoder: blocks, then up (none or one), plus the channels of its input repeated and spread
    over patches. Up_ResidualBlock of `vae2_2.py`."""

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


class Encoder(nn.Module):
    """Video (or patches) to moments.

    first: channels of the first convolution. widths: channels per level. time: which level boundaries halve the frame
    rate.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        first: int,
        widths: Sequence[int],
        time: Sequence[bool],
        layers: int,
        shortcuts: bool,
        borders: Borders,
    ) -> None:
        super().__init__()
        self.conv1 = Conv(in_channels, first, borders)
        levels = []
        for level, (before, width) in enumerate(pairwise([first, *widths])):
            blocks = [ResidualBlock(channels, width, borders) for channels in [before, *[width] * (layers - 1)]]
            down = [Downsample(width, time[level], borders)] if level < len(time) else []
            levels += [DownBlock(before, width, blocks, down)] if shortcuts else blocks + down
        self.downsamples = nn.ModuleList(levels)
        self.middle = _middle(widths[-1], borders)
        self.head = Head(widths[-1], out_channels, borders)

    def chain(self) -> list[nn.Module]:
        return [self.conv1, *self.downsamples, *self.middle, self.head]


class Decoder(nn.Module):
    """Latents to video (or patches).

    full: widths of the levels, from the latents to the pixels, that say which layers there are. widths: of these
    layers. time: which level boundaries double the frame rate. counts: residual blocks of each level.
    Raises ValueError for widths that these layers cannot have.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        full: Sequence[int],
        widths: Sequence[int],
        time: Sequence[bool],
        counts: Sequence[int],
        shortcuts: bool,
        borders: Borders,
    ) -> None:
        super().__init__()
        self.conv1 = Conv(in_channels, widths[0], borders)
        self.middle = _middle(widths[0], borders)
        levels = []
        before, full_before = widths[0], full[0]
        for level, (width, full_width) in enumerate(zip(widths, full, strict=True)):
            last = level == len(time)
            shortcut = full_before != full_width
            if not shortcut and before != width:
                raise ValueError(
                    f"decoder_widths is {list(widths)}: levels {level - 1} and {level} share their channels, so they "
                    "need the same width"
                )
            if counts[level] < 1:
                raise ValueError(f"decoder_blocks is {list(counts)}; give each level at least one block")
            blocks = [ResidualBlock(before, width, borders, shortcut)]
            blocks += [ResidualBlock(width, width, borders) for _ in range(counts[level] - 1)]
            # Wan2.1 halves the channels with the resolution
            after, full_after = (width, full_width) if shortcuts else (width // 2, full_width // 2)
            if not last and not shortcuts and full_after == full[level + 1]:
                after = widths[level + 1]
            up = [] if last else [Upsample(width, after, time[level], borders)]
            levels += [UpBlock(before, width, blocks, up)] if shortcuts else blocks + up
            before, full_before = after, full_after
        self.upsamples = nn.ModuleList(levels)
        self.head = Head(widths[-1], out_channels, borders)

    def chain(self) -> list[nn.Module]:
        return [self.conv1, *self.middle, *self.upsamples, self.head]


def _middle(width: int, borders: Borders) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(width, width, borders), AttentionBlock(width), ResidualBlock(width, width, borders)]
    )


def zero_grad_identity(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """x, with a zero gradient for a convolution that a single frame skips: every parameter must have a gradient."""
    if not (torch.is_grad_enabled() and conv.weight.requires_grad):
        return x
    return x + 0.0 * (conv.weight.sum() + conv.bias.sum()).to(x.dtype)


def _upsampled(x: Tensor) -> Tensor:
    return clips_of(F.interpolate(frames_of(x), scale_factor=2.0), len(x))


def upsample_conv(frames: Tensor, weight: Tensor, bias: Tensor | None, borders: Borders) -> Tensor:
    """conv2d(nearest-neighbour upsampling of [N, C, H, W] by two, 3 x 3 weight), without the upsampled frames.

    Each output pixel depends on 2 x 2 input pixels, with sums of the kernel's weights: a transposed convolution of
    stride two with a 4 x 4 kernel, which needs 4/9 of the multiplications.
    """
    for axis in (2, 3):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack([last, middle + last, first + middle, first], axis)
    padding = [1 + 2 * written for written in borders.padding]  # crops the outputs of written padding, and one more
    return F.conv_transpose2d(borders.pad(frames), weight.transpose(0, 1), bias, stride=2, padding=padding)

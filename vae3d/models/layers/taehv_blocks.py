"""Blocks of the TAEHV networks: (x, clips, cache) -> y.

State-dict keys are those of `taehv.py` in madebyollin/taehv. x: [T * B, C, H, W], time first, so that the frame before
stands B rows earlier. cache: last frame of each clip in the chunk before, [B, C, H, W]; None at the start, for zeros.
Coding a clip whole or in chunks gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.models.layers.borders import Borders
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.pixel_convs import PixelInput, PixelOutput
from vae3d.models.layers.stream_conv import join_pairs, pair_conv
from vae3d.models.layers.wan_blocks import is_hooked, upsample_conv

Cache = Sequence[Tensor | None]  # of every layer: its last input frames; None if it is not a MemBlock
ZERO_PADDING = Borders()


class Clamp(nn.Module):
    """Soft limit of latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution.

    On a CPU with one thread torch does not choose oneDNN for it, and takes twice the time, unless it is dilated.
    Dilation does not change a 1 x 1 convolution.
    """

    def __init__(self, width: int, out_width: int, bias: bool = False) -> None:
        super().__init__(width, out_width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, dilation=2 if x.device.type == "cpu" else 1)


class MemBlock(nn.Module):
    """Residual block over each frame and the one before it. relu: of the sum."""

    def __init__(self, conv: nn.Sequential, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu

    def forward(self, x: Tensor, clips: int, cache: Tensor | None) -> Tensor:
        first = self.conv[0]
        if type(first) is nn.Conv2d and first.groups == 1 and not is_hooked(first):
            y = pair_conv(x, cache, clips, first)
        else:
            y = first(join_pairs(x, cache, clips))
        x = self.conv[1:](y) + x
        return x.relu_() if self.relu else x


def mem_block(width: int, hidden: int | None = None) -> MemBlock:
    """hidden: channels between the convolutions; None: `width`."""
    hidden = hidden or width
    layers = conv(2 * width, hidden), nn.ReLU(True), conv(hidden, hidden), nn.ReLU(True), conv(hidden, width)
    return MemBlock(nn.Sequential(*layers), relu=True)


def super_mem_block(width: int, hidden: int | None = None) -> MemBlock:
    """A depthwise 7 x 7 convolution and an inverted bottleneck, as in ConvNeXt (arXiv 2201.03545).

    hidden: channels of the bottleneck; None: 4 * width.
    """
    hidden = hidden or 4 * width
    layers = (
        nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
        Pointwise(2 * width, hidden, bias=True),
        nn.ReLU(True),
        Pointwise(hidden, width),
    )
    return MemBlock(nn.Sequential(*layers), relu=False)


def wide_mem_block(width: int, hidden: int | None = None) -> MemBlock:
    """1 x 1 convolutions over all channels, and 3 x 3 ones over groups of about 64, in turn.

    Raises ValueError for channels inside it, and for a width that the groups do not divide.
    """
    if hidden is not None:
        raise ValueError("decoder_hidden: the blocks of a wide decoder have no other channels inside; leave it out")
    groups = max(1, width // 64)
    if width % groups:
        raise ValueError(f"decoder_channels: {width} channels have {groups} groups, which do not divide them")
    layers = (
        Pointwise(2 * width, width, bias=True),
        nn.ReLU(True),
        conv(width, width, groups=groups),
        nn.ReLU(True),
        Pointwise(width, width, bias=True),
        nn.ReLU(True),
        conv(width, width, groups=groups),
    )
    return MemBlock(nn.Sequential(*layers), relu=True)


class TPool(nn.Module):
    """Merge every `stride` frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Pointwise(stride * width, width)

    def forward(self, x: Tensor, clips: int) -> Tensor:
        if self.stride == 1:
            return self.conv(x)
        if is_hooked(self.conv):
            groups = x.unflatten(0, (-1, self.stride, clips))
            return self.conv(torch.cat([frame.flatten(0, 1) for frame in groups.unbind(1)], 1))
        # A convolution over time, which does not copy the frames: the pixels of all clips are one row of an image.
        count, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(1, count // clips, clips * height * width, channels).permute(0, 3, 1, 2)
        weight = self.conv.weight.unflatten(1, (self.stride, channels)).transpose(1, 2)[..., 0].contiguous()
        y = F.conv2d(rows, weight, stride=(self.stride, 1)).permute(0, 2, 3, 1)
        return y.reshape(count // self.stride, height, width, -1).permute(0, 3, 1, 2)


class TGrow(nn.Module):
    """Split every frame into `stride` frames; groups of output channels are in temporal order."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Pointwise(width, stride * width)

    def forward(self, x: Tensor, clips: int) -> Tensor:
        x = self.conv(x)
        if self.stride == 1:
            return x
        frames = x.permute(0, 2, 3, 1)  # so that they stay in channels-last memory
        frames = rearrange(frames, "(t b) h w (s c) -> (t s b) h w c", b=clips, s=self.stride)
        return frames.permute(0, 3, 1, 2)


class UpConv(nn.Conv2d):
    """Nearest-neighbour upsampling by two, then a 3 x 3 convolution."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.weight, None, ZERO_PADDING)

    def conv_input(self, x: Tensor) -> Tensor:
        """What the kernel slides over, without its padding."""
        return F.interpolate(x, scale_factor=2)


def conv(width: int, out_width: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(width, out_width, 3, padding=1, **options)


def encoder(pixels: int, patch: int, width: int, latents: int, time: Sequence[bool]) -> nn.Sequential:
    """time: which of the three stages halve the frame rate. Each halves height and width. pixels: channels of a video.
    patch: side of the patches that the network works on."""
    layers = [PixelInput(pixels, width, patch=patch), nn.ReLU(True)]
    for halve in time:
        layers += [TPool(width, 1 + halve), conv(width, width, stride=2, bias=False)]
        layers += [mem_block(width) for _ in range(3)]
    return nn.Sequential(*layers, conv(width, latents))


def decoder(
    latents: int,
    widths: Sequence[int],
    pixels: int,
    patch: int,
    time: Sequence[bool],
    space: Sequence[bool],
    counts: Sequence[int],
    hidden: Sequence[int | None],
    wide: bool = False,
) -> nn.Sequential:
    """widths: of the three stages and the last layers. time, space: which stages double the frame rate and the sides.
    counts, hidden: blocks of each stage, and the channels inside them. wide: with wide_mem_block.

    The published network upsamples before TGrow, where an Identity stands here. TGrow is a 1 x 1 convolution, so
    upsampling after it, in UpConv, gives the same on a quarter of the pixels.
    """
    layers = [Clamp(), conv(latents, widths[0]), nn.ReLU(True)]
    for stage, (width, after) in enumerate(zip(widths, widths[1:], strict=False)):
        block = wide_mem_block if wide else mem_block
        layers += [block(width, hidden[stage]) for _ in range(counts[stage])]
        layers += [nn.Identity(), TGrow(width, 1 + time[stage])]
        layers += [UpConv(width, after) if space[stage] else conv(width, after, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(True), PixelOutput(widths[-1], pixels, patch=patch))


def super_decoder(
    latents: int,
    widths: Sequence[int],
    pixels: int,
    patch: int,
    time: Sequence[bool],
    counts: Sequence[int],
    hidden: Sequence[int | None],
) -> nn.Sequential:
    layers = [Pointwise(latents, widths[0])]
    for stage, (width, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [super_mem_block(width, hidden[stage]) for _ in range(counts[stage])]
        layers += [conv(width, 4 * after), nn.ReLU(True), nn.PixelShuffle(2), TGrow(after, 1 + time[stage])]
    return nn.Sequential(*layers, PixelOutput(widths[-1], pixels, patch=patch))


def tile_cut(layers: nn.Sequential, exact: bool, *, down: bool) -> int:
    """Where layers that run on tiles meet those that run on whole frames.

    Exact tiles leave out what is at a quarter of the resolution or less: it needs a sixteenth of the memory, and tiles
    would need wide margins there. down: of an encoder, which ends with the whole frames.
    """
    if not exact:
        return len(layers) if down else 0
    if down:
        return [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1][1] + 1
    ups = [i for i, layer in enumerate(layers) if isinstance(layer, UpConv | nn.PixelShuffle)]
    return ups[-2:][0] if ups else len(layers)


def run_layers(
    layers: nn.Sequential, x: Tensor, clips: int, cache: Cache | None, recompute: bool = False
) -> tuple[Tensor, Cache]:
    """Pass frames through `layers`; returns them and the cache for the next chunk.

    cache: from the chunk before, None at the start. recompute: checkpoint the large layers.
    """
    new_cache: list[Tensor | None] = []
    for i, layer in enumerate(layers):
        last = None
        if isinstance(layer, MemBlock):
            last = x[-clips:].clone()  # a view would keep the whole chunk alive
            x = maybe_checkpoint(layer, x, clips, None if cache is None else cache[i], enabled=recompute)
        elif isinstance(layer, (TPool, TGrow)):  # torch 2.6 cannot trace TPool | TGrow
            x = layer(x, clips)
        else:
            x = maybe_checkpoint(layer, x, enabled=recompute and isinstance(layer, UpConv))
        new_cache.append(last)
    return x, tuple(new_cache)

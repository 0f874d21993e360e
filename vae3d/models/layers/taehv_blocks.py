"""Blocks of the TAEHV networks, each a step over frames: (x, clips, past) -> y.

`taehv.py` of madebyollin/taehv, whose state-dict keys these modules have. x: [T * B, C, H, W], time first, so that
"the frame before" is B places before. past: the last frame of every clip in the chunk before, [B, C, H, W], or None at
the beginning, where the memory is zero. Coding a clip whole or in chunks is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.layers.borders import Borders
from vae3d.models.layers.checkpointing import run
from vae3d.models.layers.wan_blocks import upsample_conv

Memory = Sequence[Tensor | None]  # of every layer: the last frames that it was given, if it looks back
ZEROS = Borders()


class Clamp(nn.Module):
    """Soft limit of latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution.

    With one thread on a CPU torch computes it by a routine that takes twice the time of oneDNN's, unless it is dilated,
    and there is nothing to dilate in one place.
    """

    def __init__(self, width: int, out_width: int, bias: bool = False) -> None:
        super().__init__(width, out_width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, dilation=2 if x.device.type == "cpu" else 1)


class MemBlockBase(nn.Module):
    """A residual block whose convolutions see each frame and the one before it."""

    conv: nn.Sequential

    def forward(self, x: Tensor, clips: int, past: Tensor | None) -> Tensor:
        past = torch.zeros_like(x[:clips]) if past is None else past
        before = torch.cat([past, x[:-clips]])
        return self.conv(torch.cat([x, before], 1)) + x


class MemBlock(MemBlockBase):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * width, width), nn.ReLU(True), conv(width, width), nn.ReLU(True), conv(width, width)
        )

    def forward(self, x: Tensor, clips: int, past: Tensor | None) -> Tensor:
        return super().forward(x, clips, past).relu_()


class SuperMemBlock(MemBlockBase):
    """The super decoder's: a depthwise 7 x 7 convolution and an inverted bottleneck, as in ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            Pointwise(2 * width, 4 * width, bias=True),
            nn.ReLU(True),
            Pointwise(4 * width, width),
        )


class TPool(nn.Module):
    """Every `stride` frames to one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Pointwise(stride * width, width)

    def forward(self, x: Tensor, clips: int) -> Tensor:
        if self.stride > 1:
            groups = x.unflatten(0, (-1, self.stride, clips))
            x = torch.cat([frame.flatten(0, 1) for frame in groups.unbind(1)], 1)
        return self.conv(x)


class TGrow(nn.Module):
    """Every frame to `stride`; blocks of output channels are in the order of time."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Pointwise(width, stride * width)

    def forward(self, x: Tensor, clips: int) -> Tensor:
        x = self.conv(x)
        if self.stride == 1:
            return x
        frames = [frame.unflatten(0, (-1, clips)) for frame in x.chunk(self.stride, 1)]
        return torch.stack(frames, 1).flatten(0, 2)


class UpConv(nn.Conv2d):
    """A 3 x 3 convolution of frames whose sides are doubled first, by repeating pixels."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x, self.weight, None, ZEROS)


def conv(width: int, out_width: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(width, out_width, 3, padding=1, **options)


def encoder(pixels: int, width: int, latents: int, time: Sequence[bool]) -> nn.Sequential:
    """time: which of the three stages halve the frame rate; each halves height and width."""
    layers = [conv(pixels, width), nn.ReLU(True)]
    for halve in time:
        layers += [TPool(width, 1 + halve), conv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width) for _ in range(3)]
    return nn.Sequential(*layers, conv(width, latents))


def decoder(
    latents: int, widths: Sequence[int], pixels: int, time: Sequence[bool], space: Sequence[bool]
) -> nn.Sequential:
    """widths: of the three stages and of what follows. time, space: which stages double the frame rate, the sides.

    The published network doubles the sides before TGrow, where an Identity holds the place. A 1 x 1 convolution does
    not care; here the 3 x 3 convolution behind it does that, on a quarter of the pixels.
    """
    layers = [Clamp(), conv(latents, widths[0]), nn.ReLU(True)]
    for stage, (width, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [MemBlock(width) for _ in range(3)]
        layers += [nn.Identity(), TGrow(width, 1 + time[stage])]
        layers += [UpConv(width, after) if space[stage] else conv(width, after, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(True), conv(widths[-1], pixels))


def super_decoder(latents: int, widths: Sequence[int], pixels: int, time: Sequence[bool]) -> nn.Sequential:
    layers = [Pointwise(latents, widths[0])]
    for stage, (width, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [SuperMemBlock(width) for _ in range(3)]
        layers += [conv(width, 4 * after), nn.ReLU(True), nn.PixelShuffle(2), TGrow(after, 1 + time[stage])]
    return nn.Sequential(*layers, conv(widths[-1], pixels))


def run_layers(
    layers: nn.Sequential, x: Tensor, clips: int, memory: Memory | None, recompute: bool = False
) -> tuple[Tensor, Memory]:
    """Pass frames through `layers`; returns them and the memory for the chunk after.

    memory: what the chunk before returned, None at the beginning. recompute: keep only the large layers' inputs for
    backward.
    """
    remembered: list[Tensor | None] = []
    for number, layer in enumerate(layers):
        last = None
        if isinstance(layer, MemBlockBase):
            last = x[-clips:].clone()  # a view would hold the whole chunk
            x = run(layer, x, clips, None if memory is None else memory[number], recompute=recompute)
        elif isinstance(layer, TPool | TGrow):
            x = layer(x, clips)
        else:
            x = run(layer, x, recompute=recompute and isinstance(layer, UpConv))
        remembered.append(last)
    return x, tuple(remembered)

"""Patch discriminators: PatchGAN on images or clips, at one or more scales, and that of Seraena."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vae3d.precision import autocast_off

Norm = Literal["spectral_group", "spectral", "batch", "group", "none"]
SPECTRAL = ("spectral_group", "spectral")
SERAENA_STRIDE = 8  # pixels per score, along height and width


class Conv2d(nn.Conv2d):
    """A convolution that computes its weight, with spectral norm, in fp32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_off(x.device):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Conv3d(nn.Conv3d):
    """See Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_off(x.device):
            weight = self.weight
        time, *space = self.padding
        if x.shape[2] < self.kernel_size[0]:
            # oneDNN pads fewer frames than the kernel has wrongly: in bf16 on CPUs, the weight's gradient is garbage.
            x, time = F.pad(x, (0, 0, 0, 0, time, time)), 0
        return F.conv3d(x, weight, self.bias, self.stride, (time, *space))


class PatchGAN(nn.Module):
    """Images [N, 3, H, W] in [-1, 1] -> logits [N, 1, h, w] of overlapping patches, 70 x 70 with 3 layers.

    `NLayerDiscriminator` of junyanz/pytorch-CycleGAN-and-pix2pix `models/networks.py`, as in taming-transformers
    `taming/modules/discriminator/model.py`: 4 x 4 convolutions, `layers` of stride two and two of stride one,
    LeakyReLU 0.2. h is H // 2**layers - 2. A high logit means real.
    channels: of the first layer; they double up to eight times that.
    norm: after all convolutions but the first and the last: `batch`, as published, `group` (of at most `groups` groups)
    or `none`. `spectral` divides every convolution's weight by its largest singular value; `spectral_group` adds group
    norms. Convolutions before a norm have no bias, nor do they with `none` and `spectral`.
    Weights start from N(0, 0.02) and those of norms from N(1, 0.02), as published; with spectral norm, which removes
    their scale, from torch's defaults.
    Raises ValueError for groups that do not divide the channels, or images smaller than 3 * 2**layers.
    """

    conv = Conv2d
    batch_norm = nn.BatchNorm2d
    kernel: tuple[int, ...] = (4, 4)

    def __init__(self, *, channels: int = 64, layers: int = 3, norm: Norm = "spectral_group", groups: int = 32) -> None:
        super().__init__()
        self.norm = norm
        self.groups = groups
        self.min_size = 3 * 2**layers  # pixels
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [self._conv(3, widths[0], self._strides(0)), nn.LeakyReLU(0.2, True)]
        for n in range(1, layers + 1):
            stride = self._strides(n) if n < layers else 1
            parts += [self._conv(widths[n - 1], widths[n], stride, bias=False), self._norm(widths[n])]
            parts.append(nn.LeakyReLU(0.2, True))
        self.main = nn.Sequential(*parts, self._conv(widths[-1], 1, 1))
        if norm not in SPECTRAL:
            self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        require_min_size(x, self.min_size)
        return self.main(x)

    def _strides(self, layer: int) -> tuple[int, ...]:
        return (2, 2)

    def _conv(self, width: int, out_width: int, stride: int | tuple[int, ...], bias: bool = True) -> nn.Module:
        conv = self.conv(width, out_width, self.kernel, stride, padding=1, bias=bias)
        return spectral_norm(conv) if self.norm in SPECTRAL else conv

    def _norm(self, width: int) -> nn.Module:
        if self.norm == "batch":
            return self.batch_norm(width)
        if self.norm not in ("group", "spectral_group"):
            return nn.Identity()
        groups = min(self.groups, width)
        if groups < 1 or width % groups:
            raise ValueError(
                f"adversary.groups is {self.groups}, which does not divide {width} channels; use a divisor, or another "
                "adversary.channels"
            )
        return nn.GroupNorm(groups, width)


class PatchGAN3D(PatchGAN):
    """Clips [B, 3, T, H, W] -> logits [B, 1, t, h, w]; T may be 1. See PatchGAN.

    Kernels are 3 x 4 x 4. The layers between the first and the last two halve time, rounding up. Published 3D variants
    (`NLayerDiscriminator3D` of PKU-YuanGroup/Open-Sora-Plan) have 3 x 3 x 3.
    """

    conv = Conv3d
    batch_norm = nn.BatchNorm3d
    kernel = (3, 4, 4)

    def _strides(self, layer: int) -> tuple[int, ...]:
        return (2 if layer else 1, 2, 2)


class MultiScale(nn.Module):
    """Discriminators on full, half, quarter, ... height and width; returns a list of their logits.

    `MultiscaleDiscriminator` of NVIDIA/pix2pixHD, arXiv 1711.11585, section 3.2; here with 2 x 2 average pooling.
    """

    def __init__(self, discriminators: list[PatchGAN]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)
        self.min_size = max(d.min_size * 2**scale for scale, d in enumerate(discriminators))

    def forward(self, x: Tensor) -> list[Tensor]:
        require_min_size(x, self.min_size)
        logits = []
        for scale, discriminator in enumerate(self.discriminators):
            if scale:
                x = F.avg_pool2d(x, 2) if x.ndim == 4 else F.avg_pool3d(x, (1, 2, 2))
            logits.append(discriminator(x))
        return logits


def require_min_size(x: Tensor, min_size: int) -> None:
    if min(x.shape[-2:]) < min_size:
        raise ValueError(
            f"the clip is {x.shape[-2]}x{x.shape[-1]}; this discriminator needs {min_size} pixels or more; lower "
            "adversary.layers or adversary.scales"
        )


def _init(module: nn.Module) -> None:
    if isinstance(module, Conv2d | Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)


class ConditionalPatchDiscriminator(nn.Module):
    """Images [N, C, H, W] in [0, 1] and latents [N, c, h, w] -> scores [N, blocks, H // 8, W // 8].

    `PatchDiscWithContext` of madebyollin/seraena `seraena.py`: blocks of convolution, norm and ReLU over the image in
    [-1, 1], concatenated with the latents upsampled to its size. Each block has a head of its own, whose scores are
    averaged down to the last size. A high score means fake. The state dict has the published tensors in their order.
    norm: batch, as published, or group, which needs no batch statistics: groups of 16 channels, or of their greatest
    common divisor with 16. Groups of one channel would normalise away the contrast that a blurred image lacks.
    """

    def __init__(self, image_channels: int, context_channels: int, channels: Sequence[int], norm: str) -> None:
        super().__init__()
        widths = [image_channels + context_channels, *channels]
        self.blocks = nn.ModuleList(
            ConditionalBlock(before, width, halve=i in (1, 2, 3), norm=norm)
            for i, (before, width) in enumerate(zip(widths, channels, strict=False))
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in channels)

    def forward(self, images: Tensor, context: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = torch.cat([images * 2 - 1, F.interpolate(context, (height, width))], 1)
        scores = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            scores.append(F.adaptive_avg_pool2d(head(x), (height // SERAENA_STRIDE, width // SERAENA_STRIDE)))
        return torch.cat(scores, 1)


class ConditionalBlock(nn.Module):
    """3 x 3 convolution, or 4 x 4 of stride 2; norm; ReLU."""

    def __init__(self, before: int, width: int, *, halve: bool, norm: str) -> None:
        super().__init__()
        kernel, stride = (4, 2) if halve else (3, 1)
        self.conv = nn.Conv2d(before, width, kernel, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width // math.gcd(16, width), width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)

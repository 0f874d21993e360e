"""PatchGAN: a discriminator that judges patches, of images or of clips, at one or more sizes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vae3d.precision import autocast_off

NORMS = ("spectral_group", "spectral", "batch", "group", "none")
SPECTRAL = ("spectral_group", "spectral")


class Conv2d(nn.Conv2d):
    """A convolution whose weight is made in fp32, spectral norm included, whatever autocast makes of the rest."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_off(x.device):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Conv3d(nn.Conv3d):
    """See Conv2d."""

    forward = Conv2d.forward


class PatchGAN(nn.Module):
    """Images [N, 3, H, W] in [-1, 1] -> logits [N, 1, h, w] of overlapping patches, 70 x 70 with 3 layers.

    `NLayerDiscriminator` of junyanz/pytorch-CycleGAN-and-pix2pix `models/networks.py`, by way of
    CompVis/taming-transformers `taming/modules/discriminator/model.py`: 4 x 4 convolutions of `layers` strides of two
    and two of one, LeakyReLU 0.2. h is H // 2**layers - 2. A high logit says real.
    channels: of the first layer; they double up to eight times that.
    norm: after all convolutions but the first and the last, `batch`, as published, `group` (of `groups` groups, no more
    than channels) or none. `spectral` divides the weight of every convolution by its largest singular value, with or
    without groups. The convolutions before a norm have no bias, here also where the norm is `none` or `spectral`.
    Weights start from N(0, 0.02) and those of norms from N(1, 0.02), as published; where spectral norm takes their
    scale away, from torch's defaults.
    Raises ValueError for another norm, groups that do not divide the channels, or images smaller than 3 * 2**layers.
    """

    conv = Conv2d
    batch_norm = nn.BatchNorm2d
    kernel: tuple[int, ...] = (4, 4)

    def __init__(
        self, *, channels: int = 64, layers: int = 3, norm: str = "spectral_group", groups: int = 32, colours: int = 3
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"adversary.norm is {norm!r}; use one of {', '.join(NORMS)}")
        if layers < 1:
            raise ValueError(f"adversary.layers is {layers}; use 1 or more")
        self.norm, self.groups = norm, groups
        self.least = 3 * 2**layers  # pixels
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [self._conv(colours, widths[0], self._strides(0)), nn.LeakyReLU(0.2, True)]
        for n in range(1, layers + 1):
            stride = self._strides(n) if n < layers else 1
            parts += [self._conv(widths[n - 1], widths[n], stride, bias=False), self._norm(widths[n])]
            parts.append(nn.LeakyReLU(0.2, True))
        self.main = nn.Sequential(*parts, self._conv(widths[-1], 1, 1))
        if norm not in SPECTRAL:
            self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        require_min_size(x, self.least)
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

    Kernels of 3 x 4 x 4; time is halved, rounding up, by the layers between the first and the last two. The published
    3D ones (`NLayerDiscriminator3D` of PKU-YuanGroup/Open-Sora-Plan) have 3 x 3 x 3.
    """

    conv = Conv3d
    batch_norm = nn.BatchNorm3d
    kernel = (3, 4, 4)

    def _strides(self, layer: int) -> tuple[int, ...]:
        return (2 if layer else 1, 2, 2)


class MultiScale(nn.Module):
    """Copies of a discriminator, each on pixels of half the size of those before (not of half the frames); a list of
    their logits. `MultiscaleDiscriminator` of NVIDIA/pix2pixHD, arXiv 1711.11585, section 3.2; here 2 x 2 means."""

    def __init__(self, discriminators: list[PatchGAN]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)
        self.least = max(d.least * 2**scale for scale, d in enumerate(discriminators))

    def forward(self, x: Tensor) -> list[Tensor]:
        require_min_size(x, self.least)
        logits = []
        for number, discriminator in enumerate(self.discriminators):
            if number:
                x = F.avg_pool2d(x, 2) if x.ndim == 4 else F.avg_pool3d(x, (1, 2, 2))
            logits.append(discriminator(x))
        return logits


def require_min_size(x: Tensor, least: int) -> None:
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"the clip is {x.shape[-2]}x{x.shape[-1]}; this discriminator needs {least} pixels or more, with fewer "
            "adversary.layers or adversary.scales less"
        )


def _init(module: nn.Module) -> None:
    if isinstance(module, Conv2d | Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)

"""LPIPS (Zhang et al., arXiv 1801.03924; richzhang/PerceptualSimilarity), built from local files.

Equal to the lpips package on the same weights, without its downloads, its warnings and the unused classifier; and
with a gradient that is finite where all features of a pixel are zero. N images, [N, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vae3d.pretrained import files, weights

# Name of torchvision's trunk and the ends of the slices of its `features` whose outputs are compared.
TRUNKS = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth", (2, 5, 8, 10, 12)),
    "vgg": ("vgg16", "vgg16-397923af.pth", (4, 9, 16, 23, 30)),
}
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10


class LPIPSNet(nn.Module):
    """Frozen trunk and linear weights; empty (on the meta device) until `load`.

    net: alex or vgg. Raises ValueError for another name.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"net is {net!r}; use one of {', '.join(TRUNKS)}")
        with torch.device("cpu"):  # torchvision 0.21 computes while it is imported, which a meta device breaks
            import torchvision  # slow, and not needed by psnr or ssim

        builder, self.file, ends = TRUNKS[net]
        self.net = net
        with torch.device("meta"):
            features = getattr(torchvision.models, builder)(weights=None).features
        for layer in features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.slices = nn.ModuleList(features[a:b] for a, b in zip((0, *ends), ends, strict=False))
        widths = [[m for m in part if isinstance(m, nn.Conv2d)][-1].out_channels for part in self.slices]
        self.lins = nn.ParameterList(nn.Parameter(torch.empty(1, c, 1, 1, device="meta")) for c in widths)
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def load(self, path: str | Path | None = None) -> LPIPSNet:
        """Read the trunk, whole or slim, from `path` or where `weights.find` finds it; the linear weights from lpips.

        Raises WeightsMissing if it is not there or holds another network.
        """
        file = weights.find(self.file, path=path)
        trunk, name = files.read(file), f"the {self.net} trunk of LPIPS"
        for part in self.slices:  # a slice keeps the layers' names in `features`
            keys = part.state_dict().keys()
            if missing := [key for key in keys if f"features.{key}" not in trunk]:
                raise weights.WeightsMissing(f"{file} is not {name}: it lacks features.{missing[0]}")
            files.assign(part, {key: trunk[f"features.{key}"] for key in keys}, file, name)
        lin_file = _package_folder("lpips") / "weights" / "v0.1" / f"{self.net}.pth"
        lins = files.read(lin_file)
        files.assign(self.lins, {str(i): lins[f"lin{i}.model.1.weight"] for i in range(len(self.lins))}, lin_file)
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.shift) / self.scale
        outputs = []
        for part in self.slices:
            x = part(x)
            outputs.append(x)
        return outputs

    def unit_features(self, x: Tensor) -> list[Tensor]:
        """Features of every layer, [N, C, h, w], of length 1 over the channels."""
        return [_unit(f) for f in self.features(x)]

    def layer_maps(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        """Distance of two images' `unit_features` at every place of every layer, [N, 1, h, w] each."""
        layers = zip(x, y, self.lins, strict=True)
        return [nn.functional.conv2d((a - b) ** 2, lin) for a, b, lin in layers]

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Distance of every image pair, [N, 1, 1, 1].

        weight: how much each pixel counts, broadcastable to [N, 1, H, W], of mean 1. Every layer's map is weighted by
        its mean over the area of a place in the map (the nearest whole pixels, where sizes do not divide), which is
        nearly what the map that is upsampled to H x W has for a mean under these weights.
        """
        maps = self.layer_maps(self.unit_features(x), self.unit_features(y))
        if weight is not None:
            maps = [m * _at_size(weight, m.shape[-2:]) for m in maps]
        return sum(m.mean((2, 3), keepdim=True) for m in maps)


def _at_size(weight: Tensor, size: Sequence[int]) -> Tensor:
    """[N, 1, H, W] weights, of which H or W may be 1, averaged to `size`; the mean of each image stays as it is."""
    small = nn.functional.adaptive_avg_pool2d(weight, [min(a, b) for a, b in zip(weight.shape[-2:], size, strict=True)])
    before, after = (w.mean((2, 3), keepdim=True) for w in (weight, small))
    return small * (before / torch.where(after > 0, after, 1.0))


def _unit(features: Tensor) -> Tensor:
    """features / (norm over channels + eps), as published; the gradient of the norm at zero is taken as zero."""
    square = features.square().sum(1, keepdim=True)
    norm = square.masked_fill(square == 0, torch.inf).sqrt()  # 0 / inf is 0 and has the gradient 0
    return features / (norm + EPS)


def _package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the {name} package, which holds LPIPS's linear weights, is not installed")
    return Path(spec.origin).parent

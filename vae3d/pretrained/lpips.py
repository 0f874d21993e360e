"""LPIPS (Zhang et al., arXiv 1801.03924; richzhang/PerceptualSimilarity), built from local files.

Equal to the lpips package on the same weights, without its downloads, warnings and unused classifier, and with a finite
gradient where all features of a pixel are zero. Images are [N, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vae3d.pretrained import weights

# torchvision's trunk, its file, and the ends of the slices of its `features` whose outputs are compared.
TRUNKS = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth", (2, 5, 8, 10, 12)),
    "vgg": ("vgg16", "vgg16-397923af.pth", (4, 9, 16, 23, 30)),
}
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10


class LPIPSNet(nn.Module):
    """Frozen trunk and linear weights, on the meta device until `load`.

    net: alex or vgg. Raises ValueError for another name.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"net is {net!r}; use one of {', '.join(TRUNKS)}")
        with torch.device("cpu"):  # importing torchvision 0.21 fails under the meta device
            import torchvision  # slow, and psnr and ssim do without it

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
        """Load the trunk, whole or slim, from `path` or weights.find, and the linear weights from the lpips package.

        Raises WeightsMissing if the file is missing or of another network.
        """
        file = weights.find(self.file, path=path)
        trunk = weights.read(file)
        name = f"the {self.net} trunk of LPIPS"
        for part in self.slices:  # a slice keeps the names that its layers have in `features`
            keys = part.state_dict().keys()
            if missing := [key for key in keys if f"features.{key}" not in trunk]:
                raise weights.WeightsMissing(f"{file} is not {name}: it lacks features.{missing[0]}")
            weights.assign(part, {key: trunk[f"features.{key}"] for key in keys}, file, name)
        lin_file = _package_folder("lpips") / "weights" / "v0.1" / f"{self.net}.pth"
        lins = weights.read(lin_file)
        weights.assign(self.lins, {str(i): lins[f"lin{i}.model.1.weight"] for i in range(len(self.lins))}, lin_file)
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.shift) / self.scale
        outputs = []
        for part in self.slices:
            x = part(x)
            outputs.append(x)
        return outputs

    def unit_features(self, x: Tensor) -> list[Tensor]:
        """Features of every layer, [N, C, h, w], normalised over channels."""
        return [_unit(f) for f in self.features(x)]

    def layer_maps(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        """Distance of two images' `unit_features` per layer, [N, 1, h, w] each."""
        layers = zip(x, y, self.lins, strict=True)
        return [nn.functional.conv2d((a - b) ** 2, lin) for a, b, lin in layers]

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Distance of every image pair, [N, 1, 1, 1].

        weight: of each pixel, broadcastable to [N, 1, H, W], of mean 1. Each layer's map is weighted by the average of
        `weight` over the pixels of each of its elements, which is close to weighting the map upsampled to H x W.
        """
        maps = self.layer_maps(self.unit_features(x), self.unit_features(y))
        if weight is not None:
            maps = [m * weight_at_size(weight, m.shape[-2:]) for m in maps]
        return sum(m.mean((2, 3), keepdim=True) for m in maps)


def weight_at_size(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Average weights [N, 1, H, W], where H or W may be 1, to `size`, and keep each image's mean."""
    small = nn.functional.adaptive_avg_pool2d(weight, [min(a, b) for a, b in zip(weight.shape[-2:], size, strict=True)])
    before, after = (w.mean((2, 3), keepdim=True) for w in (weight, small))
    return small * (before / torch.where(after > 0, after, 1.0))


def _unit(features: Tensor) -> Tensor:
    """features / (norm over channels + eps), as published, but with a zero gradient where the norm is zero."""
    square = features.square().sum(1, keepdim=True)
    norm = square.masked_fill(square == 0, torch.inf).sqrt()  # 0 / inf is 0, with gradient 0
    return features / (norm + EPS)


def _package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the {name} package, which holds LPIPS's linear weights, is not installed")
    return Path(spec.origin).parent

"""Pool features of the FID's Inception-v3 (Heusel et al., arXiv 1706.08500): TensorFlow's graph of 2015-12-05.

Equal to torch-fidelity's `feature_extractor_inceptionv3.py` on the same weights. Unlike in torchvision's Inception-v3,
average pooling excludes the padding, the last block uses max pooling, and the input is resized as in TensorFlow 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae3d.precision import autocast_off
from vae3d.pretrained import weights

FILE = "weights-inception-2015-12-05-6726825d.pth"
SIDE = 299

# Branches of a block by name: their layers as (channels, kernel), or (channels, kernel, kernel) where two convolutions
# read the same map and their outputs are concatenated. The pooled branch may have no layer.
Branches = Mapping[str, Sequence[tuple]]
ROW, COLUMN = (1, 7), (7, 1)
FORK = (384, (1, 3), (3, 1))


def _block_a(pooled: int) -> Branches:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pooled, 1)],
    }


def _block_c(inner: int) -> Branches:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(inner, 1), (inner, ROW), (192, COLUMN)],
        "branch7x7dbl": [(inner, 1), (inner, COLUMN), (inner, ROW), (inner, COLUMN), (192, ROW)],
        "branch_pool": [(192, 1)],
    }


BLOCK_B = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []}
BLOCK_D = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3)],
    "branch_pool": [],
}
BLOCK_E = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), FORK],
    "branch3x3dbl": [(448, 1), (384, 3), FORK],
    "branch_pool": [(192, 1)],
}
# Name, input channels, branches, pooling.
BLOCKS = (
    ("Mixed_5b", 192, _block_a(32), "average"),
    ("Mixed_5c", 256, _block_a(64), "average"),
    ("Mixed_5d", 288, _block_a(64), "average"),
    ("Mixed_6a", 288, BLOCK_B, "halve"),
    ("Mixed_6b", 768, _block_c(128), "average"),
    ("Mixed_6c", 768, _block_c(160), "average"),
    ("Mixed_6d", 768, _block_c(160), "average"),
    ("Mixed_6e", 768, _block_c(192), "average"),
    ("Mixed_7a", 768, BLOCK_D, "halve"),
    ("Mixed_7b", 1280, BLOCK_E, "average"),
    ("Mixed_7c", 2048, BLOCK_E, "maximum"),
)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, width: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: str = "same"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side. With the pooling `halve` the last layer of each has stride 2 and no padding."""

    def __init__(self, width: int, branches: Branches, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.branches: dict[str, list[list[str]]] = {}  # names of the convolutions, by branch and layer
        for branch, layers in branches.items():
            inputs, self.branches[branch] = width, []
            for i, (channels, *kernels) in enumerate(layers, 1):
                stem = branch if len(layers) == 1 else f"{branch}_{i}"
                names = [stem] if len(kernels) == 1 else [stem + letter for letter in "ab"]
                halves = pooling == "halve" and i == len(layers)
                for name, kernel in zip(names, kernels, strict=True):
                    conv = Conv(inputs, channels, kernel, 2, "valid") if halves else Conv(inputs, channels, kernel)
                    self.add_module(name, conv)
                self.branches[branch].append(names)
                inputs = channels * len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, layers in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for names in layers:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)

    def pool(self, x: Tensor) -> Tensor:
        if self.pooling == "average":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pooling == "halve" else F.max_pool2d(x, 3, 1, 1)


class InceptionV3(nn.Module):
    """Frozen network up to its last pooling, without the classifier, on the meta device until `load`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, "valid")
            self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, "valid")
            self.Conv2d_2b_3x3 = Conv(32, 64, 3)
            self.Conv2d_3b_1x1 = Conv(64, 80, 1)
            self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, "valid")
            for name, width, branches, pooling in BLOCKS:
                self.add_module(name, Mixed(width, branches, pooling))
        self.eval().requires_grad_(False)

    def load(self, path: str | Path | None = None) -> InceptionV3:
        """Load torch-fidelity's and pytorch-fid's file from `path` or weights.find.

        Raises WeightsMissing if it is missing or of another network.
        """
        file = weights.find(FILE, path=path)
        weights.assign(self, weights.read(file), file)
        return self

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Features [N, 2048] in fp32 of frames [N, 3, H, W] in [0, 1], rounded to 8 bits first."""
        with autocast_off(frames.device):
            x = frames.float().mul(255).round().clamp(0, 255)
            x = (resize_tf1(x, SIDE) - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, 2)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, 2)
            for name, *_ in BLOCKS:
                x = self.get_submodule(name)(x)
            return x.mean((2, 3))


def resize_tf1(x: Tensor, side: int) -> Tensor:
    """Bilinear resize of float [..., H, W] to [..., side, side] as TensorFlow 1's `resize_bilinear`.

    Output i samples the input at i * H / side: no half-pixel centres, no antialiasing, border replicated.
    """
    for dim in (-1, -2):
        size = x.shape[dim]
        position = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)
        low = position.long()
        weight = position - low if dim == -1 else (position - low)[:, None]
        first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
        x = first + (second - first) * weight  # torch.lerp rounds differently
    return x

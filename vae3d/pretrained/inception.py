"""Pool features of the FID's Inception-v3 (Heusel et al., arXiv 1706.08500): TensorFlow's graph of 2015-12-05.

Equal to torch-fidelity's `feature_extractor_inceptionv3.py` on the same weights. Unlike in torchvision's Inception-v3,
average pooling excludes the padding, the last block uses max pooling, and the input is resized as in TensorFlow 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vae3d.precision import autocast_off
from vae3d.pretrained import weights

FILE = "weights-inception-2015-12-05-6726825d.pth"
SIDE = 299


class TensorFlowPooling(TorchFunctionMode):
    """Within it torchvision's blocks pool as TensorFlow's: over the pixels inside the frame, or by the maximum."""

    def __init__(self, kind: str = "average") -> None:
        super().__init__()
        self.pool = F.max_pool2d if kind == "max" else partial(F.avg_pool2d, count_include_pad=False)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (self.pool if function is F.avg_pool2d else function)(*args, **(kwargs or {}))


class InceptionV3(nn.Module):
    """Frozen network up to its last pooling, without the classifier, on the meta device until `load`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("cpu"):  # importing torchvision 0.21 fails under the meta device
            from torchvision.models import Inception3  # slow, and psnr and ssim do without it

        with torch.device("meta"):
            self.network = Inception3(aux_logits=False, init_weights=False)
        del self.network.fc
        self.eval().requires_grad_(False)

    def load(self, path: str | Path | None = None) -> InceptionV3:
        """Load torch-fidelity's and pytorch-fid's file from `path` or weights.find.

        Raises WeightsMissing if it is missing or of another network.
        """
        file = weights.find(FILE, path=path)
        weights.assign(self.network, weights.read(file), file, "InceptionV3")
        return self

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Features [N, 2048] in fp32 of frames [N, 3, H, W] in [0, 1], rounded to 8 bits first."""
        with autocast_off(frames.device):
            x = frames.float().mul(255).round().clamp(0, 255)
            x = (resize_tf1(x, SIDE) - 128) / 128
            for name, layer in self.network.named_children():
                with TensorFlowPooling("max" if name == "Mixed_7c" else "average"):
                    x = layer(x)
            return x.flatten(1)


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

"""RAFT (Teed and Deng, ECCV 2020, arXiv 2003.12039): optical flow under a free licence.

torchvision's network and weights (BSD-3-Clause). raft_small computes as much as PWC-Net, raft_large four times as much.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae3d.precision import autocast_off
from vae3d.pretrained import weights

FILES = {
    "raft_large": "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    "raft_small": "raft_small_C_T_V2-01064c6d.pth",
}
MULTIPLE = 8
MIN_SIZE = 128  # for smaller frames the coarsest level of the correlation pyramid is a single pixel


class Raft(nn.Module):
    """Frozen network, on the meta device until `load`.

    net: raft_large or raft_small. Raises ValueError for another name.
    """

    def __init__(self, net: str = "raft_large") -> None:
        super().__init__()
        if net not in FILES:
            raise ValueError(f"net is {net!r}; use one of {', '.join(FILES)}")
        from torchvision.models import optical_flow  # slow to import

        self.net, self.file = net, FILES[net]
        with torch.device("meta"):
            self.network = getattr(optical_flow, net)(weights=None)
        self.eval().requires_grad_(False)

    def load(self, path: str | Path | None = None) -> Raft:
        """Load the weights from `path` or weights.find. Raises WeightsMissing if missing or of another network."""
        file = weights.find(self.file, path=path)
        weights.assign(self.network, weights.read(file), file)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Flow from each frame of [T, 3, H, W] in [0, 1] to the next, [T-1, 2, H, W] in pixels."""
        return self.flow(frames[:-1], frames[1:])

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from `first` to `second`, frames [N, 3, H, W] in [0, 1]; [N, 2, H, W] in pixels, (x, y)."""
        height, width = first.shape[-2:]
        top, left = _missing(height), _missing(width)
        pad = (left // 2, left - left // 2, top // 2, top - top // 2)
        with autocast_off(first.device):
            first, second = (F.pad(x.float() * 2 - 1, pad, mode="replicate") for x in (first, second))
            flow = self.network(first, second)[-1]
        return flow[..., pad[2] : pad[2] + height, pad[0] : pad[0] + width]


def _missing(side: int) -> int:
    return max(MIN_SIZE, -(-side // MULTIPLE) * MULTIPLE) - side

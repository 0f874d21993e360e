"""Depth maps as videos: 16-bit images to [-1, 1] and back to metres.

Follows Marigold (Ke et al., CVPR 2024, arXiv 2312.02145): depth is repeated over three channels, so that a colour VAE
can encode it, and decoded as the mean of the three channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vae3d.data.decoding.images import SequenceReader, load_grey
from vae3d.data.media import Size

PERCENTILES = (2, 98)
MIN_FAR_NEAR_RATIO = 1.01  # of a clip, so that a flat wall is not stretched to the full range
MAPPINGS = {"log": (torch.log, torch.exp), "inverse": (torch.reciprocal, torch.reciprocal)}  # function, inverse


@dataclass(frozen=True)
class DepthSettings:
    """How to map depth to pixels. Fields as in config.schema.Depth.

    Pixels are linear in log(metres) or 1 / metres: -1 at the near bound, 1 at the far bound, clipped beyond.
    """

    mapping: str
    bounds: str = "fixed"
    near: float = 0.1
    far: float = 20.0
    unit: float = 1000.0


class DepthReader(SequenceReader):
    """16-bit depth maps as stored: [T, H, W] uint16, 0 where nothing was measured.

    Resized by nearest neighbour: a mean of valid and invalid pixels, or across an edge, is a depth that does not exist.
    """

    def frame(self, file: str | Path, size: Size | None) -> np.ndarray:
        stored = load_grey(file)
        self.check_same_size(file, *stored.shape)
        return stored if size is None else nearest(stored, size)


def nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """Nearest-neighbour resize of [H, W]."""
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, image.shape, strict=True)
    )
    return image[rows][:, columns]


def encode_depth(stored: np.ndarray, settings: DepthSettings, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, W] as stored -> video [channels, T, H, W] of equal channels, float32 in [-1, 1], 0 where
    invalid; valid [1, T, H, W] bool; bounds [2], metres of -1 and 1. Raises ValueError if no pixel is valid.
    """
    valid = torch.from_numpy(stored != 0)[None]
    if not valid.any():
        raise ValueError("holds no depth: every pixel is 0, which means not measured")
    metres = torch.from_numpy(stored.astype(np.float32))[None] / settings.unit
    near, far = settings.near, settings.far
    if settings.bounds == "percentiles":
        near, far = np.percentile(stored[stored != 0], PERCENTILES) / settings.unit
        far = max(far, near * MIN_FAR_NEAR_RATIO)
    bounds = torch.tensor([near, far], dtype=torch.float32)
    video = torch.where(valid, from_metres(metres, bounds, settings.mapping), 0.0)
    return video.expand(channels, -1, -1, -1).contiguous(), valid, bounds


def from_metres(metres: Tensor, bounds: Tensor, mapping: str) -> Tensor:
    """[..., 1, T, H, W] in metres -> [-1, 1], clipped to the bounds [..., 2]."""
    forward, _ = MAPPINGS[mapping]
    near, far = _broadcastable(bounds)
    low, high = forward(near), forward(far)
    inside = torch.minimum(torch.maximum(metres, near), far)
    return 2.0 * (forward(inside) - low) / (high - low) - 1.0


def to_metres(depth: Tensor, bounds: Tensor, mapping: str) -> Tensor:
    """Inverse of from_metres: [..., 1, T, H, W], clipped to [-1, 1], -> metres.

    bounds: [..., 2], as in ClipBatch.depth_bounds. Apply depth_of to a video of three channels first.
    """
    forward, back = MAPPINGS[mapping]
    low, high = (forward(bound) for bound in _broadcastable(bounds))
    return back(low + (depth.clamp(-1.0, 1.0) + 1.0) / 2.0 * (high - low))


def depth_of(video: Tensor) -> Tensor:
    """[..., C, T, H, W] -> [..., 1, T, H, W], the mean of the channels."""
    return video.mean(dim=-4, keepdim=True)


def _broadcastable(bounds: Tensor) -> tuple[Tensor, Tensor]:
    return bounds[..., 0, None, None, None, None], bounds[..., 1, None, None, None, None]

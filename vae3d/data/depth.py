"""Depth maps as videos: 16-bit images to [-1, 1] and back to metres.

Follows the depth training of Marigold (Ke et al., CVPR 2024): one channel repeated three times, so that a colour VAE
takes it, and the mean of the three that come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vae3d.data.images import SequenceReader, load_grey
from vae3d.data.media import Size

PERCENTILES = (2, 98)
LEAST_RATIO = 1.01  # of far to near in a clip: a bare wall must not be stretched to the full range
MAPPINGS = {"log": (torch.log, torch.exp), "inverse": (torch.reciprocal, torch.reciprocal)}  # and its inverse


@dataclass(frozen=True)
class DepthSettings:
    """How depth becomes pixels.

    mapping: log, or inverse (1 / metres, which gives near things more of the range); both are linear in it from
    -1 at the near bound to 1 at the far one, and clip what lies outside. bounds: fixed (`near` and `far`, in metres),
    or percentiles (the 2nd and 98th of the clip's valid pixels). unit: stored value of one metre.
    """

    mapping: str
    bounds: str = "fixed"
    near: float = 0.1
    far: float = 20.0
    unit: float = 1000.0


class DepthReader(SequenceReader):
    """Depth maps of 16 bits, as stored: [T, H, W] uint16, 0 where nothing was measured.

    Resized to the nearest pixel: a mean of a valid and an invalid pixel, or of the two sides of an edge, is a depth
    that is nowhere in the room.
    """

    def frame(self, file: Path, size: Size | None) -> np.ndarray:
        stored = load_grey(file)
        self.check_same_size(file, *stored.shape)
        return stored if size is None else nearest(stored, size)


def nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """[H, W] -> size, of each new pixel the old one at its centre."""
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, image.shape, strict=True)
    )
    return image[rows][:, columns]


def encode_depth(stored: np.ndarray, settings: DepthSettings) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, W] as stored -> video [3, T, H, W] float32 in [-1, 1] of equal channels, 0 where invalid;
    valid [1, T, H, W] bool; the bounds [2] in metres that -1 and 1 stand for.

    Raises ValueError if no pixel is valid.
    """
    valid = torch.from_numpy(stored != 0)[None]
    if not valid.any():
        raise ValueError("holds no depth: every pixel is 0, which marks what was not measured")
    metres = torch.from_numpy(stored.astype(np.float32))[None] / settings.unit
    near, far = settings.near, settings.far
    if settings.bounds == "percentiles":
        near, far = np.percentile(stored[stored != 0], PERCENTILES) / settings.unit
        far = max(far, near * LEAST_RATIO)
    bounds = torch.tensor([near, far], dtype=torch.float32)
    video = torch.where(valid, from_metres(metres, bounds, settings.mapping), 0.0)
    return video.expand(3, -1, -1, -1).contiguous(), valid, bounds


def from_metres(metres: Tensor, bounds: Tensor, mapping: str) -> Tensor:
    """[..., 1, T, H, W] in metres -> [-1, 1]; what lies outside the bounds [..., 2] is clipped."""
    forward, _ = MAPPINGS[mapping]
    near, far = _spread(bounds)
    low, high = forward(near), forward(far)
    inside = torch.minimum(torch.maximum(metres, near), far)
    return 2.0 * (forward(inside) - low) / (high - low) - 1.0


def to_metres(depth: Tensor, bounds: Tensor, mapping: str) -> Tensor:
    """The inverse of from_metres: [..., 1, T, H, W] in [-1, 1] (clipped here) -> metres.

    bounds: [..., 2], as Clip.depth_bounds has them. A video of three channels goes through depth_of before.
    """
    forward, back = MAPPINGS[mapping]
    low, high = (forward(bound) for bound in _spread(bounds))
    return back(low + (depth.clamp(-1.0, 1.0) + 1.0) / 2.0 * (high - low))


def depth_of(video: Tensor) -> Tensor:
    """[..., 3, T, H, W] -> [..., 1, T, H, W], the mean of the channels."""
    return video.mean(dim=-4, keepdim=True)


def _spread(bounds: Tensor) -> tuple[Tensor, Tensor]:
    return bounds[..., 0, None, None, None, None], bounds[..., 1, None, None, None, None]

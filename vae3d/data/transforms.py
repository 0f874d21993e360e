"""Geometry of a clip: cover the target size, then crop. Pure arithmetic; readers do the resizing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Crop:
    """Resize to `size` (height, width), then cut `height` x `width` at (top, left)."""

    size: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """[T, H, W, 3] -> [T, height, width, 3]."""
        return frames[:, self.top : self.top + self.height, self.left : self.left + self.width]


def cover(height: int, width: int, target: tuple[int, int], rng: np.random.Generator | None = None) -> Crop:
    """Scale height x width to the smallest size that covers `target`, keeping its aspect, and crop.

    rng: draws the crop's place; None takes the centre.
    """
    scale = max(target[0] / height, target[1] / width)
    size = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
    free = (size[0] - target[0], size[1] - target[1])
    top, left = (f // 2 for f in free) if rng is None else (int(rng.integers(f + 1)) for f in free)
    return Crop(size, top, left, *target)

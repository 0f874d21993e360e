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


def cover(
    height: int,
    width: int,
    target: tuple[int, int],
    short_side: int | None = None,
    rng: np.random.Generator | None = None,
) -> Crop:
    """Scale height x width, keeping its aspect, so that its short side is `short_side` (None: just so that it covers
    `target`), and crop `target`.

    rng: draws the crop's place; None takes the centre.
    """
    scale = max(target[0] / height, target[1] / width, (short_side or 0) / min(height, width))
    size = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
    free = (size[0] - target[0], size[1] - target[1])
    top, left = (f // 2 for f in free) if rng is None else (int(rng.integers(f + 1)) for f in free)
    return Crop(size, top, left, *target)

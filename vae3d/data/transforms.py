"""Resizing and cropping as arithmetic: readers resize, because a JPEG or a video decodes faster at a smaller size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ResizeCrop:
    """Resize to `size` (height, width), then crop `height` x `width` at (top, left)."""

    size: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    def crop(self, frames: np.ndarray) -> np.ndarray:
        """[T, H, W, 3] of `size` -> [T, height, width, 3]."""
        return frames[:, self.top : self.top + self.height, self.left : self.left + self.width]


def resize_crop_params(
    height: int,
    width: int,
    target: tuple[int, int],
    short_side: int | None = None,
    rng: np.random.Generator | None = None,
) -> ResizeCrop:
    """How to crop `target` from a height x width frame, scaled with its aspect ratio.

    short_side: of the scaled frame; None: as small as covers `target`. rng: for a random crop; None takes the centre.
    """
    scale = max(target[0] / height, target[1] / width, (short_side or 0) / min(height, width))
    size = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
    free = (size[0] - target[0], size[1] - target[1])
    top, left = (f // 2 for f in free) if rng is None else (int(rng.integers(f + 1)) for f in free)
    return ResizeCrop(size, top, left, *target)

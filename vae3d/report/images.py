"""Pictures side by side, and pictures that fit into a page."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

GAP = 2  # pixels between pictures of a grid


def grid(frames: np.ndarray, columns: int | None = None, even: bool = True) -> np.ndarray:
    """[N, T, H, W, 3] uint8 -> [T, H', W', 3], row by row, by default in about as many rows as columns.

    even: make both sides even, as most video players need them.
    """
    count, length, height, width, _ = frames.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    total_height, total_width = rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    if even:
        total_height, total_width = total_height + total_height % 2, total_width + total_width % 2
    picture = np.zeros((length, total_height, total_width, 3), np.uint8)
    for index, sample in enumerate(frames):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        picture[:, top : top + height, left : left + width] = sample
    return picture


def resize_to_width(image: Image.Image, width: int) -> Image.Image:
    """Keep the aspect ratio; pixels of an enlarged image stay sharp."""
    resampling = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
    return image.resize((width, max(1, round(image.height * width / image.width))), resampling)

"""Which frames of a file make a clip."""

from __future__ import annotations

import math

import numpy as np

SAMPLINGS = ("contiguous", "requirement", "strided")


def frame_numbers(
    sampling: str, count: int, frames: int, step: float, start: float, rng: np.random.Generator | None
) -> list[int]:
    """Ascending numbers of `frames` of the `count` frames of a file.

    contiguous: one behind the other, `step` apart. The others choose among the frames 0, step, 2 step, ... of the file:
    requirement: the first, the last and a random draw without replacement between them (rng None: evenly spaced);
    strided: every s-th, with the largest s for which there are enough.
    start: in [0, 1), which of the possible places the clip begins at, and which single frame is a clip of one.
    The file must have floor((frames - 1) step) + 1 frames.
    """
    if sampling == "contiguous" or frames == 1:
        span = int((frames - 1) * step) + 1
        first = int(start * (count - span + 1))
        return [first + int(i * step) for i in range(frames)]
    last = math.ceil(count / step) - 1  # of the frames 0, step, 2 step, ...
    if sampling == "strided":
        stride = last // (frames - 1)
        first = int(start * (last - (frames - 1) * stride + 1))
        chosen = [first + i * stride for i in range(frames)]
    elif rng is None:
        chosen = [i * last // (frames - 1) for i in range(frames)]
    else:
        chosen = [0, *sorted(1 + rng.choice(last - 1, frames - 2, replace=False)), last] if frames > 2 else [0, last]
    return [int(i * step) for i in chosen]

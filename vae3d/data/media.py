"""What every reader of pixels has in common: facts of a file, the interface, the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vae3d.errors import UserError

Size = tuple[int, int]  # height, width
ASPECT_TOLERANCE = 0.01  # pixels that are this near to square count as square


class DataError(UserError):
    """A data set that cannot be used as it is; the message says what to change."""


class MediaError(UserError):
    """A file that cannot be read; the message names it and the reason."""

    on_every_rank = False

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def reason_for(self, path: str) -> str:
        """Why `path` cannot be read: the reason, with the name of the file if it is one of a sequence."""
        return self.reason if self.path == path else f"{Path(self.path).name} {self.reason}"

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:  # survives the trip out of a worker process
        return MediaError, (self.path, self.reason)


@dataclass(frozen=True)
class MediaInfo:
    """frames, upright height and width in pixels, frames per second (0 for an image), how it is stored.

    bits: per channel, as stored; frames are always read as 8 bits. aspect: width of a stored pixel over its height,
    upright.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    codec: str
    pixels: str
    bits: int = 8
    aspect: float = 1.0

    def size_to_scale(self, target: Size) -> Size:
        """Height and width from which to scale to `target`, so that a circle stays one: those with square pixels, but
        if the file is wanted at its own size those that it has."""
        if target == (self.height, self.width) or abs(self.aspect - 1) <= ASPECT_TOLERANCE:
            return self.height, self.width
        if self.aspect > 1:
            return self.height, round(self.width * self.aspect)
        return round(self.height / self.aspect), self.width


class Reader(Protocol):
    info: MediaInfo

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed), resized to `size` with an antialiased filter."""

    def close(self) -> None: ...


def check_indices(path: Path, indices: Sequence[int], num_frames: int) -> None:
    if len(indices) and not 0 <= min(indices) <= max(indices) < num_frames:
        raise MediaError(path, f"has {num_frames} frames; asked for {min(indices)} to {max(indices)}")

"""What all readers share: the interface, metadata of a file, errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vae3d.errors import UserError
from vae3d.text import plural

Size = tuple[int, int]  # height, width
ASPECT_TOLERANCE = 0.01  # a pixel aspect ratio this close to 1 counts as square
NO_SUCH_FILE = "no such file"  # reason of an error
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class DataError(UserError):
    """A data set cannot be used as it is; the message says what to change."""


class MediaError(UserError):
    """A file cannot be read; the message has its path and the reason."""

    on_every_rank = False

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def reason_for(self, path: str) -> str:
        """The reason why `path` cannot be read; starts with the file's name if that is one of a sequence."""
        return self.reason if self.path == path else f"{Path(self.path).name} {self.reason}"

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:  # to unpickle what a worker process sends
        return MediaError, (self.path, self.reason)


def stat_reason(path: str | Path, error: OSError | ValueError) -> str:
    """Why os.stat failed: there is no such file, or it must not be looked at."""
    if isinstance(error, OSError) and error.errno not in ABSENT:
        return f"cannot be read: {error.strerror}"
    from_windows = os.sep == "/" and "\\" in str(path)
    return NO_SUCH_FILE + ("; write / instead of \\ in paths" if from_windows else "")


@dataclass(frozen=True)
class MediaInfo:
    """Metadata of a file.

    height, width: pixels, upright. fps: 0 for an image. codec, pixels: codec and pixel format. bits: per channel, as
    stored; readers return 8 bits. aspect: width / height of a pixel, upright. lossy: whether the codec of an image
    changes its pixels; of videos, codec and pixel format say what is known.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    codec: str
    pixels: str
    bits: int = 8
    aspect: float = 1.0
    lossy: bool = False

    @property
    def square_size(self) -> Size:
        """Height and width with square pixels: one side is that of the file, the other larger."""
        if abs(self.aspect - 1) <= ASPECT_TOLERANCE:
            return self.height, self.width
        if self.aspect > 1:
            return self.height, round(self.width * self.aspect)
        return round(self.height / self.aspect), self.width

    def size_to_scale(self, target: Size) -> Size:
        """Height and width to scale from, so that circles stay circles: the size with square pixels, or the stored size
        if that is the target."""
        return target if target == (self.height, self.width) else self.square_size


class StreamItem(NamedTuple):
    """An image or a video. path: of a file, or a name for messages; content: its encoded bytes, None: `path` is a
    file. kind: "image" or "video". error: why it cannot be used; None: it can."""

    path: str
    content: bytes | None
    kind: str
    error: str | None = None


class Reader(Protocol):
    """info: of the file. alpha: whether frames have a fourth channel."""

    info: MediaInfo
    alpha: bool

    def read(self, indices: Sequence[int], size: Size | None = None) -> np.ndarray:
        """[len(indices), H, W, 3 or 4] uint8. indices: in any order, with repeats. size: resize to it, antialiased."""

    def close(self) -> None: ...


def check_indices(path: str | Path, indices: Sequence[int], num_frames: int) -> None:
    """Raise MediaError for an index that the file does not have."""
    if len(indices) and not 0 <= min(indices) <= max(indices) < num_frames:
        raise MediaError(
            path, f"has {plural(num_frames, 'frame')}; frames {min(indices)} to {max(indices)} were requested"
        )

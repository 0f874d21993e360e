"""Loading clips: decode the frames of a draw, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.data.depth import DepthReader, DepthSettings, encode_depth
from vae3d.data.images import resize_around
from vae3d.data.media import MediaError, Reader, Size
from vae3d.data.readers import open_media
from vae3d.data.sampler import Draw, Plan
from vae3d.data.sampling import frame_numbers
from vae3d.data.segments import WHOLE, Bounds, Segment, bounds_of
from vae3d.data.transforms import cover
from vae3d.seeding import seed_of
from vae3d.types import Clip

ATTEMPTS = 10
PANORAMA_TOLERANCE = 0.01  # of the ratio of width to twice the height


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is cut out of a file.

    stride: take every n-th frame. fps: thin faster videos out to this rate; slower ones keep theirs. A video whose
    rate varies is thinned by the number of its frames, as if it had its mean rate throughout.
    short_side: scale to this before cropping (None: so that the crop covers the short side).
    crop: center or random. flip: mirror every other clip. sampling: see data.sampling.
    min_side: leave out files whose shorter side has fewer pixels.
    panorama: files are equirectangular, and shown whole; others are refused. roll: turn each clip about the vertical
    by a random number of columns, which loses nothing. depth: read depth maps of 16 bits, not colours.
    """

    height: int
    width: int
    stride: int = 1
    fps: float | None = None
    short_side: int | None = None
    min_side: int | None = None
    crop: str = "center"
    flip: bool = False
    reader: str = "auto"
    sampling: str = "contiguous"
    panorama: bool = False
    roll: bool = False
    depth: DepthSettings | None = None

    def step(self, fps: np.ndarray | float) -> np.ndarray:
        """Distance of taken frames in frames of the file."""
        thin = 1.0 if self.fps is None else np.maximum(1.0, np.asarray(fps, dtype=float) / self.fps)
        return self.stride * np.asarray(thin)

    def length(self, num_frames: np.ndarray | float, fps: np.ndarray | float) -> np.ndarray:
        """Frames that a file can give: those i for which frame floor(i * step) exists."""
        return np.ceil(np.asarray(num_frames) / self.step(fps)).astype(int)


@dataclass
class Sample:
    """One loaded clip; video None if nothing could be loaded. errors: (path, reason) of files that failed."""

    video: Tensor | None  # [3, T, H, W], uint8; of depth maps float32 in [-1, 1]
    draw: Draw
    path: str
    errors: list[tuple[str, str]] = field(default_factory=list)
    valid: Tensor | None = None  # [1, T, H, W], bool
    depth_bounds: Tensor | None = None  # [2]


class ClipDataset(Dataset[Sample]):
    """Indexed by Draw. Every random choice is a pure function of (seed, position): no worker, rank or resume
    changes a clip.

    A file that fails to read is recorded and replaced by a seeded draw, never by a placeholder.
    """

    def __init__(self, table: pd.DataFrame, plan: Plan, settings: ClipSettings) -> None:
        self.paths = np.array([os.fsencode(path) for path in table["path"]])  # one buffer, shared by forked workers
        self.bounds = np.array(bounds_of(table)).reshape(-1, 2)
        self.plan = plan
        self.settings = settings

    def __getitem__(self, draw: Draw) -> Sample:
        errors: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS):
            path = os.fsdecode(self.paths[draw.record])
            try:
                return replace(self._load(path, draw), errors=errors)
            except MediaError as error:
                errors.append((error.path, error.reason))
            draw = draw._replace(record=self.plan.replacement(draw.position, draw.frames, attempt))
        return Sample(None, draw, path, errors)

    def _load(self, path: str, draw: Draw) -> Sample:
        rng = np.random.default_rng(seed_of(self.plan.seed, draw.position, "clip"))
        with closing(open_frames(path, self.settings, tuple(self.bounds[draw.record]))) as reader:
            start, mirror = rng.random(), rng.random() < 0.5
            frames = read_clip(reader, path, self.settings, draw.frames, start, rng)
        if mirror and self.settings.flip:
            frames = frames[:, :, ::-1]
        if self.settings.roll:
            frames = np.roll(frames, int(rng.integers(self.settings.width)), axis=2)
        return to_sample(frames, draw, path, self.settings)


def open_frames(path: str, settings: ClipSettings, bounds: Bounds = WHOLE) -> Reader:
    """A reader of what the settings want of a file or a part of it: colours, or depth maps as stored.

    Raises MediaError.
    """
    reader = open_media(path, settings.reader) if settings.depth is None else DepthReader(path)
    return Segment(reader, path, bounds)


def read_clip(
    reader: Reader,
    path: str,
    settings: ClipSettings,
    frames: int,
    start: float,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """[frames, height, width, 3] uint8, beginning at the fraction `start` in [0, 1) of the possible places; of depth
    maps [frames, height, width] uint16.

    rng: for what the settings leave to chance; None takes the centre crop and evenly spaced frames.
    Raises MediaError if the file has fewer frames than that, or is no panorama though the settings say so.
    """
    info = reader.info
    step = float(settings.step(info.fps))
    span = int((frames - 1) * step) + 1
    if info.num_frames < span:
        raise MediaError(path, f"has {info.num_frames} frames, fewer than the table says; {span} are needed")
    indices = frame_numbers(settings.sampling, info.num_frames, frames, step, start, rng)
    target = (settings.height, settings.width)
    if settings.panorama:
        return _read_panoramas(reader, path, indices, target, depth=settings.depth is not None)
    size = info.size_to_scale(target)
    crop = cover(*size, target, settings.short_side, rng if settings.crop == "random" else None)
    return crop.cut(reader.read(indices, crop.size))


def _read_panoramas(reader: Reader, path: str, indices: Sequence[int], size: Size, depth: bool) -> np.ndarray:
    """Whole frames at `size`. Readers treat both ends of a row as borders; here they are neighbours."""
    info = reader.info
    if abs(info.aspect * info.width / (2 * info.height) - 1) > PANORAMA_TOLERANCE:
        raise MediaError(
            path, f"is {info.height}x{info.width}: no equirectangular panorama, which is twice as wide as high"
        )
    if depth or size == (info.height, info.width):
        return reader.read(indices, size)
    return np.stack([resize_around(reader.read([index])[0], size) for index in indices])


def to_sample(frames: np.ndarray, draw: Draw, path: str, settings: ClipSettings) -> Sample:
    """What read_clip gave as tensors. Raises MediaError if it is depth without a single valid pixel."""
    if settings.depth is None:
        return Sample(to_tensor(frames), draw, path)
    try:
        video, valid, bounds = encode_depth(np.ascontiguousarray(frames), settings.depth)
    except ValueError as error:
        raise MediaError(path, str(error)) from error
    return Sample(video, draw, path, valid=valid, depth_bounds=bounds)


def to_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] array -> [3, T, H, W] tensor."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


@dataclass
class Unreadable:
    """Stands for a batch in which ATTEMPTS files in a row could not be read: its rank cannot take the step."""

    errors: list[tuple[str, str]]


def collate(samples: Sequence[Sample]) -> Clip | Unreadable:
    """Stack samples of equal frame count."""
    errors = [error for sample in samples for error in sample.errors]
    if any(sample.video is None for sample in samples):
        return Unreadable(errors)
    return Clip(
        positions=torch.tensor([sample.draw.position for sample in samples]),
        paths=[sample.path for sample in samples],
        errors=errors,
        **{name: _stack([getattr(sample, name) for sample in samples]) for name in ("video", "valid", "depth_bounds")},
    )


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)

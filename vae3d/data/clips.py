"""Loading clips: decode the frames of a draw, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.data.readers import MediaError, Reader, open_media
from vae3d.data.sampler import Draw, Plan
from vae3d.data.transforms import cover
from vae3d.seeding import seed_of
from vae3d.types import Clip

ATTEMPTS = 10


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is cut out of a file.

    stride: take every n-th frame. fps: thin faster videos out to this rate; slower ones keep theirs.
    short_side: scale to this before cropping (None: so that the crop covers the short side).
    crop: center or random. flip: mirror every other clip.
    """

    height: int
    width: int
    stride: int = 1
    fps: float | None = None
    short_side: int | None = None
    crop: str = "center"
    flip: bool = False
    reader: str = "auto"

    def step(self, fps: np.ndarray | float) -> np.ndarray:
        """Distance of taken frames in frames of the file."""
        thin = 1.0 if self.fps is None else np.maximum(1.0, np.asarray(fps, dtype=float) / self.fps)
        return self.stride * np.asarray(thin)

    def length(self, num_frames: np.ndarray | float, fps: np.ndarray | float) -> np.ndarray:
        """Frames that a file can give: those i for which frame floor(i * step) exists."""
        return np.ceil(np.asarray(num_frames) / self.step(fps)).astype(int)


@dataclass
class Sample:
    """One loaded clip; video None if nothing could be loaded. faults: (path, reason) of files that failed."""

    video: Tensor | None  # [3, T, H, W], uint8
    draw: Draw
    path: str
    faults: list[tuple[str, str]] = field(default_factory=list)


class ClipDataset(Dataset[Sample]):
    """Indexed by Draw. Every random choice is a pure function of (seed, position): no worker, rank or resume
    changes a clip.

    A file that fails to read is recorded and replaced by a seeded draw, never by a placeholder.
    """

    def __init__(self, table: pd.DataFrame, plan: Plan, settings: ClipSettings) -> None:
        self.paths = np.array([os.fsencode(path) for path in table["path"]])  # one buffer, shared by forked workers
        self.plan = plan
        self.settings = settings

    def __getitem__(self, draw: Draw) -> Sample:
        faults: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS):
            path = os.fsdecode(self.paths[draw.record])
            try:
                return Sample(self._load(path, draw), draw, path, faults)
            except MediaError as error:
                faults.append((error.path, error.reason))
            draw = draw._replace(record=self.plan.replacement(draw.position, draw.frames, attempt))
        return Sample(None, draw, path, faults)

    def _load(self, path: str, draw: Draw) -> Tensor:
        rng = np.random.default_rng(seed_of(self.plan.seed, draw.position, "clip"))
        reader = open_media(path, self.settings.reader)
        try:
            start, mirror = rng.random(), rng.random() < 0.5
            crop_rng = rng if self.settings.crop == "random" else None
            frames = read_clip(reader, path, self.settings, draw.frames, start, crop_rng)
        finally:
            reader.close()
        if mirror and self.settings.flip:
            frames = frames[:, :, ::-1]
        return to_tensor(frames)


def read_clip(
    reader: Reader,
    path: str,
    settings: ClipSettings,
    frames: int,
    start: float,
    crop_rng: np.random.Generator | None = None,
) -> np.ndarray:
    """[frames, height, width, 3] uint8, beginning at the fraction `start` in [0, 1) of the possible places.

    Raises MediaError if the file has fewer frames than that.
    """
    info = reader.info
    step = float(settings.step(info.fps))
    span = int((frames - 1) * step) + 1
    if info.num_frames < span:
        raise MediaError(path, f"has {info.num_frames} frames, fewer than the table says; {span} are needed")
    first = int(start * (info.num_frames - span + 1))
    indices = [first + int(i * step) for i in range(frames)]
    target = (settings.height, settings.width)
    crop = cover(info.height, info.width, target, settings.short_side, crop_rng)
    return crop.cut(reader.read(indices, crop.size))


def to_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] array -> [3, T, H, W] tensor."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


@dataclass
class Unreadable:
    """Stands for a batch in which ATTEMPTS files in a row could not be read; the loader raises it as DataError."""

    faults: list[tuple[str, str]]


def collate(samples: Sequence[Sample]) -> Clip | Unreadable:
    """Stack samples of equal frame count."""
    faults = [fault for sample in samples for fault in sample.faults]
    if any(sample.video is None for sample in samples):
        return Unreadable(faults)
    return Clip(
        video=torch.stack([sample.video for sample in samples]),
        positions=torch.tensor([sample.draw.position for sample in samples]),
        paths=[sample.path for sample in samples],
        faults=faults,
    )

"""Loading a clip: which frames of a file, which crop, and the tensors of one batch.

open_frames opens a file, read_clip reads the chosen frames at the chosen size (readers resize, because a JPEG or a
video decodes faster at a smaller size), read_clips those of several clips in one pass, to_sample makes tensors of them.
ClipDataset does all three for a row of a table, collate stacks samples to a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae3d.data.batches.batch_schedule import BatchSchedule, BatchShape, ClipIndex, Schedule, StepShape, stream_counts
from vae3d.data.batches.buckets import Bucket
from vae3d.data.decoding.depth import DepthReader, DepthSettings, encode_depth
from vae3d.data.decoding.images import resize_circular
from vae3d.data.decoding.readers import decodes_on_gpu, open_media
from vae3d.data.media import MediaError, Reader, Size
from vae3d.data.table.segments import WHOLE, Bounds, Segment
from vae3d.seeding import seed_of
from vae3d.text import plural
from vae3d.transfer import to_device
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    import pandas as pd

    from vae3d.data.table.file_table import FileTable

ATTEMPTS = 10  # files to try for one clip
PANORAMA_TOLERANCE = 0.01  # relative, of width / (2 * height)


@dataclass(frozen=True)
class ClipSettings:
    """How to cut a clip out of a file. Fields as in config.schema.Data.

    A video of variable rate is treated as if it had its mean rate throughout. depth: read 16-bit depth maps instead of
    colours. channels: of the model's pixels: 3 for colours, 4 with alpha, or how many equal ones for depth.
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
    channels: int = 3

    def step(self, fps: np.ndarray | float) -> np.ndarray:
        """Distance between two frames of a clip, in frames of a file of this rate."""
        thinning = 1.0 if self.fps is None else np.maximum(1.0, np.asarray(fps, dtype=float) / self.fps)
        return self.stride * np.asarray(thinning)

    def length(self, num_frames: np.ndarray | float, fps: np.ndarray | float) -> np.ndarray:
        """The longest clip that a file gives: the number of i for which frame floor(i * step) exists."""
        return thinned_count(np.asarray(num_frames), self.step(fps))


def thinned_count(num_frames: np.ndarray | int, step: np.ndarray | float) -> np.ndarray:
    """The number of i for which frame floor(i * step) exists, of a file with so many frames. step: at least 1."""
    count = np.ceil(num_frames / step).astype(int)  # but for rounding, by which the quotient may be off by one
    return count + (np.floor(count * step) < num_frames) - (np.floor((count - 1) * step) >= num_frames)


def frame_indices(
    sampling: str, num_frames: int, frames: int, step: float, start: float, rng: np.random.Generator | None
) -> list[int]:
    """Which `frames` of the `num_frames` frames of a file to take, ascending.

    contiguous: one after the other, `step` apart. The others choose among the frames 0, step, 2 step, ... of the file.
    first_last_random: the first, the last, and a random draw without replacement between (rng None: evenly spaced).
    strided: every s-th, with the largest s that gives enough frames.
    start: in [0, 1), where the clip begins among the possible places, and the frame of a clip of one.
    The file must have at least floor((frames - 1) step) + 1 frames.
    """
    if sampling == "contiguous" or frames == 1:
        span = int((frames - 1) * step) + 1
        first = int(start * (num_frames - span + 1))
        return [first + int(i * step) for i in range(frames)]
    last = int(thinned_count(num_frames, step)) - 1  # of the frames 0, step, 2 step, ...
    if sampling == "strided":
        stride = last // (frames - 1)
        first = int(start * (last - (frames - 1) * stride + 1))
        chosen = [first + i * stride for i in range(frames)]
    elif rng is None:
        chosen = [i * last // (frames - 1) for i in range(frames)]
    elif frames == 2:
        chosen = [0, last]
    else:
        chosen = [0, *sorted(1 + rng.choice(last - 1, frames - 2, replace=False)), last]
    return [int(i * step) for i in chosen]


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


def read_resized(reader: Reader, indices: Sequence[int], target: Size | None = None) -> np.ndarray:
    """Frames [T, H, W, 3] uint8, resized and centre-cropped to `target`; None: the size of the file."""
    target = target or (reader.info.height, reader.info.width)
    crop = resize_crop_params(*reader.info.size_to_scale(target), target)
    return crop.crop(reader.read(indices, crop.size))


def open_frames(path: str, settings: ClipSettings, bounds: Bounds = WHOLE) -> Reader:
    """A reader of a file, or of the part within `bounds`: of colours, or of depth maps as stored. Raises MediaError."""
    if settings.depth is None:
        reader = open_media(path, settings.reader, alpha=settings.channels == 4)
    else:
        reader = DepthReader(path)
    return Segment(reader, path, bounds)


def read_clip(
    reader: Reader,
    path: str,
    settings: ClipSettings,
    frames: int,
    start: float,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """[frames, height, width, settings.channels] uint8; of depth maps [frames, height, width] uint16.

    start: where the clip begins, as a fraction in [0, 1) of the possible places. rng: for random crops and random
    frames; None takes the centre crop and evenly spaced frames.
    Raises MediaError if the file has too few frames, or settings.panorama is set and it is no panorama.
    """
    return read_clips(reader, path, settings, [frames], [start], [rng])[0]


def read_clips(
    reader: Reader,
    path: str,
    settings: ClipSettings,
    frames: Sequence[int],
    starts: Sequence[float],
    rngs: Sequence[np.random.Generator | None],
) -> list[np.ndarray]:
    """What read_clip returns for each of several clips of a file, decoded in one pass in the order of their frames.

    frames, starts, rngs: of each clip. Raises MediaError as read_clip does, without saying which clip failed.
    """
    info, target = reader.info, (settings.height, settings.width)
    step = float(settings.step(info.fps))
    chosen, crops = [], []
    for count, start, rng in zip(frames, starts, rngs, strict=True):
        span = int((count - 1) * step) + 1
        if info.num_frames < span:
            raise MediaError(
                path, f"has {plural(info.num_frames, 'frame')}, fewer than its table says; the clip needs {span}"
            )
        chosen.append(frame_indices(settings.sampling, info.num_frames, count, step, start, rng))
        if not settings.panorama:
            random = rng if settings.crop == "random" else None
            crops.append(resize_crop_params(*info.size_to_scale(target), target, settings.short_side, random))
    if settings.panorama:
        depth = settings.depth is not None
        return [_read_panoramas(reader, path, indices, target, depth) for indices in chosen]
    if len(chosen) == 1:
        return [crops[0].crop(reader.read(chosen[0], crops[0].size))]
    union = np.unique(np.concatenate(chosen))
    pixels = reader.read(union.tolist(), crops[0].size)  # the size is the same for all; only the place is random
    return [crop.crop(pixels[np.searchsorted(union, indices)]) for crop, indices in zip(crops, chosen, strict=True)]


def _read_panoramas(reader: Reader, path: str, indices: Sequence[int], size: Size, depth: bool) -> np.ndarray:
    """Whole frames at `size`, resized with wrap-around: the left and right edge of a panorama are neighbours."""
    info = reader.info
    if abs(info.aspect * info.width / (2 * info.height) - 1) > PANORAMA_TOLERANCE:
        raise MediaError(
            path, f"is {info.height}x{info.width}: no equirectangular panorama, which is twice as wide as high"
        )
    if depth or size == (info.height, info.width):
        return reader.read(indices, size)
    return np.stack([resize_circular(reader.read([index])[0], size) for index in indices])


@dataclass
class Sample:
    """One loaded clip. video: None if no file could be read. errors: (path, reason) of files that failed."""

    video: Tensor | None  # [C, T, H, W], uint8; of depth maps float32 in [-1, 1]
    index: ClipIndex
    path: str
    errors: list[tuple[str, str]] = field(default_factory=list)
    valid: Tensor | None = None  # [1, T, H, W], bool; of depth maps only
    depth_bounds: Tensor | None = None  # [2], metres; of depth maps only


def to_sample(frames: np.ndarray, index: ClipIndex, path: str, settings: ClipSettings) -> Sample:
    """Tensors of what read_clip returned. Raises MediaError for depth without a valid pixel."""
    if settings.depth is None:
        return Sample(to_tensor(frames), index, path)
    try:
        video, valid, bounds = encode_depth(np.ascontiguousarray(frames), settings.depth, settings.channels)
    except ValueError as error:
        raise MediaError(path, str(error)) from error
    return Sample(video, index, path, valid=valid, depth_bounds=bounds)


def to_tensor(frames: np.ndarray) -> Tensor:
    """[T, H, W, C] array -> [C, T, H, W] tensor."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


def to_video(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """[T, H, W, 3] uint8 -> [1, 3, T, H, W] in [-1, 1]."""
    return to_device(to_tensor(frames)[None], torch.device(device)).float() / 127.5 - 1.0


class ClipDataset(Dataset[Sample]):
    """Clips of a table, indexed by ClipIndex.

    Every random choice is a pure function of (seed, position): workers, ranks and a resume do not change a clip.
    A file that cannot be read is reported in `errors` and replaced by another row, seeded as well.
    streams: how many there are; positions of one of several are numbered over all, see Interleaved.step.
    """

    def __init__(
        self, table: pd.DataFrame | FileTable, schedule: BatchSchedule, settings: ClipSettings, streams: int = 1
    ) -> None:
        from vae3d.data.table.file_table import as_file_table  # imports pandas, which a single video does not need

        self.table = as_file_table(table)
        self.schedule = schedule
        self.settings = settings
        self.streams = streams

    def __getitem__(self, index: ClipIndex) -> Sample:
        errors: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS):
            path = self.table.path(index.row)
            try:
                return replace(self._load(path, [index])[0], errors=errors)
            except MediaError as error:
                errors.append((error.path, error.reason))
            index = index._replace(
                row=self.schedule.replacement(self._in_stream(index.position), index.frames, attempt)
            )
        return Sample(None, index, path, errors)

    def __getitems__(self, indices: Sequence[ClipIndex]) -> list[Sample]:
        """The samples of a batch, as __getitem__ gives them. Clips of one row are read in one pass over its file."""
        by_row: dict[int, list[ClipIndex]] = {}
        for index in indices:
            by_row.setdefault(index.row, []).append(index)
        samples: dict[ClipIndex, Sample] = {}
        for row, group in by_row.items():
            if len(group) > 1:
                with suppress(MediaError):  # read one by one below: only the clips that fail are replaced
                    samples |= zip(group, self._load(self.table.path(row), group), strict=True)
        return [samples.get(index) or self[index] for index in indices]

    def _load(self, path: str, indices: Sequence[ClipIndex]) -> list[Sample]:
        """Clips of one row. Raises MediaError."""
        with closing(open_frames(path, self.settings, self.table.bounds(indices[0].row))) as reader:
            return augmented_clips(reader, path, indices, self.settings, self.schedule.seed, self._start_at)

    def _start_at(self, position: int, draw: float) -> float:
        return self.schedule.start_at(self._in_stream(position), draw)

    def _in_stream(self, position: int) -> int:
        return position // self.streams


def augmented_clips(
    reader: Reader,
    path: str,
    indices: Sequence[ClipIndex],
    settings: ClipSettings,
    seed: int,
    start_at: Callable[[int, float], float] = lambda position, draw: draw,
) -> list[Sample]:
    """The clips of a file at `indices`: where each begins and how it is cropped, mirrored and rolled is drawn from
    (seed, index.position). start_at: from the position and a draw in [0, 1) to the start. Raises MediaError."""
    rngs = [np.random.default_rng(seed_of(seed, index.position, "clip")) for index in indices]
    starts, mirrored = [], []
    for index, rng in zip(indices, rngs, strict=True):
        starts.append(start_at(index.position, rng.random()))
        mirrored.append(rng.random() < 0.5)
    clips = read_clips(reader, path, settings, [index.frames for index in indices], starts, rngs)
    samples = []
    for index, rng, mirror, frames in zip(indices, rngs, mirrored, clips, strict=True):
        if mirror and settings.flip:
            frames = frames[:, :, ::-1]
        if settings.roll:
            frames = np.roll(frames, int(rng.integers(settings.width)), axis=2)
        samples.append(to_sample(frames, index, path, settings))
    return samples


@dataclass(frozen=True)
class Stream:
    """What the steps of one kind take their clips from: rows of a table, in the order of a schedule.

    source: its name in data.sources; empty: the only one. bucket: whose shape all clips have; None: settings and
    schedule say it.
    """

    table: FileTable
    schedule: BatchSchedule
    settings: ClipSettings
    source: str = ""
    bucket: Bucket | None = None

    @property
    def name(self) -> str:
        """For logs: photos, 33x256x256 or photos_33x256x256."""
        return "_".join(filter(None, (self.source, self.bucket.name if self.bucket else "")))

    @property
    def groups(self) -> list[str]:
        """Names under which its steps are counted: that of its source, and its own; none of the only stream."""
        return list(dict.fromkeys(filter(None, (self.source, self.name))))


class StepShapes:
    """Shapes and counts of what `streams` give in the order of `schedule`."""

    streams: Sequence[Stream]
    schedule: Schedule

    def shapes(self) -> list[BatchShape]:
        """Of every kind of micro-batch."""
        return [self._shape(shape) for shape in self.schedule.shapes()]

    def shape_at(self, step: int) -> BatchShape:
        """Of the micro-batches of a step."""
        stream = self.schedule.locate(step)[0]
        micro_batch = self.streams[stream].schedule.micro_batch
        return self._shape(StepShape(stream, self.schedule.frames_at(step), micro_batch))

    def _shape(self, shape: StepShape) -> BatchShape:
        settings = self.streams[shape.stream].settings
        return BatchShape(shape.stream, shape.micro_batch, shape.frames, settings.height, settings.width)

    @property
    def item_bytes(self) -> int:
        """Of the largest batch that a worker reads."""
        settings = self.streams[0].settings  # channels and depth are of the run
        largest = max(shape.pixels for shape in self.shapes())
        return settings.channels * largest * (1 if settings.depth is None else 4)

    def clips_per_step(self) -> dict[str, int]:
        """Of each source and bucket; nothing of one stream alone."""
        return {stream.name: stream.schedule.batch_size for stream in self.streams if stream.name}

    def counts(self, step: int) -> dict[str, float]:
        """Steps and clips before a step of each source and each bucket, for the log; nothing of one stream alone."""
        return stream_counts(self.schedule, [stream.groups for stream in self.streams], step)


class MixedClips(Dataset[Sample]):
    """Clips of several streams, indexed by ClipIndex: each from the dataset of its stream."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.datasets = [ClipDataset(s.table, s.schedule, s.settings, len(streams)) for s in streams]

    def __getitem__(self, index: ClipIndex) -> Sample:
        return self.datasets[index.stream][index]

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether its reader uses CUDA, so that workers must be spawned."""
        return any(decodes_on_gpu(dataset.settings.reader) for dataset in self.datasets)

    def __getitems__(self, indices: Sequence[ClipIndex]) -> list[Sample]:
        """The samples of a batch, all of one stream."""
        return self.datasets[indices[0].stream].__getitems__(indices)


@dataclass
class Unreadable:
    """A batch with a clip for which ATTEMPTS files in a row could not be read. Its rank cannot take the step."""

    errors: list[tuple[str, str]]


def collate(samples: Sequence[Sample]) -> ClipBatch | Unreadable:
    """Stack samples of equal frame count."""
    errors = [error for sample in samples for error in sample.errors]
    if any(sample.video is None for sample in samples):
        return Unreadable(errors)

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)

    return ClipBatch(
        video=stack([sample.video for sample in samples]),
        positions=torch.tensor([sample.index.position for sample in samples]),
        paths=[sample.path for sample in samples],
        errors=errors,
        valid=stack([sample.valid for sample in samples]),
        depth_bounds=stack([sample.depth_bounds for sample in samples]),
    )

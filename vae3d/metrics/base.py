"""Base classes of metrics: pairs of videos come in chunk by chunk, scores per frame and per video go out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.pixels import RANGES, PixelError, as_unit, check_frames, over_grey
from vae3d.precision import autocast_off, no_tf32

R = TypeVar("R")
SCORED_FRAMES = 16  # of a video in memory or a file that are scored at once


@dataclass(frozen=True)
class Nearest:
    """The best value of a column is `target`; values below and above are worse."""

    target: float


Better = bool | Nearest | None  # True: higher is better. False: lower is better. None: neither


def goodness(value: float, better: Better) -> float:
    """Sort key of a value: larger is better. Raises ValueError for a column that has no better or worse."""
    if better is None:
        raise ValueError("this column has no better or worse values")
    if isinstance(better, Nearest):
        return -abs(value - better.target)
    return value if better else -value


class MetricError(UserError):
    """A metric cannot be computed on this input."""


@dataclass
class Chunk:
    """The next frames of two videos, [T, 3, H, W] in [0, 1], fp32.

    start: index of the first new frame in the video. overlap: 1 if frame 0 is the last frame of the previous chunk,
    for metrics of neighbouring frames; else 0. alpha: of the new frames of both, [T, 1, H, W], if the videos have it.
    """

    ref: Tensor
    rec: Tensor
    start: int = 0
    overlap: int = 0
    alpha: tuple[Tensor, Tensor] | None = None
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def new_frames(self) -> tuple[Tensor, Tensor]:
        return self.ref[self.overlap :], self.rec[self.overlap :]

    def cached(self, key: Any, compute: Callable[[], R]) -> R:
        """compute(), once per key: for features and flows that several metrics share."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


@dataclass
class Score:
    """One score of one video. value: None if undefined, such as the motion of a single frame.

    frames: of each frame, or each pair of neighbouring frames, if the score is their mean.
    """

    value: float | None
    frames: list[float] = field(default_factory=list)


def frame_curves(scores: Mapping[str, Score]) -> dict[str, list[float]]:
    """Column -> values of the frames, of the columns that have them."""
    return {column: score.frames for column, score in scores.items() if score.frames}


@dataclass
class VideoResult:
    """All scores of one video.

    features: metric -> (of the original, of the reconstruction), for distances between whole sets.
    counts: numbers reported beside the scores, such as how many frames are identical.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    features: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Metric:
    """Base of all metrics.

    name: on the command line. columns: name of each result -> Better. count_columns: keys of VideoResult.counts.
    options: attributes that change the scores. pairs: whether it compares neighbouring frames. min_size: pixels of a
    frame's shorter side. min_frames: of a video. alpha: whether it scores alpha, and so needs RGBA.
    """

    name: str
    columns: Mapping[str, Better]
    count_columns: Sequence[str] = ()
    options: Sequence[str] = ()
    pairs = False
    min_size = 1
    min_frames = 1
    alpha = False

    def update(self, chunk: Chunk) -> None:
        raise NotImplementedError

    def result(self) -> VideoResult:
        """Scores of the video; the next update starts another one. Raises MetricError if a score is not finite."""
        raise NotImplementedError

    def reset(self) -> None:
        """Discard the current video."""

    def aggregate(self, results: Sequence[VideoResult]) -> dict[str, float | None]:
        """Every column of a set of videos: the mean over those that have a value."""
        means = {}
        for column in self.columns:
            values = [result.scores[column].value for result in results if result.scores[column].value is not None]
            means[column] = fmean(values) if values else None
        return means

    def settings(self) -> dict[str, Any]:
        """Settings that change the scores, for reports."""
        return {name: getattr(self, name) for name in self.options}

    def why_unsupported(self, frames: int, height: int, width: int, channels: int) -> str | None:
        """The reason why a video of 3 or 4 channels cannot be scored; None if it can."""
        if self.alpha and channels != 4:
            return f"{self.name} needs alpha, and the video has none; leave it out, or give RGBA"
        if min(height, width) < self.min_size:
            return f"{self.name} needs frames of at least {self.min_size} pixels; these are {height}x{width}"
        if frames < self.min_frames:
            return f"{self.name} needs at least {self.min_frames} frames; there are {frames}"
        return None


class SeriesMetric(Metric):
    """A metric with one value per frame, or per pair of neighbours; the video's score is the mean.

    It is measured without autocast.
    """

    def __init__(self) -> None:
        self._series: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        """Column -> values of the chunk's new frames, or of all its pairs of neighbours."""
        raise NotImplementedError

    def update(self, chunk: Chunk) -> None:
        channels = 3 if chunk.alpha is None else 4
        if reason := self.why_unsupported(len(chunk.ref), *chunk.ref.shape[-2:], channels):
            raise MetricError(reason)
        if self.pairs and len(chunk.ref) < 2:  # the video's first frame, alone
            return
        with autocast_off(chunk.ref.device):
            measured = self.measure(chunk)
        for column, values in measured.items():
            # As floats: small tensors that stay between large temporary ones would fragment the heap.
            self._series.setdefault(column, []).extend(values.double().tolist())

    def count(self, name: str, flags: Tensor) -> None:
        """Add the number of frames whose flag is true to a count of VideoResult."""
        self._counts[name] = self._counts.get(name, 0) + int(flags.sum())

    def result(self) -> VideoResult:
        result = VideoResult(counts={name: self._counts.get(name, 0) for name in self.count_columns})
        for column in self.columns:
            result.scores[column] = Score(*self._mean(column))
        self.reset()
        return result

    def _mean(self, column: str) -> tuple[float | None, list[float]]:
        series = self._series.get(column, [])
        for index, value in enumerate(series):
            if not math.isfinite(value):
                what = f"frames {index} and {index + 1}" if self.pairs else f"frame {index}"
                raise MetricError(f"{column} of {what} is {value}")
        return (fmean(series) if series else None), series

    def reset(self) -> None:
        self._series, self._counts = {}, {}


def frame_pairs(
    ref: np.ndarray, rec: np.ndarray, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Two videos [T, H, W, C] uint8 in the chunks that MetricSet.score takes."""
    for start in range(0, len(ref), SCORED_FRAMES):
        frames = slice(start, start + SCORED_FRAMES)
        yield as_unit(ref[frames], device), as_unit(rec[frames], device)


class MetricSet:
    """Several metrics on the same videos; they share chunks and features. See vae3d.metrics for its use.

    files: metric -> weight files it loaded. skipped: metric -> why it was left out. pixel_range: of the input: unit
    ([0, 1]), signed ([-1, 1]) or uint8.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        files: Mapping[str, Sequence[Path]] | None = None,
        skipped: Mapping[str, str] | None = None,
        pixel_range: str = "unit",
    ) -> None:
        if pixel_range not in RANGES:
            raise MetricError(f"pixel_range is {pixel_range!r}; use one of {', '.join(RANGES)}")
        self.pixel_range = pixel_range
        self.metrics = list(metrics)
        self.files = dict(files or {})
        self.skipped = dict(skipped or {})
        self._pairs = any(metric.pairs for metric in metrics)
        self._last: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.metrics)

    def subset(self, names: Sequence[str]) -> MetricSet:
        """Some of the metrics. They share networks and state with this set."""
        return MetricSet([metric for metric in self.metrics if metric.name in names], pixel_range=self.pixel_range)

    @property
    def columns(self) -> dict[str, Better]:
        return {column: better for metric in self.metrics for column, better in metric.columns.items()}

    def reasons(self, frames: int, height: int, width: int, channels: int) -> dict[str, str]:
        """Metric -> why it cannot score such a video, of those that cannot. channels: 3, or 4 of RGBA."""
        found = {metric.name: metric.why_unsupported(frames, height, width, channels) for metric in self.metrics}
        return {name: reason for name, reason in found.items() if reason is not None}

    @no_tf32()
    @torch.no_grad()
    def update(self, ref: Tensor, rec: Tensor) -> None:
        """Add the next frames of the original and the reconstruction, [T, 3, H, W] in `pixel_range`.

        Of RGBA [T, 4, H, W], the colours are scored over mid-grey, and alpha by metrics of alpha.
        Raises MetricError if they have another shape or range, differ in shape, hold NaN, or a metric does not support
        them. After an exception the next update starts another video.
        """
        with ExitStack() as failed:
            failed.callback(self.reset)
            self._update(ref, rec)
            failed.pop_all()

    def _update(self, ref: Tensor, rec: Tensor) -> None:
        try:
            ref = check_frames(ref, "original", self.pixel_range, self._count)
            rec = check_frames(rec, "reconstruction", self.pixel_range, self._count)
        except PixelError as error:
            raise MetricError(str(error)) from None
        if ref.shape != rec.shape:
            raise MetricError(f"the videos differ in shape: {list(ref.shape)} and {list(rec.shape)}")
        alpha = None
        if ref.shape[1] == 4:
            alpha = ref[:, 3:], rec[:, 3:]
            ref, rec = over_grey(ref), over_grey(rec)
        count, overlap = len(ref), 0
        if self._pairs and self._last is not None:
            ref, rec, overlap = torch.cat([self._last[0], ref]), torch.cat([self._last[1], rec]), 1
        chunk = Chunk(ref, rec, self._count, overlap, alpha)
        for metric in self.metrics:
            metric.update(chunk)
        self._last, self._count = (ref[-1:], rec[-1:]), self._count + count

    def score(self, chunks: Iterable[tuple[Tensor, Tensor]]) -> VideoResult:
        """Scores of a whole video. chunks: frames of the original and the reconstruction, as `update` takes them.

        Raises MetricError as `update` and `result` do.
        """
        self.reset()
        for ref, rec in chunks:
            self.update(ref, rec)
        return self.result()

    @no_tf32()
    @torch.no_grad()
    def result(self) -> VideoResult:
        """Scores of the video; the next update starts another one.

        Raises MetricError if a score is not finite, or no frames were given.
        """
        if self.metrics and not self._count:
            raise MetricError("no frames were given: call update(original, reconstruction) before result()")
        whole = VideoResult()
        try:
            for metric in self.metrics:
                part = metric.result()
                whole.scores |= part.scores
                whole.features |= part.features
                whole.counts |= part.counts
        finally:
            self.reset()
        return whole

    def aggregate(self, results: Sequence[VideoResult]) -> dict[str, float | None]:
        """Every column of a set of videos: means over videos, or distances between the sets."""
        return {column: value for metric in self.metrics for column, value in metric.aggregate(results).items()}

    def reset(self) -> None:
        for metric in self.metrics:
            metric.reset()
        self._last, self._count = None, 0

"""What a metric is: it takes a pair of videos chunk by chunk and then says how each frame and the whole did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.pixels import RANGES, PixelError, check_frames
from vae3d.precision import no_tf32

R = TypeVar("R")


@dataclass(frozen=True)
class Nearest:
    """Of a column: the best value is `target`; below and above it are worse."""

    target: float


Better = bool | Nearest | None  # higher is better, lower is better, a value is best, or neither


def goodness(value: float, better: Better) -> float:
    """A number that is larger the better the value is. Raises ValueError for a column without better and worse."""
    if better is None:
        raise ValueError("no value of this column is better than another")
    if isinstance(better, Nearest):
        return -abs(value - better.target)
    return value if better else -value


class MetricError(UserError):
    """A metric that cannot be computed on this input; the message says why."""


@dataclass
class Chunk:
    """The next frames of two videos, [T, 3, H, W] in [0, 1], fp32.

    start: number of the first new frame in the video. overlap: 1 if frame 0 is the last of the chunk before, which
    metrics of neighbouring frames need and others have scored already; else 0.
    """

    ref: Tensor
    rec: Tensor
    start: int = 0
    overlap: int = 0
    _derived: dict[Any, Any] = field(default_factory=dict)

    @property
    def new(self) -> tuple[Tensor, Tensor]:
        return self.ref[self.overlap :], self.rec[self.overlap :]

    def derive(self, key: Any, compute: Callable[[], R]) -> R:
        """compute(), or what it gave before under this key: features and flows that several metrics need."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]


@dataclass
class Score:
    """Of one video. value: None where it is not defined, such as the motion of a single frame.

    frames: of every frame, or of every pair of neighbouring frames, if the score is a mean of them.
    """

    value: float | None
    frames: list[float] = field(default_factory=list)


@dataclass
class VideoResult:
    """All scores of one video.

    features: metric -> those of the original and of the reconstruction, for distances between whole sets.
    counts: what a reader of the scores should know, such as how many frames are identical.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    features: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Metric:
    """Base of all metrics.

    name: as users ask for it. columns: result -> what is better, see Better. counted: keys of
    VideoResult.counts. pairs: whether it compares neighbouring frames. min_size: of a frame's sides, in pixels.
    min_frames: of a video.
    """

    name: str
    columns: Mapping[str, Better]
    counted: Sequence[str] = ()
    pairs = False
    min_size = 1
    min_frames = 1

    def update(self, chunk: Chunk) -> None:
        raise AssertionError("defined by subclasses")

    def result(self) -> VideoResult:
        """Of the video that the updates gave; the next update begins another one.

        Raises MetricError if a score is not finite.
        """
        raise AssertionError("defined by subclasses")

    def reset(self) -> None:
        """Forget a video that could not be read to its end."""

    def over(self, results: Sequence[VideoResult]) -> dict[str, float | None]:
        """The columns of a set of videos: the mean of those that have a value."""
        found = {column: [result.scores[column].value for result in results] for column in self.columns}
        defined = {column: [value for value in values if value is not None] for column, values in found.items()}
        return {column: math.fsum(v) / len(v) if v else None for column, v in defined.items()}

    def settings(self) -> dict[str, Any]:
        """What the scores depend on besides the videos and the weights."""
        return {}

    def refuses(self, frames: int, height: int, width: int) -> str | None:
        """Why it cannot score such a video; None if it can."""
        if min(height, width) < self.min_size:
            return f"{self.name} needs frames of at least {self.min_size} pixels; these are {height}x{width}"
        if frames < self.min_frames:
            return f"{self.name} needs at least {self.min_frames} frames; there are {frames}"
        return None


class SeriesMetric(Metric):
    """A metric whose columns are series over the frames; the video's value is their mean."""

    def __init__(self) -> None:
        self._series: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        """Column -> scores of the chunk's new frames, or of all its pairs of neighbours."""
        raise AssertionError("defined by subclasses")

    def update(self, chunk: Chunk) -> None:
        if reason := self.refuses(len(chunk.ref), *chunk.ref.shape[-2:]):
            raise MetricError(reason)
        if self.pairs and len(chunk.ref) < 2:  # the video's first frame, alone
            return
        for column, values in self.measure(chunk).items():
            # As numbers: small tensors kept between the large temporary ones would keep malloc from reusing these.
            self._series.setdefault(column, []).extend(values.double().tolist())

    def count(self, name: str, flags: Tensor) -> None:
        """Add the frames of which `flags` is true to the count of that name, one of `counted`."""
        self._counts[name] = self._counts.get(name, 0) + int(flags.sum())

    def result(self) -> VideoResult:
        result = VideoResult(counts={name: self._counts.get(name, 0) for name in self.counted})
        for column in self.columns:
            result.scores[column] = Score(*self._mean(column))
        self.reset()
        return result

    def _mean(self, column: str) -> tuple[float | None, list[float]]:
        series = self._series.get(column, [])
        for place, value in enumerate(series):
            if not math.isfinite(value):
                what = f"frames {place} and {place + 1}" if self.pairs else f"frame {place}"
                raise MetricError(f"{column} of {what} is {value}")
        return (math.fsum(series) / len(series) if series else None), series

    def reset(self) -> None:
        self._series, self._counts = {}, {}


class MetricSet:
    """Several metrics on the same videos: every chunk is shared, and what they have in common is computed once.

        metrics = build_metrics(["psnr", "lpips"])
        metrics.update(ref, rec)                     # as often as the reader likes
        metrics.result().scores["psnr"].value

    files: metric -> the weights it loaded. absent: metrics that were asked for and left out, with the reason.
    pixel_range: of what `update` takes: unit ([0, 1]), signed ([-1, 1]) or uint8.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        files: Mapping[str, Sequence[Path]] | None = None,
        absent: Mapping[str, str] | None = None,
        pixel_range: str = "unit",
    ) -> None:
        if pixel_range not in RANGES:
            raise MetricError(f"pixel_range is {pixel_range!r}; use one of {', '.join(RANGES)}")
        self.pixel_range = pixel_range
        self.metrics, self.files, self.absent = list(metrics), dict(files or {}), dict(absent or {})
        self._pairs = any(metric.pairs for metric in metrics)
        self._last: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.metrics)

    def only(self, names: Sequence[str]) -> MetricSet:
        """Some of the metrics, which share their networks and what they hold of a video with these."""
        chosen = [metric for metric in self.metrics if metric.name in names]
        return MetricSet(chosen, pixel_range=self.pixel_range)

    @property
    def columns(self) -> dict[str, Better]:
        return {column: better for metric in self.metrics for column, better in metric.columns.items()}

    @no_tf32()
    @torch.no_grad()
    def update(self, ref: Tensor, rec: Tensor) -> None:
        """Add the next frames of the original and the reconstruction, [T, 3, H, W] in `pixel_range`.

        Raises MetricError if they are something else (and says what they look like), differ in shape, hold NaN, or if a
        metric cannot take them.
        """
        try:
            ref = check_frames(ref, "original", self.pixel_range, self._count)
            rec = check_frames(rec, "reconstruction", self.pixel_range, self._count)
        except PixelError as error:
            raise MetricError(str(error)) from None
        if ref.shape != rec.shape:
            raise MetricError(f"the videos differ in shape: {list(ref.shape)} and {list(rec.shape)}")
        count, overlap = len(ref), 0
        if self._pairs and self._last is not None:
            ref, rec, overlap = torch.cat([self._last[0], ref]), torch.cat([self._last[1], rec]), 1
        chunk = Chunk(ref, rec, self._count, overlap)
        for metric in self.metrics:
            metric.update(chunk)
        self._last, self._count = (ref[-1:], rec[-1:]), self._count + count

    @no_tf32()
    @torch.no_grad()
    def result(self) -> VideoResult:
        """Scores of the video; the next update begins another one.

        Raises MetricError for a score that is not finite, and without an update.
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

    def over(self, results: Sequence[VideoResult]) -> dict[str, float | None]:
        """Every column of a set of videos: means over the videos, and distances between the sets."""
        return {column: value for metric in self.metrics for column, value in metric.over(results).items()}

    def reset(self) -> None:
        for metric in self.metrics:
            metric.reset()
        self._last, self._count = None, 0

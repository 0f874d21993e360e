"""Distances between the set of all originals and the set of all reconstructions: rFID of frames, rFVD of videos.

Each video gives features; `combine` computes one distance over the features of all videos. A mean of distances per
batch, which some tools report, is another quantity and differs by a factor of ten.

The distance is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) with unbiased covariances, in fp64 (Heusel et al., arXiv
1706.08500). With S1 = A A^T and S2 = B B^T, the trace of (S1 S2)^1/2 is the sum of the singular values of A^T B. This
form keeps the small distances of good reconstructions exact: square roots of computed eigenvalues, as other
implementations sum them, each have an error of up to 1e-8 of the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vae3d.metrics.base import Chunk, Metric, MetricError, VideoResult
from vae3d.metrics.networks import Networks, batch_frames
from vae3d.precision import autocast_off
from vae3d.running_stats import RunningStats

COMPARABLE = {"rfvd": 2048, "rfid": 10_000}  # samples; with fewer, bias dominates the distance
MEANINGLESS = {"rfvd": 400, "rfid": 2048}  # samples; fewer than the feature width make the covariance singular
ROWS_KEPT = 2048  # of one video, before they are reduced to moments


class FeatureStats(RunningStats):
    """Mean and covariance of feature vectors, gathered on the CPU."""

    def update(self, features: Tensor) -> None:
        """Add the rows of [n, d]. Raises MetricError for another width and for values that are not finite."""
        if features.ndim != 2:
            raise MetricError(f"features must be [n, d]; got {list(features.shape)}")
        features = features.detach().to("cpu", torch.float64)
        if bad := int((~features.isfinite()).any(1).sum()):
            raise MetricError(f"{bad} of {len(features)} feature vectors are not finite")
        super().update(features)

    def merge(self, other: RunningStats) -> None:
        """Add the vectors of `other`. Raises MetricError for another width."""
        if self.count and other.count:
            _same_width(len(self.mean), len(other.mean))
        super().merge(other)

    def cov(self) -> Tensor:
        """[d, d] unbiased covariance. Raises MetricError for fewer than two vectors."""
        if self.count < 2:
            needed = "a Fréchet distance needs at least 2 feature vectors on each side"
            raise MetricError(f"{needed}; there are {self.count}")
        return self.scatter / (self.count - 1)


def frechet(m1: FeatureStats, m2: FeatureStats) -> float:
    """Distance between the Gaussians of two `FeatureStats`.

    Raises MetricError for fewer than two vectors on a side and for different widths.
    """
    first, second = m1.cov(), m2.cov()
    _same_width(len(m1.mean), len(m2.mean))
    cross = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    distance = (m1.mean - m2.mean).square().sum() + (first.trace() + second.trace() - 2 * cross)
    return max(float(distance), 0.0)  # rounding can make the distance of equal sets negative


def _factor(covariance: Tensor) -> Tensor:
    """[d, rank] A with A A^T = covariance; eigenvalues below rounding error are dropped."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _same_width(a: int, b: int) -> None:
    if a != b:
        raise MetricError(f"features of different width: {a} and {b}")


class Features:
    """Feature vectors of one video. ROWS_KEPT vectors at a time are reduced to their moments."""

    def __init__(self) -> None:
        self.rows = torch.empty(0, 0)
        self.moments = FeatureStats()

    def add(self, rows: Tensor) -> None:
        """Append [n, d]."""
        rows = rows.float().cpu()
        self.rows = torch.cat([self.rows, rows]) if len(self.rows) else rows
        if len(self.rows) >= ROWS_KEPT:
            self.moments.update(self.rows)
            self.rows = self.rows[:0]

    @property
    def count(self) -> int:
        return self.moments.count + len(self.rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """For saving; see from_arrays."""
        moments = self.moments
        return {
            "rows": self.rows.numpy(),
            "count": np.array(moments.count),
            "mean": moments.mean.numpy(),
            "scatter": moments.scatter.numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Features:
        features = cls()
        features.rows = torch.from_numpy(arrays["rows"])
        features.moments.count = int(arrays["count"])
        features.moments.mean = torch.from_numpy(arrays["mean"])
        features.moments.scatter = torch.from_numpy(arrays["scatter"])
        return features


class SetMetric(Metric):
    """A distance between two sets of videos, from features of each video."""

    def combine(self, features: Iterable[tuple[Features, Features]]) -> tuple[float | None, int, list[str]]:
        """Distance over all videos (None for fewer than two samples), number of samples, warnings."""
        totals = Features(), Features()
        for pair in features:
            for whole, part in zip(totals, pair, strict=True):
                whole.moments.merge(part.moments)
                whole.add(part.rows)
        for whole in totals:
            whole.moments.update(whole.rows)
        ref, rec = (whole.moments for whole in totals)
        if ref.count < 2:
            return None, ref.count, [f"{self.name} needs at least 2 samples; there are {ref.count}"]
        return frechet(ref, rec), ref.count, self._warnings(ref.count)

    def num_samples(self, results: Sequence[VideoResult]) -> int:
        """Number of samples in these videos. A distance is larger the fewer samples it has."""
        return sum(result.features[self.name][0].count for result in results)

    def aggregate(self, results: Sequence[VideoResult]) -> dict[str, float | None]:
        return {self.name: self.combine(result.features[self.name] for result in results)[0]}

    def _warnings(self, count: int) -> list[str]:
        if count < MEANINGLESS[self.name]:
            return [f"{self.name} of N={count} samples is not comparable: it depends more on N than on the videos"]
        if count < COMPARABLE[self.name]:
            return [f"{self.name} of N={count} samples: compare it only with the same N"]
        return []


class Rfid(SetMetric):
    """Fréchet distance between FID's Inception-v3 features of frames (Heusel et al., arXiv 1706.08500).

    stride: take every n-th frame of a video, from its first.
    """

    name = "rfid"
    columns = {"rfid": False}
    options = ("stride",)

    def __init__(self, networks: Networks, stride: int = 1) -> None:
        self.network, self.stride = networks.inception(), stride
        self.reset()

    def update(self, chunk: Chunk) -> None:
        first = -chunk.start % self.stride
        for features, frames in zip(self._features, chunk.new_frames, strict=True):
            with autocast_off(frames.device):
                for batch in frames[first :: self.stride].split(batch_frames(frames)):
                    features.add(_finite(self.name, self.network(batch)))

    def result(self) -> VideoResult:
        result = VideoResult(features={self.name: self._features})
        self.reset()
        return result

    def reset(self) -> None:
        self._features = Features(), Features()


class Rfvd(SetMetric):
    """Fréchet distance between I3D's Kinetics-400 logits of videos (Unterthiner et al., arXiv 1812.01717).

    frames: take the first so many frames of a video, at least 10.
    """

    name = "rfvd"
    columns = {"rfvd": False}
    options = ("frames",)
    min_frames = 10

    def __init__(self, networks: Networks, frames: int = 16) -> None:
        if frames < self.min_frames:
            raise MetricError(f"rfvd needs at least {self.min_frames} frames; frames={frames}")
        self.network, self.frames = networks.i3d(), frames
        self.reset()

    def update(self, chunk: Chunk) -> None:
        remaining = self.frames - chunk.start
        if remaining <= 0:  # an empty slice would keep the chunk in memory
            return
        for video, frames in zip(self._videos, chunk.new_frames, strict=True):
            video.append(frames[:remaining])

    def result(self) -> VideoResult:
        features = Features(), Features()
        for whole, parts in zip(features, self._videos, strict=True):
            video = torch.cat(parts)
            if reason := self.why_unsupported(len(video), *video.shape[2:], channels=3):
                raise MetricError(reason)
            with autocast_off(video.device):
                whole.add(_finite(self.name, self.network.features(video.transpose(0, 1)[None])))
        self.reset()
        return VideoResult(features={self.name: features})

    def reset(self) -> None:
        self._videos: tuple[list[Tensor], list[Tensor]] = ([], [])


def _finite(name: str, features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise MetricError(f"{name}: a feature is not finite")
    return features

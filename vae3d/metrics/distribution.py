"""Distances between the set of all originals and the set of all reconstructions: rFID of frames, rFVD of videos.

Per video only features are kept; a set's distance is computed once, over all of them (`combine`). A mean of distances
of batches, as some tools report it, is another quantity, off by a factor of ten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae3d.metrics.base import Chunk, Metric, MetricError, VideoResult
from vae3d.metrics.frechet import Moments, frechet
from vae3d.metrics.networks import Networks, batch_frames
from vae3d.precision import autocast_off

COMPARABLE = {"rfvd": 2048, "rfid": 10_000}  # with fewer samples the distance is mostly its own bias
MEANINGLESS = {"rfvd": 400, "rfid": 2048}  # fewer than features: the covariance has no inverse
ROWS_KEPT = 2048


class Features:
    """Feature vectors of one video: as they are, or only their moments of those that are too many to keep."""

    def __init__(self) -> None:
        self.rows = torch.empty(0, 0)
        self.moments = Moments()

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
        """What a file needs to hold."""
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
        features.moments.mean, features.moments.scatter = (torch.from_numpy(arrays[k]) for k in ("mean", "scatter"))
        return features


class SetMetric(Metric):
    """A metric of all videos together, from the features of each."""

    def combine(self, features: Iterable[tuple[Features, Features]]) -> tuple[float | None, int, list[str]]:
        """The distance over all videos, of how many samples, and what to warn of; None for fewer than two."""
        sums = Features(), Features()
        for pair in features:
            for whole, part in zip(sums, pair, strict=True):
                whole.moments.merge(part.moments)
                whole.add(part.rows)
        for whole in sums:
            whole.moments.update(whole.rows)
        ref, rec = (whole.moments for whole in sums)
        if ref.count < 2:
            return None, ref.count, [f"{self.name} needs two samples, there is {ref.count}"]
        return frechet(ref, rec), ref.count, self._warnings(ref.count)

    def samples(self, results: Sequence[VideoResult]) -> int:
        """How many the distance over these videos is of: fewer make it larger."""
        return sum(result.features[self.name][0].count for result in results)

    def over(self, results: Sequence[VideoResult]) -> dict[str, float | None]:
        return {self.name: self.combine(result.features[self.name] for result in results)[0]}

    def _warnings(self, count: int) -> list[str]:
        if count < MEANINGLESS[self.name]:
            return [f"{self.name} of N={count} samples is not comparable: it depends on N more than on the videos"]
        if count < COMPARABLE[self.name]:
            return [f"{self.name} of N={count} samples: compare it with the same N only"]
        return []


class Rfid(SetMetric):
    """Fréchet distance of FID's Inception-v3 features of single frames (Heusel et al., arXiv 1706.08500).

    stride: take every n-th frame, counted from each video's first.
    """

    name = "rfid"
    columns = {"rfid": False}

    def __init__(self, networks: Networks, stride: int = 1) -> None:
        self.network, self.stride = networks.inception(), stride
        self.reset()

    def update(self, chunk: Chunk) -> None:
        first = -chunk.start % self.stride
        for features, frames in zip(self._features, chunk.new, strict=True):
            with autocast_off(frames.device):
                for batch in frames[first :: self.stride].split(batch_frames(frames)):
                    features.add(_finite(self.name, self.network(batch)))

    def result(self) -> VideoResult:
        result = VideoResult(features={self.name: self._features})
        self.reset()
        return result

    def reset(self) -> None:
        self._features = Features(), Features()

    def settings(self) -> dict[str, Any]:
        return {"stride": self.stride}


class Rfvd(SetMetric):
    """Fréchet distance of I3D's Kinetics-400 logits of whole videos (Unterthiner et al., arXiv 1812.01717), of each
    video's first `frames` frames; videos have at least 10."""

    name = "rfvd"
    columns = {"rfvd": False}
    min_frames = 10

    def __init__(self, networks: Networks, frames: int = 16) -> None:
        if frames < self.min_frames:
            raise MetricError(f"rfvd needs at least {self.min_frames} frames; it was told to take {frames}")
        self.network, self.frames = networks.i3d(), frames
        self.reset()

    def update(self, chunk: Chunk) -> None:
        wanted = self.frames - chunk.start
        if wanted <= 0:  # an empty slice would keep the chunk in memory
            return
        for video, frames in zip(self._videos, chunk.new, strict=True):
            video.append(frames[:wanted])

    def result(self) -> VideoResult:
        features = Features(), Features()
        for whole, parts in zip(features, self._videos, strict=True):
            video = torch.cat(parts)
            if reason := self.refuses(*video.shape[:1], *video.shape[2:]):
                raise MetricError(reason)
            with autocast_off(video.device):
                whole.add(_finite(self.name, self.network.features(video.transpose(0, 1)[None])))
        self.reset()
        return VideoResult(features={self.name: features})

    def reset(self) -> None:
        self._videos: tuple[list[Tensor], list[Tensor]] = ([], [])

    def settings(self) -> dict[str, Any]:
        return {"frames": self.frames}


def _finite(name: str, features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise MetricError(f"{name}: a feature is not finite")
    return features

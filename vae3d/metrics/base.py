"""Metrics on pairs of videos, fed chunk by chunk."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from vae3d.errors import UserError


class MetricError(UserError):
    """A metric that cannot be computed on this input; the message says why."""


class Metric(Protocol):
    """Scores one video after another, each in as many `update`s as its reader likes.

    name: as users ask for it. higher_is_better: which way to sort. needs_weights: it has a static method
    find_weights, which tells where its pretrained network is.
    """

    name: str
    higher_is_better: bool
    needs_weights: bool

    def update(self, ref: Tensor, rec: Tensor) -> None:
        """Add the next frames of both videos, [T, 3, H, W] float in [0, 1]."""

    def result(self) -> list[float]:
        """Score of every frame of the video, in order; the next `update` begins another video.

        Raises MetricError if a score is not finite.
        """

    def reset(self) -> None:
        """Forget a video that could not be read to its end."""


class FrameMetric:
    """A metric that scores every frame by itself. Subclasses define `name`, `higher_is_better` and `score`."""

    name: str
    higher_is_better: bool
    needs_weights = False

    def __init__(self) -> None:
        self._scores: list[float] = []

    def score(self, ref: Tensor, rec: Tensor) -> Tensor:
        """[T] scores of [T, 3, H, W] frames."""
        raise AssertionError("defined by subclasses")

    def update(self, ref: Tensor, rec: Tensor) -> None:
        if ref.shape != rec.shape:
            raise MetricError(f"the videos differ in shape: {list(ref.shape)} and {list(rec.shape)}")
        self._scores += self.score(ref, rec).tolist()

    def result(self) -> list[float]:
        scores = self._scores
        self.reset()
        for frame, score in enumerate(scores):
            if not math.isfinite(score):
                raise MetricError(f"{self.name} of frame {frame} is {score}")
        return scores

    def reset(self) -> None:
        self._scores = []

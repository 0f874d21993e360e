"""Statistics of latents in fp64, accumulated clip by clip and merged over shards and ranks.

Any sharding gives the result of a single pass, up to rounding. Percentiles are those of the values rounded to fp16,
which are all counted: the relative error is at most 2^-11.

A diffusion model sees samples. Their variance is the variance of the posterior means plus the mean posterior variance
(law of total variance); the summary has both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.running_stats import RunningStats

LEVELS = 2**16  # number of fp16 values
PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)


class StatisticsError(UserError):
    """Latents without statistics: none, or not finite."""

    on_every_rank = False


class ChannelMoments(RunningStats):
    """Moments of latent positions per channel: RunningStats of the posterior means, sums of the third and fourth powers
    of the centred means, and `variance_sum`, the sum of the posterior variances; [C] each, fp64."""

    FIELDS = ("count", "mean", "scatter", "third", "fourth", "variance_sum")

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        super().__init__(channels, device)
        self.third, self.fourth, self.variance_sum = torch.zeros(3, channels, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, rows: Tensor, variances: Tensor) -> ChannelMoments:
        """Moments of [n, C] posterior means and their variances."""
        moments = super().of(rows)
        centred = rows - moments.mean
        square = centred.square()
        moments.third, moments.fourth = (square * centred).sum(0), square.square().sum(0)
        moments.variance_sum = variances.sum(0)
        return moments

    def merge(self, other: ChannelMoments) -> None:
        """Add the positions of `other`; third and fourth moments by Pébay, SAND2008-6212."""
        if not other.count:
            return
        a, b = self.count, other.count
        n = a + b
        gap = other.mean - self.mean
        second_a, second_b = self.scatter.diagonal(), other.scatter.diagonal()
        fourth = self.fourth + other.fourth + gap**4 * (a * b * (a * a - a * b + b * b) / n**3)
        fourth = fourth + 6 * gap**2 * (a * a * second_b + b * b * second_a) / n**2
        self.fourth = fourth + 4 * gap * (a * other.third - b * self.third) / n
        third = self.third + other.third + gap**3 * (a * b * (a - b) / n**2)
        self.third = third + 3 * gap * (a * second_b - b * second_a) / n
        self.variance_sum = self.variance_sum + other.variance_sum
        super().merge(other)

    def summary(self) -> dict[str, Any]:
        """count, and per channel: mean, std (of samples), std_of_mean, posterior_std (root mean square)."""
        within, between = self.variance_sum / self.count, self.variance
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "std": (within + between).sqrt().tolist(),
            "std_of_mean": between.sqrt().tolist(),
            "posterior_std": within.sqrt().tolist(),
        }


class LatentStatistics:
    """Statistics of raw latents: moments of first and other latent frames, and a histogram of fp16 values, [C, 2^16].

    In causal video autoencoders the first latent frame stands for a single video frame."""

    def __init__(self, channels: int, clips: int = 0) -> None:
        self.channels, self.clips = channels, clips
        self.first, self.rest = ChannelMoments(channels), ChannelMoments(channels)
        self.histogram = torch.zeros(channels, LEVELS, dtype=torch.int64)

    def update(self, mean: Tensor, std: Tensor | None = None) -> None:
        """Add a clip: posterior means, or samples, and posterior standard deviations, [C, t, h, w] each.

        Raises StatisticsError for values that are not finite in fp16.
        """
        values = mean.to("cpu", torch.float64)
        variances = torch.zeros_like(values) if std is None else std.to("cpu", torch.float64).square()
        if not (values.abs().max() <= torch.finfo(torch.float16).max and variances.isfinite().all()):
            raise StatisticsError(
                f"latents {list(values.shape)} hold NaN or values beyond the range of fp16; check the model"
            )
        self.clips += 1
        self.first.merge(ChannelMoments.of(values[:, 0].flatten(1).T, variances[:, 0].flatten(1).T))
        if values.shape[1] > 1:
            self.rest.merge(ChannelMoments.of(values[:, 1:].flatten(1).T, variances[:, 1:].flatten(1).T))
        offsets = torch.arange(self.channels)[:, None] * LEVELS
        codes = (_rank(values.flatten(1)) + offsets).flatten()
        self.histogram.view(-1).index_add_(0, codes, torch.ones_like(codes))

    def merge(self, other: LatentStatistics) -> None:
        """Add the clips of `other`, which has as many channels."""
        self.clips += other.clips
        self.first.merge(other.first)
        self.rest.merge(other.rest)
        self.histogram += other.histogram

    def percentile(self, percent: float) -> list[float]:
        """Percentile of each channel (numpy's method inverted_cdf)."""
        below = self.histogram.cumsum(1)
        wanted = (below[:, -1:].double() * percent / 100).ceil().clamp(min=1).long()
        return _value(torch.searchsorted(below, wanted)).flatten().tolist()

    def summary(self) -> dict[str, Any]:
        """The content of statistics.json. Standard deviations are of the population (divided by count).

        shift, scale: mean and standard deviation over all channels, for models with one number; scaling_factor = 1 /
        scale. covariance_eigenvalues: of the channels' posterior means, descending. participation_ratio: (sum)^2 / sum
        of squares of the eigenvalues, the effective number of independent channels. kurtosis: 3 for a Gaussian.
        Raises StatisticsError without a clip.
        """
        if not self.clips:
            raise StatisticsError("no clip was added")
        whole = ChannelMoments(self.channels)
        whole.merge(self.first)
        whole.merge(self.rest)
        covariance = whole.scatter / whole.count
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0)
        variance = covariance.diagonal()
        shift = whole.mean.mean()
        scale = (variance + whole.variance_sum / whole.count + (whole.mean - shift).square()).mean().sqrt()
        varies, undefined = variance > 0, torch.full_like(variance, math.nan)
        return {
            "clips": self.clips,
            **whole.summary(),
            "shift": float(shift),
            "scale": float(scale),
            "scaling_factor": float(1 / scale) if scale else None,
            "first_frame": self.first.summary(),
            "other_frames": self.rest.summary() if self.rest.count else None,
            "percentiles": {f"{percent:g}": self.percentile(percent) for percent in PERCENTILES},
            "kurtosis": finite(torch.where(varies, whole.fourth / whole.count / variance.square(), undefined)),
            "skewness": finite(torch.where(varies, whole.third / whole.count / variance**1.5, undefined)),
            "covariance_eigenvalues": eigenvalues.tolist(),
            "participation_ratio": float(eigenvalues.sum().square() / eigenvalues.square().sum())
            if varies.any()
            else None,
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors for a safetensors file, the histogram as its nonzero counts."""
        level = self.histogram.flatten().nonzero().flatten()
        tensors = {"clips": torch.tensor(self.clips), "level": level, "occurs": self.histogram.flatten()[level]}
        for part in ("first", "rest"):
            moments = getattr(self, part)
            tensors |= {f"{part}.{name}": torch.as_tensor(getattr(moments, name)).clone() for name in moments.FIELDS}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LatentStatistics:
        """The inverse of to_tensors. Raises KeyError, IndexError, RuntimeError or TypeError for other tensors."""
        statistics = cls(len(tensors["first.mean"]), int(tensors["clips"]))
        statistics.histogram.view(-1)[tensors["level"]] = tensors["occurs"]
        for part in ("first", "rest"):
            moments = getattr(statistics, part)
            for name in moments.FIELDS:
                setattr(moments, name, tensors[f"{part}.{name}"])
            moments.count = int(moments.count)
        return statistics


def _rank(values: Tensor) -> Tensor:
    """Round to fp16, and return the ranks among all fp16 values in ascending order; -0 counts as 0."""
    bits = (values.half() + 0.0).view(torch.int16).long()
    return torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + LEVELS // 2


def _value(rank: Tensor) -> Tensor:
    """fp16 values of ranks; inverse of _rank."""
    bits = rank - LEVELS // 2
    signed = torch.where(bits < 0, (-1 - bits) - 0x8000, bits)
    return signed.to(torch.int16).view(torch.float16).double()


def finite(values: Tensor) -> list[float | None]:
    """As a list, with None for NaN and infinity, which JSON does not have."""
    return [value if math.isfinite(value) else None for value in values.tolist()]

"""Fréchet distance between Gaussians fitted to two sets of features (Heusel et al., arXiv 1706.08500): FID, FVD.

|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) with unbiased covariances, in fp64. With S1 = A A^T and S2 = B B^T, the trace
of (S1 S2)^1/2 is the sum of the singular values of A^T B. This form keeps the small distances of good reconstructions
exact: square roots of computed eigenvalues, as other implementations sum them, each have an error of up to 1e-8 of the
largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae3d.metrics.base import MetricError
from vae3d.running_stats import RunningStats


class Moments(RunningStats):
    """Mean and covariance of feature vectors, gathered on the CPU."""

    def update(self, features: Tensor) -> None:
        """Add the rows of [n, d]. Raises MetricError for another width and for values that are not finite."""
        super().update(_rows(features))

    def merge(self, other: RunningStats) -> None:
        """Add the vectors of `other`. Raises MetricError for another width."""
        if self.count and other.count:
            _same_width(len(self.mean), len(other.mean))
        super().merge(other)

    def cov(self) -> Tensor:
        """[d, d] unbiased covariance. Raises MetricError for fewer than two vectors."""
        if self.count < 2:
            raise MetricError(
                f"a Fréchet distance needs at least 2 feature vectors on each side; there are {self.count}"
            )
        return self.scatter / (self.count - 1)


def frechet(m1: Moments, m2: Moments) -> float:
    """Distance between the Gaussians of two `Moments`.

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


def _rows(features: Tensor) -> Tensor:
    """[n, d] in fp64 on the CPU."""
    if features.ndim != 2:
        raise MetricError(f"features must be [n, d]; got {list(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise MetricError(f"{bad} of {len(features)} feature vectors are not finite")
    return features


def _same_width(a: int, b: int) -> None:
    if a != b:
        raise MetricError(f"features of different width: {a} and {b}")

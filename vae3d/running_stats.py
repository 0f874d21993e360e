"""Mean, variance and covariance of vectors that arrive in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vae3d import distributed

if TYPE_CHECKING:
    from typing_extensions import Self


class RunningStats:
    """Count, mean [d] and scatter [d, d] of vectors, in fp64; scatter is the sum of outer products of centred vectors.

    Chunks, shards and ranks are merged pairwise (Chan, Golub and LeVeque, 1979): any partition gives the result of a
    single pass, up to rounding.
    """

    def __init__(self, dim: int = 0, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    @torch.no_grad()
    def of(cls, rows: Tensor) -> Self:
        """Statistics of the rows of [n, d], on their device."""
        rows = rows.double()
        stats = cls(rows.shape[1], rows.device)
        stats.count, stats.mean = len(rows), rows.mean(0)
        centred = rows - stats.mean
        stats.scatter = centred.T @ centred
        return stats

    def update(self, rows: Tensor) -> None:
        """Add the rows of [n, d]."""
        if len(rows):
            self.merge(self.of(rows))

    def update_channels(self, z: Tensor) -> None:
        """Add the channel vectors of [B, C, ...]."""
        self.update(z.transpose(0, 1).flatten(1).T)

    def merge(self, other: Self) -> None:
        """Add the vectors of `other`."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return
        total = self.count + other.count
        gap = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self.count = total

    def all_reduce(self) -> None:
        """Merge the statistics of all ranks. Every rank must call it; all need the same `dim` from the start."""
        if not distributed.is_distributed():
            return
        sums = torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean])
        distributed.all_reduce_sum(sums)
        total, mean = round(float(sums[0])), sums[1:] / sums[0].clamp(min=1)
        gap = self.mean - mean
        scatter = self.scatter + torch.outer(gap, gap) * self.count
        distributed.all_reduce_sum(scatter)
        self.count, self.mean, self.scatter = total, mean, scatter

    @property
    def variance(self) -> Tensor:
        """[d], of the population (divided by count)."""
        return self.scatter.diagonal() / self.count

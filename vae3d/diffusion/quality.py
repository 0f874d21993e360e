"""Distance between two sets of latents."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 512, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of [N, ...] and [M, ...], in their unit (arXiv 1804.01947).

    sqrt(mean over directions u of W2^2 of the samples projected on u), in fp64. Directions are uniform on the sphere,
    drawn on the CPU from the seed. In one dimension W2 is exact, also for sets of different size.
    Two sets of one distribution have about 1 / sqrt(N), not 0: compare with the distance of two halves of the data.
    Raises ValueError for samples of different shapes, empty sets and values that are not finite.
    """
    if a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"samples have shapes {tuple(a.shape)} and {tuple(b.shape)}; use two sets of the same shape")
    a, b = (x.detach().flatten(1).double() for x in (a, b))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("samples hold values that are not finite; drop those samples")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64).to(a.device)
    directions /= directions.norm(dim=0)
    on_a, on_b = (a @ directions).sort(0).values, (b.to(a.device) @ directions).sort(0).values
    # Both quantile functions are constant between these edges, in units of 1 / (N M).
    n, m = len(a), len(b)
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(a.device)
    shares = edges.diff().double() / (n * m)
    gaps = on_a[edges[:-1] // m] - on_b[edges[:-1] // n]
    return float((shares[:, None] * gaps.square()).sum(0).mean().sqrt())

"""How far one set of latents is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 512, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of [N, ...] and [M, ...], in their own unit: of normalised latents, their standard
    deviation (Rabin et al., 2011; Kolouri et al., arXiv 1804.01947).

    sqrt(mean over directions u of W2^2 of the samples projected on u), the directions uniform on the sphere and drawn
    on the CPU from the seed; in one dimension W2 is exact, also of sets of unlike size. In fp64.
    Two sets of the same distribution are not at 0 but at about 1 / sqrt(N): compare with two halves of the data.
    Raises ValueError for samples of unlike shape, empty sets and values that are not finite.
    """
    if a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"samples have shapes {tuple(a.shape)} and {tuple(b.shape)}; give two sets of the same kind")
    a, b = (x.detach().flatten(1).double() for x in (a, b))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("samples hold values that are not finite; leave those samples out, or count them")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64).to(a.device)
    directions /= directions.norm(dim=0)
    on_a, on_b = (a @ directions).sort(0).values, (b.to(a.device) @ directions).sort(0).values
    # Both quantile functions are constant between these shares of the samples, in units of 1 / (N M).
    n, m = len(a), len(b)
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(a.device)
    shares = edges.diff().double() / (n * m)
    gaps = on_a[edges[:-1] // m] - on_b[edges[:-1] // n]
    return float((shares[:, None] * gaps.square()).sum(0).mean().sqrt())

"""Quality of samples: their distance to latents of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.latents.cache import LatentCache


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 512) -> float:
    """Sliced 2-Wasserstein distance of [N, ...] and [M, ...], in their unit (arXiv 1804.01947).

    sqrt(mean over directions u of W2^2 of the samples projected on u), in fp64. Directions are uniform on the sphere,
    drawn on the CPU, and always the same. In one dimension W2 is exact, also for sets of different size.
    Two sets of one distribution have about 1 / sqrt(N), not 0: compare with the distance of two halves of the data.
    Raises ValueError for samples of different shapes, empty sets and values that are not finite.
    """
    if a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"samples have shapes {tuple(a.shape)} and {tuple(b.shape)}; use two sets of the same shape")
    a, b = (x.detach().flatten(1).double() for x in (a, b))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("samples hold values that are not finite; drop those samples")
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64).to(a.device)
    directions /= directions.norm(dim=0)
    on_a, on_b = (a @ directions).sort(0).values, (b.to(a.device) @ directions).sort(0).values
    # Both quantile functions are constant between these edges, in units of 1 / (N M).
    n, m = len(a), len(b)
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(a.device)
    shares = edges.diff().double() / (n * m)
    gaps = on_a[edges[:-1] // m] - on_b[edges[:-1] // n]
    return float((shares[:, None] * gaps.square()).sum(0).mean().sqrt())


def draw_reference_sets(
    cache: LatentCache, count: int, classes: Sequence[str] | None = None, entries: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Draw two disjoint sets of `count` indices into the cache, always the same.

    classes: the class of each index; None: any. entries: indices to draw from, such as those of one size; None: all.
    Raises UserError if they are too few.
    """
    wanted: list[str | None] = [None] * count if classes is None else list(classes)
    pools: dict[str | None, list[int]] = {name: [] for name in wanted}
    every = range(len(cache)) if entries is None else entries
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    labels = cache.index["label"].tolist()
    for place in order.tolist():
        index = int(every[place])
        pools.get(None if classes is None else labels[index], []).append(index)
    for name, pool in pools.items():
        needed = 2 * wanted.count(name)
        of_size = "" if len(every) == len(cache) else " of this size"
        if len(pool) < needed:
            of_class = "" if name is None else f" of class {name}"
            raise UserError(
                f"{cache.name} has {len(pool)} latents{of_class}{of_size}; two sets of {needed // 2} need {needed}: "
                "use a smaller count, or a larger cache"
            )
    first, second = ([pools[name].pop() for name in wanted] for _ in range(2))
    return first, second


def distances(samples: Tensor, data: Tensor, other: Tensor) -> dict[str, float]:
    """Sliced Wasserstein distances of `samples` to `data`, in standard deviations, with two references: `other` latents
    of the data, the best that can be expected, and noise, where sampling starts.

    All are normalised latents [N, C, t, h, w]. Raises ValueError as sliced_wasserstein does.
    """
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    sets = {"samples": samples, "other latents": other, "noise": noise}
    return {name: sliced_wasserstein(z.cpu(), data.cpu()) for name, z in sets.items()}

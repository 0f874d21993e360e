"""Distances of samples to latents of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vae3d.diffusion.quality import sliced_wasserstein
from vae3d.errors import UserError
from vae3d.latents.cache import LatentCache


def draw_reference_sets(
    cache: LatentCache, count: int, classes: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Draw two disjoint sets of `count` indices into the cache, always the same.

    classes: the class of each index; None: any. Raises UserError if the cache has too few latents.
    """
    wanted: list[str | None] = [None] * count if classes is None else list(classes)
    pools: dict[str | None, list[int]] = {name: [] for name in wanted}
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0))
    labels = cache.index["label"].tolist()
    for index in order.tolist():
        pools.get(None if classes is None else labels[index], []).append(index)
    for name, pool in pools.items():
        needed = 2 * wanted.count(name)
        if len(pool) < needed:
            of_class = "" if name is None else f" of class {name}"
            raise UserError(
                f"{cache.folder} has {len(pool)} latents{of_class}; two sets of {needed // 2} need {needed}: use a "
                "smaller count, or a larger cache"
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

"""Samples beside latents of the data: what they should look like, and how far off they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vae3d.diffusion.quality import sliced_wasserstein
from vae3d.errors import UserError
from vae3d.latents.cache import LatentCache


def matched(cache: LatentCache, count: int, classes: Sequence[str] | None = None) -> tuple[list[int], list[int]]:
    """Two sets of `count` places in the cache without a common one, drawn once and for all.

    classes: of each place's entry; None: of any. Raises UserError for a cache that has too few.
    """
    wanted: list[str | None] = [None] * count if classes is None else list(classes)
    pools: dict[str | None, list[int]] = {name: [] for name in wanted}
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0))
    names = cache.index["label"].tolist()
    for place in order.tolist():
        pools.get(None if classes is None else names[place], []).append(place)
    for name, pool in pools.items():
        needed = 2 * wanted.count(name)
        if len(pool) < needed:
            of_class = "" if name is None else f" of class {name}"
            raise UserError(
                f"{cache.folder} has {len(pool)} latents{of_class}; two sets of {needed // 2} take {needed}: give a "
                "smaller count, or a larger cache"
            )
    first, second = ([pools[name].pop() for name in wanted] for _ in range(2))
    return first, second


def distances(samples: Tensor, data: Tensor, other: Tensor) -> dict[str, float]:
    """Sliced Wasserstein distances to `data`, normalised latents [N, C, t, h, w], in their standard deviations: of
    `samples`; of `other` latents of the data, below which no samples can be expected; of noise, where sampling begins.

    Raises ValueError as sliced_wasserstein does.
    """
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    sets = {"samples": samples, "other latents": other, "noise": noise}
    return {name: sliced_wasserstein(z.cpu(), data.cpu()) for name, z in sets.items()}

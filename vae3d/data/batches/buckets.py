"""Buckets: shapes of clips of about equal cost per step. All clips of a step have the shape of one bucket.

A bucket says how many frames its clips have, at which size, and how many of them make a step. Sizes keep the aspect
ratios of the files, so that little is cropped, and larger clips come in smaller batches, so that steps cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import numpy as np

from vae3d.data.batches.aspects import AUTO, MAX_ASPECT, parse_aspect
from vae3d.data.media import Size

MAX_SIZES = 12  # chosen for the data's aspect ratios
ENOUGH = 0.95  # share of its pixels that every file should keep
MIN_GAIN = 0.002  # of all pixels, for which one more size is worth it
MAX_AREA = 0.05  # relative difference between the area of a size and that asked for
EVEN = 0.1  # by how much the cost of a step may differ from the mean
SAME_ASPECT = 0.03  # relative difference of aspect ratios that comes from rounding sides to multiples
OTHER_AREA = 1.2  # from which on two sizes of one aspect ratio are two resolutions


class Spec(Protocol):
    """The settings of data.buckets, as config.schema.Buckets has them."""

    shapes: Sequence[Bucket] | None
    aspects: Sequence[str]
    frames: Sequence[int] | None
    multiple: int


@dataclass(frozen=True)
class Bucket:
    """Clips of `frames` frames of height x width.

    batch_size: clips per step over all ranks. weight: of its steps among those of all buckets. cost: of one clip;
    None: its number of pixels. 0 and None: still to be filled in, see with_batches and with_weights.
    """

    frames: int
    height: int
    width: int
    batch_size: int | None = None
    weight: float | Fraction | None = None
    cost: float | None = None

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def clip_cost(self) -> float:
        return self.frames * self.height * self.width if self.cost is None else self.cost

    @property
    def step_cost(self) -> float:
        """Of all clips of a step."""
        return self.batch_size * self.clip_cost


# ---- which shapes there are


def buckets_of(
    spec: Spec, frames: Sequence[int], size: Size, heights: np.ndarray | None = None, widths: np.ndarray | None = None
) -> list[Bucket]:
    """The buckets of data.buckets: listed ones, or every size with every frame count.

    frames: counts where spec.frames is null. size: height and width whose area all sizes have. heights, widths: of the
    files, for aspects=auto; None: `size` alone stands for those that are not known yet.
    """
    if spec.shapes is not None:
        return [Bucket(s.frames, s.height, s.width, s.batch_size, s.weight, s.cost) for s in spec.shapes]
    area = size[0] * size[1]
    if AUTO not in spec.aspects:
        sizes = [size_of_aspect(parse_aspect(aspect), area, spec.multiple) for aspect in spec.aspects]
    elif heights is None:
        sizes = [size_of_aspect(size[1] / size[0], area, spec.multiple)]
    else:
        sizes = sizes_for(heights, widths, area, spec.multiple)
    counts = frames if spec.frames is None else spec.frames
    return [Bucket(count, *side) for side in dict.fromkeys(sizes) for count in dict.fromkeys(counts)]


def size_of_aspect(aspect: float, area: int, multiple: int) -> Size:
    """Height and width, multiples of `multiple`, of about this aspect ratio (width over height) and area.

    Of the sides near the exact ones, those with the smallest sum of the share of pixels lost and the relative
    difference in area, which counts three times above MAX_AREA.
    """
    near = [
        [count * multiple for count in range(max(1, int(side / multiple) - 1), int(side / multiple) + 3)]
        for side in (math.sqrt(area / aspect), math.sqrt(area * aspect))
    ]

    def loss(size: Size) -> float:
        difference = abs(size[0] * size[1] / area - 1)
        return 1 - float(share_kept(aspect, size)) + difference + 2 * max(0.0, difference - MAX_AREA)

    return min(((height, width) for height in near[0] for width in near[1]), key=loss)


def sizes_for(heights: np.ndarray, widths: np.ndarray, area: int, multiple: int) -> list[Size]:
    """As few sizes of about this area as keep ENOUGH of the pixels of every file, at most MAX_SIZES.

    One after the other, that which keeps most pixels. A few odd files get no size of their own, see MIN_GAIN.
    """
    kinds, kind_of = _distinct(heights, widths)
    aspects = np.clip(kinds[:, 1] / kinds[:, 0], 1 / MAX_ASPECT, MAX_ASPECT)
    steps, step_of = np.unique(np.round(np.log(aspects) * 100), return_inverse=True)  # to one percent
    counts = np.bincount(step_of, weights=np.bincount(kind_of))
    aspects, weights = np.exp(steps / 100), counts / counts.sum()
    candidates = sorted({size_of_aspect(float(aspect), area, multiple) for aspect in aspects})
    kept = np.stack([share_kept(aspects, size) for size in candidates])  # [sizes, aspects]
    best, chosen = np.zeros(len(aspects)), []
    while len(chosen) < MAX_SIZES and best.min() < ENOUGH:
        gains = (np.maximum(kept, best) - best) @ weights
        first = int(gains.argmax())
        if chosen and gains[first] < MIN_GAIN:
            break
        chosen.append(candidates[first])
        best = np.maximum(best, kept[first])
    return sorted(chosen)


# ---- which files fit which


def share_kept(aspects: np.ndarray | float, size: Size) -> np.ndarray:
    """Share of the pixels of frames with these aspect ratios (width over height) that stay when they are resized, with
    their aspect ratio kept, and cropped to `size`."""
    aspect = size[1] / size[0]
    return np.minimum(aspects, aspect) / np.maximum(aspects, aspect)


def rows_of(
    buckets: Sequence[Bucket], heights: np.ndarray, widths: np.ndarray, lengths: np.ndarray
) -> list[np.ndarray]:
    """The rows whose clips each bucket takes, ascending. lengths: [rows] frames of the longest clip of each.

    A row goes to the size that loses fewest of its pixels, with every frame count that it has, and to the sizes of the
    same aspect ratio at another resolution; but to those that would enlarge it only if there is no other. For images (1
    frame) and for longer clips this is decided separately. A row that is too short for all buckets is in none.
    """
    found: dict[int, np.ndarray] = {}
    kinds, kind_of = _distinct(heights, widths)  # tables have millions of rows, and few sizes
    for images in (True, False):
        numbers = [i for i, bucket in enumerate(buckets) if (bucket.frames == 1) == images]
        shortest: dict[Size, int] = {}
        for i in numbers:
            size, frames = buckets[i].size, buckets[i].frames
            shortest[size] = min(frames, shortest.get(size, frames))
        fits = {size: np.zeros(len(lengths), bool) for size in shortest}
        limits = sorted(set(shortest.values()))
        for limit, next_limit in zip(limits, [*limits, math.inf][1:], strict=True):
            possible = [size for size in shortest if shortest[size] <= limit]
            enough = (lengths >= limit) & (lengths < next_limit)
            for size, takes in zip(possible, _takers(possible, kinds), strict=True):
                fits[size] |= enough & takes[kind_of]
        for i in numbers:
            found[i] = np.flatnonzero(fits[buckets[i].size] & (lengths >= buckets[i].frames)).astype(np.int32)
    return [found[i] for i in range(len(buckets))]


def _distinct(heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[kinds, 2] the distinct heights and widths, and [rows] the kind of each row."""
    import pandas as pd  # slow, and not needed to check a configuration

    codes, kinds = pd.factorize(np.asarray(heights, np.int64) << 32 | np.asarray(widths, np.int64))  # NumPy sorts
    return np.stack([kinds >> 32, kinds & 0xFFFFFFFF], 1).astype(float), codes


def _takers(sizes: Sequence[Size], kinds: np.ndarray) -> list[np.ndarray]:
    """[kinds] of each size, whether files of a height and width go to it, when these are the sizes to choose from."""
    heights, widths = kinds.T
    best = np.argmax([share_kept(widths / heights, size) for size in sizes], axis=0)
    fits = [
        np.isin(best, [n for n, other in enumerate(sizes) if size == other or _is_scaled(size, other)])
        for size in sizes
    ]
    whole = [fit & (heights >= size[0]) & (widths >= size[1]) for size, fit in zip(sizes, fits, strict=True)]
    has_whole = np.logical_or.reduce(whole)
    return [np.where(has_whole, one, fit) for one, fit in zip(whole, fits, strict=True)]


def _is_scaled(size: Size, other: Size) -> bool:
    """Whether a size has the aspect ratio of another, but for rounding, at another resolution."""
    areas = size[0] * size[1], other[0] * other[1]
    return share_kept(other[1] / other[0], size) > 1 - SAME_ASPECT and max(areas) > OTHER_AREA * min(areas)


def longest_buckets(
    buckets: Sequence[Bucket], heights: np.ndarray, widths: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """[rows] index of the bucket of rows_of with the most frames for each row, and of those the largest; -1: none."""
    chosen = np.full(len(lengths), -1)
    fitting = rows_of(buckets, heights, widths, lengths)
    for i in sorted(range(len(buckets)), key=lambda i: (buckets[i].frames, math.prod(buckets[i].size))):
        chosen[fitting[i]] = i
    return chosen


# ---- how many clips make a step, and how often it comes


def with_batches(buckets: Sequence[Bucket], reference: Bucket, divisor: int) -> list[Bucket]:
    """The buckets with the clips per step that cost about as much as reference.batch_size clips of its shape: a
    multiple of `divisor`, at least one. Given batch sizes stay.

    Given costs are in a unit of their own: that of the reference is the cost of the bucket of its shape.
    Raises ValueError if there is none.
    """
    cost = reference.clip_cost
    if any(bucket.cost is not None for bucket in buckets):
        same = [bucket.clip_cost for bucket in buckets if bucket.name == reference.name]
        if not same:
            raise ValueError(f"no cost of {reference.name}, of which data.batch_size is the number of clips")
        cost = same[0]
    target = reference.batch_size * cost
    return [b if b.batch_size else replace(b, batch_size=_clips(b.clip_cost, target, divisor)) for b in buckets]


def _clips(cost: float, target: float, divisor: int) -> int:
    few = int(target / (cost * divisor)) * divisor
    return min(max(few, divisor), few + divisor, key=lambda clips: abs(math.log(clips * cost / target)))


def with_weights(buckets: Sequence[Bucket], rows: Sequence[int]) -> list[Bucket]:
    """The buckets with the weights that draw every file of every bucket equally often: files / clips per step.
    Given weights stay. rows: number of files of each bucket."""
    return [
        bucket if bucket.weight is not None else replace(bucket, weight=Fraction(int(count), bucket.batch_size))
        for bucket, count in zip(buckets, rows, strict=True)
    ]


# ---- what is logged


def relative_costs(buckets: Sequence[Bucket], shares: Sequence[float]) -> np.ndarray:
    """Cost of a step of each bucket over the mean of all steps."""
    costs = np.array([bucket.step_cost for bucket in buckets], dtype=float)
    return costs / np.average(costs, weights=shares)


def uneven(buckets: Sequence[Bucket], shares: Sequence[float], divisor: int) -> list[str]:
    """Lines about the buckets whose steps cost more than EVEN more or less than the mean, and what to change."""
    costs = relative_costs(buckets, shares)
    off = [(b, cost) for b, cost in zip(buckets, costs, strict=True) if abs(cost - 1) > EVEN]
    if not off:
        return []
    names = ", ".join(f"{b.name} ({b.batch_size} x {b.clip_cost:.7g}: {cost:.2f})" for b, cost in off)
    return [
        f"steps of {len(off)} of {len(buckets)} buckets cost over {EVEN:.0%} more or less than the mean (clips x "
        f"cost of one: over the mean): {names}; clips per step are multiples of {divisor}: raise data.batch_size, "
        "lower the ranks or trainer.accumulate, or give other shapes"
    ]

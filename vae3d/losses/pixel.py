"""Losses on pixels, [B, 3, T, H, W] in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d import panorama
from vae3d.arguments import Range
from vae3d.losses.objective import PixelTerm
from vae3d.types import ClipBatch

ROOT_EPS = 1e-6  # inside the square root of a gradient's magnitude, for a finite derivative at 0


class L1(PixelTerm):
    """|reconstruction - clip|."""

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        return (rec - batch.video).abs()


class MSE(PixelTerm):
    """(reconstruction - clip) ** 2."""

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        return (rec - batch.video).square()


@dataclass(eq=False)
class Charbonnier(PixelTerm):
    """sqrt(e ** 2 + eps ** 2), e = reconstruction - clip: L1, smooth around 0 (LapSRN, arXiv 1710.01992, equation 4).

    As usual eps is not subtracted: a perfect reconstruction has a loss of eps, with gradient 0.
    Raises ValueError unless eps is positive.
    """

    eps: Annotated[float, Range(1e-30, 1e30)] = 1e-3

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        return ((rec - batch.video).square() + self.eps**2).sqrt()


@dataclass(kw_only=True, eq=False)
class Sobel(PixelTerm):
    """(|Gx * e| + |Gy * e|) / 2 per channel, where e = reconstruction - clip and Gx, Gy are Sobel's kernels.

    normalize: divide the kernels by 8, so that a ramp of one level per pixel gives 1. White noise then gives 0.43 times
    its L1, else 3.5 times. wrap: pad columns across a panorama's seam; rows, and columns otherwise, are replicated.
    magnitude: |m(reconstruction) - m(clip)| instead, where m = sqrt(gx^2 + gy^2 + 1e-6), which ignores the sign of an
    edge (Wan-Alpha `train_vae.py`).
    Windows with an invalid pixel do not count.
    """

    normalize: bool = True
    wrap: bool = False
    magnitude: bool = False

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        if self.magnitude:
            edges = (self._magnitude(rec) - self._magnitude(batch.video)).abs()
        else:
            gx, gy = self._gradient(rec - batch.video)
            edges = (gx.abs() + gy.abs()) / 2
        if batch.valid is not None:
            invalid = F.max_pool3d(self._pad((~batch.valid).float()), (1, 3, 3), stride=1)
            edges = edges * _renormalised(1 - invalid, batch)
        return edges

    def _gradient(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = self._pad(frames) / (8 if self.normalize else 1)
        rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
        columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
        return rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]

    def _magnitude(self, frames: Tensor) -> Tensor:
        gx, gy = self._gradient(frames)
        return (gx.square() + gy.square() + ROOT_EPS).sqrt()

    def _pad(self, frames: Tensor) -> Tensor:
        frames = torch.cat([frames[..., :1, :], frames, frames[..., -1:, :]], -2)
        if self.wrap:
            return panorama.wrap(frames, 1)
        return torch.cat([frames[..., :1], frames, frames[..., -1:]], -1)


@dataclass(kw_only=True, eq=False)
class Wavelet(PixelTerm):
    """|Haar coefficients of the error|, all bands of `levels` levels alike: LTX-Video's DWT loss (arXiv 2501.00103).

    The transform is linear, so the error is transformed instead of both videos, and orthonormal: white noise gives its
    L1, and a constant error 2 ** -levels of it, so fine detail counts more. temporal: transform time as well; a
    constant error then gives 8 ** (-levels / 2) of its L1.
    A coefficient stands at the first pixel of its block and takes the clip's weight there. For odd lengths the last
    pixel or frame is paired with itself; a length of 1 is not transformed, so images give the same with `temporal`.
    Blocks with an invalid pixel do not count.
    Raises ValueError unless levels is 1 to 16.
    """

    levels: Annotated[int, Range(1, 16)] = 2
    temporal: bool = False

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        axes = (2, 3, 4) if self.temporal else (3, 4)
        bands = pyramid(rec - batch.video, self.levels, axes, haar).abs()
        if batch.valid is not None:
            invalid = pyramid((~batch.valid).float(), self.levels, axes, lambda a, b: (a + b, a + b))
            bands = bands * _renormalised((invalid == 0).float(), batch)
        return bands


PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def haar(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal average and difference of neighbours."""
    return (first + second) * 0.5**0.5, (first - second) * 0.5**0.5


def pyramid(x: Tensor, levels: int, axes: Sequence[int], transform: PairTransform) -> Tensor:
    """Transform pairs of neighbours along `axes`, then recursively the first element of each block; same shape.

    With `haar` the result is the interleaved wavelet coefficients.
    """
    if levels == 0:
        return x
    for axis in axes:
        x = _transform_pairs(x, axis, transform)
    firsts = tuple(slice(None, None, 2 if axis in axes else 1) for axis in range(x.ndim))
    coarser = pyramid(x[firsts], levels - 1, axes, transform)
    x = x.clone()
    x[firsts] = coarser
    return x


def _transform_pairs(x: Tensor, axis: int, transform: PairTransform) -> Tensor:
    size = x.shape[axis]
    if size == 1:
        return x
    last = x.narrow(axis, size - 1, size % 2)
    first, second = torch.cat([x, last], axis).unflatten(axis, (-1, 2)).unbind(axis + 1)
    return torch.stack(transform(first, second), axis + 1).flatten(axis, axis + 1).narrow(axis, 0, size)


def _renormalised(mask: Tensor, batch: ClipBatch) -> Tensor:
    """mask [B, 1, T, H, W] of 0 and 1, scaled so that mask * batch.weight has mean 1 per clip."""
    weight = mask if batch.weight is None else mask * batch.weight
    mean = weight.mean((1, 2, 3, 4), keepdim=True)
    return mask / torch.where(mean > 0, mean, 1.0)

"""Losses on pixels, [B, 3, T, H, W] in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d import panorama
from vae3d.losses.objective import Error, numel_per_frame, require_pixels
from vae3d.types import Clip, Reconstruction

ROOT_EPS = 1e-6  # under the root of a gradient's magnitude, whose derivative at 0 is then 0


class L1:
    """|reconstruction - clip|."""

    needs_pixels = True

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        return Error((require_pixels(out) - clip.video).abs(), numel_per_frame(clip.video))


class MSE:
    """(reconstruction - clip) ** 2."""

    needs_pixels = True

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        return Error((require_pixels(out) - clip.video).square(), numel_per_frame(clip.video))


class Charbonnier:
    """sqrt(e ** 2 + eps ** 2), e = reconstruction - clip: L1 that is smooth around 0 (LapSRN, arXiv 1710.01992, eq. 4).

    eps is not subtracted, as it is nowhere: a perfect reconstruction has a loss of eps, and no gradient.
    Raises ValueError unless eps is positive.
    """

    needs_pixels = True

    def __init__(self, eps: float = 1e-3) -> None:
        if eps <= 0:
            raise ValueError(f"eps is {eps}; use a positive number, or L1")
        self.eps = eps

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        error = require_pixels(out) - clip.video
        return Error((error.square() + self.eps**2).sqrt(), numel_per_frame(clip.video))


class Sobel:
    """Edges that were lost or added: (|Gx * e| + |Gy * e|) / 2 of every channel, where e = reconstruction - clip and
    Gx, Gy are Sobel's kernels.

    normalize: divide the kernels by 8, so that a ramp of one level per pixel gives 1; without it, white noise weighs
    3.5 times what it does in L1, with it 0.43 times. wrap: columns go on across a panorama's seam; rows, and columns
    otherwise, repeat at the border. magnitude: |m(reconstruction) - m(clip)| instead, where m is
    sqrt(gx^2 + gy^2 + 1e-6), which forgives an edge of the wrong sign (Wan-Alpha `train_vae.py`).
    Windows that hold a pixel that is not valid do not count.
    """

    needs_pixels = True

    def __init__(self, *, normalize: bool = True, wrap: bool = False, magnitude: bool = False) -> None:
        self.normalize, self.wrap, self.magnitude = normalize, wrap, magnitude

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        rec = require_pixels(out)
        if self.magnitude:
            edges = (self._magnitude(rec) - self._magnitude(clip.video)).abs()
        else:
            gx, gy = self._gradient(rec - clip.video)
            edges = (gx.abs() + gy.abs()) / 2
        if clip.valid is not None:
            touched = F.max_pool3d(self._pad((~clip.valid).float()), (1, 3, 3), stride=1)
            edges = edges * _counted(1 - touched, clip)
        return Error(edges, numel_per_frame(clip.video))

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


class Wavelet:
    """|Haar coefficients of the error|, all bands of `levels` levels alike: LTX-Video's DWT loss (arXiv 2501.00103),
    since the transform is linear.

    The transform is orthonormal. So white noise weighs what it does in L1, and a constant error 2 ** -levels of that:
    fine detail counts the more. temporal: transform time, too; a constant error then weighs 8 ** (-levels / 2).
    Every coefficient lies where its block of pixels begins, and the clip's weight there counts for it. Where sides, or
    clips, are of odd length, the last pixel, or frame, is its own partner; a length of 1 is left alone, so that images
    weigh the same with `temporal`. Blocks that hold a pixel that is not valid do not count.
    Raises ValueError unless levels is positive.
    """

    needs_pixels = True

    def __init__(self, *, levels: int = 2, temporal: bool = False) -> None:
        if levels < 1:
            raise ValueError(f"levels is {levels}; use at least 1")
        self.levels, self.axes = levels, (2, 3, 4) if temporal else (3, 4)

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        bands = by_levels(require_pixels(out) - clip.video, self.levels, self.axes, haar).abs()
        if clip.valid is not None:
            touched = by_levels((~clip.valid).float(), self.levels, self.axes, lambda a, b: (a + b, a + b))
            bands = bands * _counted((touched == 0).float(), clip)
        return Error(bands, numel_per_frame(clip.video))


Pairing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def haar(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average and difference of neighbours, scaled so that their squares add up to those of the neighbours."""
    return (first + second) * 0.5**0.5, (first - second) * 0.5**0.5


def by_levels(x: Tensor, levels: int, axes: Sequence[int], pairing: Pairing) -> Tensor:
    """x with all neighbours along `axes` replaced by what `pairing` makes of them, then once more what comes first of
    each block, and so on; the shape stays. With `haar` these are the wavelet coefficients, interleaved."""
    if levels == 0:
        return x
    for axis in axes:
        x = _paired(x, axis, pairing)
    firsts = tuple(slice(None, None, 2 if axis in axes else 1) for axis in range(x.ndim))
    coarser = by_levels(x[firsts], levels - 1, axes, pairing)
    x = x.clone()
    x[firsts] = coarser
    return x


def _paired(x: Tensor, axis: int, pairing: Pairing) -> Tensor:
    size = x.shape[axis]
    if size == 1:
        return x
    lone = x.narrow(axis, size - 1, size % 2)
    first, second = torch.cat([x, lone], axis).unflatten(axis, (-1, 2)).unbind(axis + 1)
    return torch.stack(pairing(first, second), axis + 1).flatten(axis, axis + 1).narrow(axis, 0, size)


def _counted(inside: Tensor, clip: Clip) -> Tensor:
    """[B, 1, T, H, W]: `inside`, 1 where a pixel counts and 0 elsewhere, raised so that together with the clip's weight
    it has mean 1 again."""
    counted = inside if clip.weight is None else inside * clip.weight
    share = counted.mean((1, 2, 3, 4), keepdim=True)
    return inside / torch.where(share > 0, share, 1.0)

"""Losses on pixels, [B, 3, T, H, W] in [-1, 1]."""

from __future__ import annotations

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
            edges = edges * self._inside(clip)
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

    def _inside(self, clip: Clip) -> Tensor:
        """[B, 1, T, H, W]: 0 where a window meets a pixel that is not valid; elsewhere above 1, so that together with
        the clip's weight it has mean 1 again."""
        inside = 1 - F.max_pool3d(self._pad((~clip.valid).float()), (1, 3, 3), stride=1)
        counted = inside if clip.weight is None else inside * clip.weight
        share = counted.mean((1, 2, 3, 4), keepdim=True)
        return inside / torch.where(share > 0, share, 1.0)

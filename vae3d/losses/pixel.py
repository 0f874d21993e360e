"""Losses on pixels, [B, 3, T, H, W] in [-1, 1]."""

from __future__ import annotations

from vae3d.losses.objective import Error, numel_per_frame, require_pixels
from vae3d.types import Clip, Reconstruction


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

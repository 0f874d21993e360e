"""Consistency of a panorama model under rotation: does the seam show?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae3d.metrics.frame import PSNR_CAP
from vae3d.panorama import roll


@torch.no_grad()
def roll_consistency(model: nn.Module, video: Tensor, columns: int | None = None) -> float:
    """PSNR in dB between the reconstruction of a rolled panorama and the rolled reconstruction. 100 if MSE < 1e-10.

    A model without a seam commutes with rolling, so the two are equal.
    model: a VideoAutoencoder in eval mode. video: [B, 3, T, H, W] in [-1, 1]. columns: shift, by default half the
    width, rounded down to a multiple of the model's stride, since strided convolutions commute with no other.
    Raises ValueError for another shift, or a width without a valid one.
    """
    width, stride = video.shape[-1], model.spec.space_stride
    if columns is None:
        columns = width // 2 // stride * stride
    if columns % width == 0 or columns % stride:
        raise ValueError(
            f"columns={columns} of {width} does not test a model of stride {stride}; "
            f"use a multiple of {stride} that is not a full turn"
        )
    rolled = model(roll(video, columns), sample=False).video
    expected = roll(model(video, sample=False).video, columns)
    # / 2: PSNR is defined on pixels in [0, 1].
    mse = ((rolled.float().clamp(-1, 1) - expected.float().clamp(-1, 1)) / 2).double().square().mean()
    return PSNR_CAP if mse < 1e-10 else float(-10 * mse.log10())

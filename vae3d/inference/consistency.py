"""Whether a model treats a panorama's seam like any other place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae3d.metrics.frame import PSNR_CAP
from vae3d.panorama import roll


@torch.no_grad()
def roll_consistency(model: nn.Module, video: Tensor, columns: int | None = None) -> float:
    """PSNR in dB between the reconstruction of turned panoramas and the turned reconstruction; 100 where the MSE is
    below 1e-10. Without seam the two are the same.

    model: a VideoAutoencoder, in eval mode. video: [B, 3, T, H, W] in [-1, 1]. columns: how far to turn, by default
    half round, down to a multiple of the model's stride: by anything else no convolution with a stride commutes.
    Raises ValueError for another multiple, or a width that has none.
    """
    width, stride = video.shape[-1], model.spec.space_stride
    if columns is None:
        columns = width // 2 // stride * stride
    if columns % width == 0 or columns % stride:
        raise ValueError(
            f"a turn by {columns} of {width} columns tells nothing about a model of stride {stride}; "
            f"turn by a multiple of {stride} that is no full turn"
        )
    turned = model(roll(video, columns), sample=False).video
    expected = roll(model(video, sample=False).video, columns)
    # Halved, because PSNR is of pixels in [0, 1].
    mse = ((turned.float().clamp(-1, 1) - expected.float().clamp(-1, 1)) / 2).double().square().mean()
    return PSNR_CAP if mse < 1e-10 else float(-10 * mse.log10())

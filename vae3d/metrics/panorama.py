"""Metrics of equirectangular panoramas (ERP): rows weighted by the area that they cover on the sphere, and the seam
where the left edge meets the right one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.metrics.base import Chunk, SeriesMetric
from vae3d.metrics.frame import PSNR_CAP
from vae3d.metrics.ssim import ssim_map
from vae3d.precision import full_precision

SEAM = 16  # columns at either side of the seam


def latitude_weights(height: int, device: torch.device) -> Tensor:
    """[H] cosines of the rows' latitudes: w_j = cos((j + 0.5 - H/2) pi / H) (Sun et al. 2017)."""
    rows = torch.arange(height, dtype=torch.float64, device=device)
    return torch.cos((rows + 0.5 - height / 2) * math.pi / height)


class WsPsnr(SeriesMetric):
    """PSNR in dB of each frame, rows weighted by the cosine of latitude; 100 where the weighted MSE is below 1e-10
    (Sun et al. 2017; V-Sense/360SR `ws_psnr.py`)."""

    name = "ws_psnr"
    columns = {"ws_psnr": True}

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new
        weights = latitude_weights(ref.shape[-2], ref.device)
        rows = (ref.double() - rec.double()).square().mean((1, 3))
        mse = rows @ weights / weights.sum()
        return {"ws_psnr": torch.where(mse < 1e-10, PSNR_CAP, -10 * mse.clamp_min(1e-10).log10())}


class WsSsim(SeriesMetric):
    """SSIM of each frame, every window weighted by the latitude of its centre (Zhou et al. 2018); windows run across
    the seam."""

    name = "ws_ssim"
    columns = {"ws_ssim": True}
    min_size = 11

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        with full_precision(chunk.ref.device):
            ref, rec = (F.pad(frames, (5, 5, 0, 0), "circular") for frames in chunk.new)
            rows = ssim_map(ref, rec).mean((1, 3))
        weights = latitude_weights(ref.shape[-2], ref.device)[5:-5]
        return {"ws_ssim": rows @ weights / weights.sum()}


class Seam(SeriesMetric):
    """What goes wrong at the seam of a panorama.

    seam_gradient: mean |(y_0 - y_W-1) - (x_0 - x_W-1)| of the columns at either side of it, in [0, 1] units: an edge
    that was added or lost. seam_ratio: MSE of the 16 columns at either side over the MSE of the rest; 1 is ideal.
    """

    name = "seam"
    columns = {"seam_gradient": False, "seam_ratio": False}
    min_size = 2 * SEAM + 1

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (frames.double() for frames in chunk.new)
        error = rec - ref
        columns = error.square().mean((1, 2))
        band = torch.cat([columns[:, :SEAM], columns[:, -SEAM:]], 1).mean(1)
        rest = columns[:, SEAM:-SEAM].mean(1)
        tiny = 1e-10  # so that equal frames have a ratio of 1
        return {
            "seam_gradient": (error[..., 0] - error[..., -1]).abs().mean((1, 2)),
            "seam_ratio": (band + tiny) / (rest + tiny),
        }

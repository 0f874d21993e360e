"""Metrics of equirectangular panoramas (ERP): rows weighted by the area that they cover on the sphere, the seam where
the left edge meets the right one, the poles, and the views that a viewer sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.metrics.base import Chunk, Nearest, SeriesMetric
from vae3d.metrics.frame import PSNR_CAP
from vae3d.metrics.networks import Networks, batch_frames
from vae3d.metrics.ssim import ssim_map
from vae3d.panorama import DOWN, SIDES, UP, cube_faces, latitude_weights
from vae3d.precision import autocast_off

SEAM = 16  # columns at either side of the seam, at most an eighth of all
BANDS = ("n60_90", "n30_60", "n0_30", "s0_30", "s30_60", "s60_90")  # of latitude in degrees, from the top row down


def decibel(mse: Tensor) -> Tensor:
    """PSNR of pixels in [0, 1]; 100 where the MSE is below 1e-10."""
    return torch.where(mse < 1e-10, PSNR_CAP, -10 * mse.clamp_min(1e-10).log10())


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
        return {"ws_psnr": decibel(mse)}


class WsSsim(SeriesMetric):
    """SSIM of each frame, every window weighted by the latitude of its centre (Zhou et al. 2018); windows run across
    the seam."""

    name = "ws_ssim"
    columns = {"ws_ssim": True}
    min_size = 11

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        with autocast_off(chunk.ref.device):
            ref, rec = (F.pad(frames, (5, 5, 0, 0), "circular") for frames in chunk.new)
            rows = ssim_map(ref, rec).mean((1, 3))
        weights = latitude_weights(ref.shape[-2], ref.device)[5:-5]
        return {"ws_ssim": rows @ weights / weights.sum()}


class Seam(SeriesMetric):
    """What goes wrong at the seam of a panorama.

    seam_gradient: mean |(y_0 - y_W-1) - (x_0 - x_W-1)| of the columns at either side of it, in [0, 1] units: an edge
    that was added or lost. seam_ratio: MSE of the 16 columns at either side (an eighth of frames narrower than 128)
    over the MSE of the rest; best at 1: above it the seam is worse than the rest, below it the rest.
    """

    name = "seam"
    columns = {"seam_gradient": False, "seam_ratio": Nearest(1.0)}
    min_size = 8

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (frames.double() for frames in chunk.new)
        error = rec - ref
        columns = error.square().mean((1, 2))
        near = min(SEAM, columns.shape[1] // 8)
        band = torch.cat([columns[:, :near], columns[:, -near:]], 1).mean(1)
        rest = columns[:, near:-near].mean(1)
        tiny = 1e-10  # so that equal frames have a ratio of 1
        return {
            "seam_gradient": (error[..., 0] - error[..., -1]).abs().mean((1, 2)),
            "seam_ratio": (band + tiny) / (rest + tiny),
        }


class Polar(SeriesMetric):
    """PSNR in dB of each frame's rows beyond 60 degrees north and south (psnr_polar), and of every band of 30 degrees.

    A row belongs to the band of its middle; within a band all pixels count alike. 100 where the MSE is below 1e-10.
    """

    name = "polar"
    columns = {"psnr_polar": True, **{f"psnr_{band}": True for band in BANDS}}
    min_size = len(BANDS)

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new
        rows = (ref.double() - rec.double()).square().mean((1, 3))
        height = rows.shape[1]
        band = (2 * torch.arange(height, device=rows.device) + 1) * len(BANDS) // (2 * height)
        polar = (band == 0) | (band == len(BANDS) - 1)
        bands = {f"psnr_{name}": decibel(rows[:, band == i].mean(1)) for i, name in enumerate(BANDS)}
        return {"psnr_polar": decibel(rows[:, polar].mean(1)), **bands}


class Cube(SeriesMetric):
    """PSNR in dB of the views of 90 degrees of each frame: of all six (cube_psnr), of the four to the sides, up, and
    down. 100 where the MSE is below 1e-10. For the sizes of the views see panorama.cube_faces."""

    name = "cube"
    columns = {"cube_psnr": True, "cube_psnr_sides": True, "cube_psnr_up": True, "cube_psnr_down": True}
    min_size = 2

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new
        faces = cube_faces(rec - ref)  # of the error, since sampling is linear
        return _by_face("cube_psnr", faces.double().square().mean((2, 3, 4)), decibel)


class CubeLpips(SeriesMetric):
    """LPIPS (AlexNet) of the views of 90 degrees of each frame: the mean of all six (cube_lpips), of the four to the
    sides, up, and down."""

    name = "cube_lpips"
    columns = {"cube_lpips": False, "cube_lpips_sides": False, "cube_lpips_up": False, "cube_lpips_down": False}
    min_size = 62

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.network = networks.lpips("alex")

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        with autocast_off(chunk.ref.device):
            ref, rec = (cube_faces(frames * 2 - 1).flatten(0, 1) for frames in chunk.new)
            batches = zip(ref.split(batch_frames(ref)), rec.split(batch_frames(rec)), strict=True)
            faces = torch.cat([self.network(a, b) for a, b in batches])
        return _by_face("cube_lpips", faces.view(-1, 6), lambda value: value)


def _by_face(column: str, faces: Tensor, finish: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Columns of values [T, 6] per face, averaged over all, over the sides, up, and down."""
    return {
        column: finish(faces.mean(1)),
        f"{column}_sides": finish(faces[:, SIDES].mean(1)),
        f"{column}_up": finish(faces[:, UP]),
        f"{column}_down": finish(faces[:, DOWN]),
    }

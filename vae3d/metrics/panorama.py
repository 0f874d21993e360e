"""Metrics of equirectangular panoramas (ERP).

Rows weighted by their area on the sphere, the seam between left and right edge, the poles, and the six cube faces; and
whether a model commutes with rolling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.metrics.base import Chunk, Nearest, SeriesMetric
from vae3d.metrics.frame import decibels
from vae3d.metrics.networks import Networks, batch_frames
from vae3d.metrics.ssim import ssim_map
from vae3d.panorama import DOWN, SIDES, UP, cube_faces, latitude_weights, roll

SEAM = 16  # columns on each side of the seam, at most an eighth of the width
BANDS = ("n60_90", "n30_60", "n0_30", "s0_30", "s30_60", "s60_90")  # of latitude in degrees, from the top row down


class WsPsnr(SeriesMetric):
    """PSNR in dB of each frame, rows weighted by the cosine of their latitude (Sun et al. 2017; V-Sense/360SR
    `ws_psnr.py`)."""

    name = "ws_psnr"
    columns = {"ws_psnr": True}

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new_frames
        weights = latitude_weights(ref.shape[-2], ref.device)
        rows = (ref.double() - rec.double()).square().mean((1, 3))
        mse = rows @ weights / weights.sum()
        return {"ws_psnr": decibels(mse)}


class WsSsim(SeriesMetric):
    """SSIM of each frame, windows weighted by the latitude of their centre (Zhou et al. 2018). Windows wrap around at
    the seam."""

    name = "ws_ssim"
    columns = {"ws_ssim": True}
    min_size = 11

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (F.pad(frames, (5, 5, 0, 0), "circular") for frames in chunk.new_frames)
        rows = ssim_map(ref, rec).mean((1, 3))
        weights = latitude_weights(ref.shape[-2], ref.device)[5:-5]
        return {"ws_ssim": rows @ weights / weights.sum()}


class Seam(SeriesMetric):
    """Errors at the seam of a panorama.

    seam_gradient: mean |(y_0 - y_W-1) - (x_0 - x_W-1)| of the first and last column, in [0, 1] units: an edge that was
    added or lost. seam_ratio: MSE of 16 columns on each side (an eighth of frames narrower than 128) / MSE of the
    rest; 1 is best, above it the seam is worse than the rest.
    """

    name = "seam"
    columns = {"seam_gradient": False, "seam_ratio": Nearest(1.0)}
    min_size = 8

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (frames.double() for frames in chunk.new_frames)
        error = rec - ref
        columns = error.square().mean((1, 2))
        near = min(SEAM, columns.shape[1] // 8)
        band = torch.cat([columns[:, :near], columns[:, -near:]], 1).mean(1)
        rest = columns[:, near:-near].mean(1)
        eps = 1e-10  # equal frames have a ratio of 1
        return {
            "seam_gradient": (error[..., 0] - error[..., -1]).abs().mean((1, 2)),
            "seam_ratio": (band + eps) / (rest + eps),
        }


class Polar(SeriesMetric):
    """PSNR in dB of the rows beyond 60 degrees north and south (psnr_polar), and of each band of 30 degrees.

    A row belongs to the band of its centre. Pixels of a band have equal weight.
    """

    name = "polar"
    columns = {"psnr_polar": True, **{f"psnr_{band}": True for band in BANDS}}
    min_size = len(BANDS)

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new_frames
        rows = (ref.double() - rec.double()).square().mean((1, 3))
        height = rows.shape[1]
        band = (2 * torch.arange(height, device=rows.device) + 1) * len(BANDS) // (2 * height)
        polar = (band == 0) | (band == len(BANDS) - 1)
        bands = {f"psnr_{name}": decibels(rows[:, band == i].mean(1)) for i, name in enumerate(BANDS)}
        return {"psnr_polar": decibels(rows[:, polar].mean(1)), **bands}


class Cube(SeriesMetric):
    """PSNR in dB of each frame's cube faces (views of 90 degrees): all six (cube_psnr), the four sides, up, and down.

    Sizes of the faces: see vae3d.panorama.cube_faces.
    """

    name = "cube"
    columns = {"cube_psnr": True, "cube_psnr_sides": True, "cube_psnr_up": True, "cube_psnr_down": True}
    min_size = 2

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new_frames
        faces = cube_faces(rec - ref)  # projecting the error is enough: sampling is linear
        mse = _by_face("cube_psnr", faces.double().square().mean((2, 3, 4)))
        return {column: decibels(values) for column, values in mse.items()}


class CubeLpips(SeriesMetric):
    """LPIPS (AlexNet) of each frame's cube faces: mean of all six (cube_lpips), of the four sides, up, and down."""

    name = "cube_lpips"
    columns = {"cube_lpips": False, "cube_lpips_sides": False, "cube_lpips_up": False, "cube_lpips_down": False}
    min_size = 62

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.network = networks.lpips("alex")

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (cube_faces(frames * 2 - 1).flatten(0, 1) for frames in chunk.new_frames)
        batches = zip(ref.split(batch_frames(ref)), rec.split(batch_frames(rec)), strict=True)
        faces = torch.cat([self.network(a, b) for a, b in batches])
        return _by_face("cube_lpips", faces.view(-1, 6))


@torch.no_grad()
def roll_consistency(model: nn.Module, video: Tensor) -> float:
    """PSNR in dB between the reconstruction of a rolled panorama and the rolled reconstruction. 100 if MSE < 1e-10.

    A model without a seam commutes with rolling, so the two are equal. It rolls by half the width, rounded down to a
    multiple of the model's stride, since strided convolutions commute with no other shift.
    model: a VideoAutoencoder in eval mode. video: [B, 3, T, H, W] in [-1, 1].
    Raises ValueError for a width of less than two strides.
    """
    width, stride = video.shape[-1], model.spec.space_stride
    columns = width // 2 // stride * stride
    if not columns:
        raise ValueError(f"a panorama of {width} columns cannot be rolled by the stride {stride}; use {2 * stride}")
    rolled = model(roll(video, columns), sample=False).video
    expected = roll(model(video, sample=False).video, columns)
    # / 2: PSNR is defined on pixels in [0, 1].
    error = (rolled.float().clamp(-1, 1) - expected.float().clamp(-1, 1)) / 2
    return float(decibels(error.double().square().mean()))


def _by_face(column: str, faces: Tensor) -> dict[str, Tensor]:
    """Columns from values [T, 6] per face: mean of all, mean of the sides, up, and down."""
    return {
        column: faces.mean(1),
        f"{column}_sides": faces[:, SIDES].mean(1),
        f"{column}_up": faces[:, UP],
        f"{column}_down": faces[:, DOWN],
    }

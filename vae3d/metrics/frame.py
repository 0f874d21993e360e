"""Metrics of single frames: PSNR, SSIM, MS-SSIM, LPIPS, sharpness, and of alpha."""

from __future__ import annotations

import math
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.metrics.base import Chunk, Nearest, Score, SeriesMetric, VideoResult
from vae3d.metrics.networks import Networks, batch_frames, lpips_features
from vae3d.metrics.ssim import SSIM, ms_ssim

PSNR_CAP = 100.0  # dB, for identical frames


def decibel(mse: float, floor: float = 1e-10) -> float:
    """PSNR in dB from the MSE of pixels in [0, 1]; PSNR_CAP below `floor`."""
    return PSNR_CAP if mse < floor else -10 * math.log10(mse)


def decibels(mse: Tensor) -> Tensor:
    """`decibel` of every element."""
    return torch.where(mse < 1e-10, PSNR_CAP, -10 * mse.clamp_min(1e-10).log10())


class Psnr(SeriesMetric):
    """10 log10(1 / MSE) in dB over all RGB values: of each frame (psnr), and of the whole video (psnr_video).

    floor: an MSE below this scores 100 (Open-Sora v1.2 `cal_psnr.py`: 1e-10). eps: added to the MSE instead (VidTok,
    piq: 1e-8). root_eps: added to the root of the MSE instead (TokenBench: float32's epsilon on pixels of 0 to 255).
    pool: `video` makes psnr equal to psnr_video.
    """

    name = "psnr"
    columns = {"psnr": True, "psnr_video": True}
    count_columns = ("identical_frames",)
    options = ("floor", "eps", "root_eps", "pool")

    def __init__(self, floor: float = 1e-10, eps: float = 0.0, root_eps: float = 0.0, pool: str = "frames") -> None:
        super().__init__()
        self.floor, self.eps, self.root_eps, self.pool = floor, eps, root_eps, pool

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        # Frame by frame, to stay in the CPU cache. Means of rows in fp32 and of these in fp64 are exact to 1e-8.
        errors = [(a - b).square().mean(-1).double().mean() for a, b in zip(*chunk.new_frames, strict=True)]
        return {"psnr": torch.stack(errors)}

    def result(self) -> VideoResult:
        mse, errors = self._mean("psnr")
        self.reset()
        if mse is None:
            return VideoResult({column: Score(None) for column in self.columns})
        frames, pooled = [self._decibel(error) for error in errors], self._decibel(mse)
        value = pooled if self.pool == "video" else fmean(frames)
        counts = {"identical_frames": sum(error == 0 for error in errors)}
        return VideoResult({"psnr": Score(value, frames), "psnr_video": Score(pooled)}, {}, counts)

    def _decibel(self, mse: float) -> float:
        if self.root_eps:
            return -20 * math.log10(math.sqrt(mse) + self.root_eps)
        if self.eps:
            return -10 * math.log10(mse + self.eps)
        return decibel(mse, self.floor)


class Ssim(SeriesMetric):
    """Structural similarity. formula: a key of metrics.ssim.SSIM."""

    name = "ssim"
    columns = {"ssim": True}
    options = ("formula",)
    min_size = 11

    def __init__(self, formula: str = "gaussian") -> None:
        super().__init__()
        self.formula = formula

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        return {"ssim": SSIM[self.formula](*chunk.new_frames)}


class MsSsim(SeriesMetric):
    """Multi-scale SSIM; see metrics.ssim.ms_ssim."""

    name = "ms_ssim"
    columns = {"ms_ssim": True}
    min_size = 161

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.new_frames
        return {"ms_ssim": torch.cat([ms_ssim(a, b) for a, b in zip(ref.split(4), rec.split(4), strict=True)])}


class Lpips(SeriesMetric):
    """LPIPS v0.1 with AlexNet (Zhang et al., arXiv 1801.03924) on frames mapped to [-1, 1], in fp32.

    spatial: average maps upsampled to the frame's size instead of the layers' own maps (Open-Sora v1.2, WF-VAE). The
    score differs by at most 1e-4.
    """

    name = "lpips_alex"
    columns = {"lpips_alex": False}
    options = ("spatial",)
    net = "alex"
    min_size = 31

    def __init__(self, networks: Networks, spatial: bool = False) -> None:
        super().__init__()
        self.spatial, self.network = spatial, networks.lpips(self.net)

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        if self.net == "alex":  # small features, shared with other metrics
            return {self.name: self._distance(chunk)}
        batches = zip(*(part.split(max(1, batch_frames(part) // 4)) for part in chunk.new_frames), strict=True)
        return {self.name: torch.cat([self._distance(Chunk(ref, rec)) for ref, rec in batches])}

    def _distance(self, chunk: Chunk) -> Tensor:
        ref, rec = (
            [f[chunk.overlap :] for f in lpips_features(chunk, self.network, which)] for which in ("ref", "rec")
        )
        maps = self.network.layer_maps(ref, rec)
        if not self.spatial:
            return sum(m.mean((2, 3)) for m in maps)[:, 0]
        return sum(upsampled_mean(m, chunk.ref.shape[-2:]) for m in maps)


class LpipsVgg(Lpips):
    """LPIPS with VGG, as VidTok and TokenBench report it; not comparable with AlexNet's."""

    name = "lpips_vgg"
    columns = {"lpips_vgg": False}
    net = "vgg"
    min_size = 16


class Sharpness(SeriesMetric):
    """Gradient energy of the reconstruction / of the original: 1 is equally sharp, below is blurred, above is noisy.

    floor: added to both energies, so that two frames without detail score 1.
    """

    name = "sharpness"
    columns = {"sharpness": Nearest(1.0)}
    options = ("floor",)
    min_size = 2

    def __init__(self, floor: float = 1e-6) -> None:
        super().__init__()
        self.floor = floor

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (gradient_energy(frames) + self.floor for frames in chunk.new_frames)
        return {"sharpness": rec / ref}


class AlphaPsnr(SeriesMetric):
    """10 log10(1 / MSE) in dB of alpha, of each frame."""

    name = "alpha_psnr"
    columns = {"alpha_psnr": True}
    alpha = True

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = chunk.alpha
        return {"alpha_psnr": decibels((ref - rec).double().square().mean((1, 2, 3)))}


class AlphaSsim(SeriesMetric):
    """Structural similarity of alpha; see metrics.ssim.ssim_gaussian."""

    name = "alpha_ssim"
    columns = {"alpha_ssim": True}
    min_size = 11
    alpha = True

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        return {"alpha_ssim": SSIM["gaussian"](*chunk.alpha)}


def gradient_energy(frames: Tensor) -> Tensor:
    """[T, 3, H, W] in [0, 1] -> [T]: mean square difference of neighbouring pixels, along rows plus along columns."""
    return sum(frames.diff(dim=axis).double().square().mean((1, 2, 3)) for axis in (2, 3))


def upsampled_mean(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[N] means of [N, 1, h, w] maps upsampled bilinearly to `size`.

    Nothing is upsampled: the operation is linear and separable, so each row and each column has a fixed weight.
    """
    weights = []
    for small, large in zip(maps.shape[-2:], size, strict=True):
        identity = torch.eye(small, dtype=maps.dtype, device=maps.device)[None]
        weights.append(F.interpolate(identity, size=large, mode="linear", align_corners=False)[0].mean(1))
    return torch.einsum("nhw,h,w->n", maps[:, 0], *weights)

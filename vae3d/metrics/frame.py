"""PSNR, SSIM and LPIPS of single frames, by the definitions of Open-Sora v1.2 `eval/vae`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vae3d import weights
from vae3d.metrics.base import FrameMetric, MetricError
from vae3d.precision import full_precision

PSNR_CAP = 100.0  # dB, of frames with a mean squared error below 1e-10


class Psnr(FrameMetric):
    """10 log10(1 / MSE) in dB over all RGB values of a frame; 100 where MSE < 1e-10 (`cal_psnr.py`)."""

    name = "psnr"
    higher_is_better = True

    def score(self, ref: Tensor, rec: Tensor) -> Tensor:
        mse = (ref.double() - rec.double()).square().mean((1, 2, 3))
        return torch.where(mse < 1e-10, PSNR_CAP, -10.0 * mse.clamp_min(1e-10).log10())


class Ssim(FrameMetric):
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window of sigma 1.5, only where it fits whole,
    each RGB channel by itself, in fp64 (`cal_ssim.py`). Raises MetricError for frames under 11 pixels.
    """

    name = "ssim"
    higher_is_better = True
    window, sigma = 11, 1.5
    c1, c2 = 0.01**2, 0.03**2

    def score(self, ref: Tensor, rec: Tensor) -> Tensor:
        height, width = ref.shape[-2:]
        if min(height, width) < self.window:
            raise MetricError(f"ssim needs frames of at least {self.window} pixels; these are {height}x{width}")
        x, y = ref.double(), rec.double()
        rows, columns = self._band(height, x), self._band(width, x)
        mean_x, mean_y, squares, product = (rows @ m @ columns.T for m in (x, y, x * x + y * y, x * y))
        both, means = mean_x * mean_y, mean_x.square() + mean_y.square()
        similarity = (2 * both + self.c1) * (2 * (product - both) + self.c2)
        similarity = similarity / ((means + self.c1) * (squares - means + self.c2))
        return similarity.mean((1, 2, 3))

    def _band(self, size: int, like: Tensor) -> Tensor:
        """[size - 10, size] matrix whose product with a row is the row's valid Gaussian convolution."""
        offsets = torch.arange(self.window, dtype=like.dtype, device=like.device) - (self.window - 1) / 2
        kernel = torch.exp(-offsets.square() / (2 * self.sigma**2))
        band = torch.zeros(size - self.window + 1, size, dtype=like.dtype, device=like.device)
        for i, weight in enumerate(kernel / kernel.sum()):
            band.diagonal(i).fill_(weight)
        return band


class Lpips(FrameMetric):
    """LPIPS v0.1 with the AlexNet trunk, frames mapped to [-1, 1], in fp32. Lower is better.

    Raises WeightsMissing if the trunk is not on this machine, MetricError for frames under 31 pixels.
    """

    name = "lpips"
    higher_is_better = False
    needs_weights = True
    smallest = 31

    @staticmethod
    def find_weights() -> Path:
        """Where the trunk's file is. Raises WeightsMissing if it is nowhere."""
        return weights.find("alexnet-owt-7be5be79.pth")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        from vae3d.features.lpips import LPIPSNet  # psnr and ssim must not wait for torchvision

        self.network = LPIPSNet("alex").load().to(device)

    @torch.no_grad()
    def score(self, ref: Tensor, rec: Tensor) -> Tensor:
        if min(ref.shape[-2:]) < self.smallest:
            size = "x".join(map(str, ref.shape[-2:]))
            raise MetricError(f"lpips needs frames of at least {self.smallest} pixels; these are {size}")
        with full_precision(ref.device):
            return self.network(ref.float() * 2 - 1, rec.float() * 2 - 1).flatten()

"""SSIM as different tools compute it. All functions take frames [T, 3, H, W] in [0, 1] and return scores [T].

The formula is Wang et al. 2004 per RGB channel, with K1 = 0.01, K2 = 0.03 and a data range of 1. The tools differ in
window, border, covariance and precision; scores of the same frames differ by up to 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM

A = TypeVar("A", Tensor, np.ndarray)


def gaussian() -> np.ndarray:
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    return kernel / kernel.sum()


def ssim_gaussian(x: Tensor, y: Tensor) -> Tensor:
    """11x11 Gaussian window of sigma 1.5, no padding, population covariance, fp64: Open-Sora v1.2 and WF-VAE
    `cal_ssim.py`, scikit-image with gaussian_weights and use_sample_covariance=False."""
    return _in_fp64(x, y, gaussian())


def ssim_uniform(x: Tensor, y: Tensor) -> Tensor:
    """7x7 uniform window, no padding, sample covariance, fp64: scikit-image's default, TokenBench."""
    return _in_fp64(x, y, np.full(7, 1 / 7), unbiased=49 / 48)


def ssim_piq(x: Tensor, y: Tensor) -> Tensor:
    """ssim_gaussian in fp32, after average pooling by round(min(H, W) / 256): piq, VidTok `compute_ssim`."""
    factor = max(1, round(min(x.shape[-2:]) / 256))
    if factor > 1:
        x, y = F.avg_pool2d(x, factor), F.avg_pool2d(y, factor)
    squares = (torch.arange(11, dtype=torch.float32, device=x.device) - 5) ** 2
    kernel = (-(squares[None] + squares[:, None]) / (2 * 1.5**2)).exp()
    return _in_fp32(x, y, kernel / kernel.sum())


def ssim_torchmetrics(x: Tensor, y: Tensor) -> Tensor:
    """ssim_gaussian in fp32 with reflection padding: torchmetrics since its PR 2721."""
    offsets = torch.arange(-5, 6, dtype=torch.float32, device=x.device)
    kernel = torch.exp(-((offsets / 1.5) ** 2) / 2)
    kernel = (kernel / kernel.sum())[None]
    return _in_fp32(F.pad(x, (5, 5, 5, 5), "reflect"), F.pad(y, (5, 5, 5, 5), "reflect"), kernel.T @ kernel)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003) with five scales, as pytorch-msssim computes it, in fp64.

    Frames need at least 161 pixels.
    """
    x, y = x.double(), y.double()
    product = torch.ones((), dtype=torch.float64, device=x.device)
    for scale, weight in enumerate(SCALES):
        if scale:
            odd = [side % 2 for side in x.shape[-2:]]
            x, y = F.avg_pool2d(x, 2, padding=odd), F.avg_pool2d(y, 2, padding=odd)
        ssim, contrast = _similarity(x, y, _gaussian_filter(x))
        part = ssim if scale == len(SCALES) - 1 else contrast
        product = product * part.mean((2, 3)).clamp_min(0) ** weight
    return product.mean(1)


SSIM = {"gaussian": ssim_gaussian, "uniform": ssim_uniform, "piq": ssim_piq, "torchmetrics": ssim_torchmetrics}


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """`ssim_gaussian` before the mean: [T, 3, H - 10, W - 10] in fp64."""
    return _similarity(x.double(), y.double(), _gaussian_filter(x))[0]


def _similarity(x: A, y: A, smooth: Callable[[A], A], unbiased: float = 1.0) -> tuple[A, A]:
    """Maps of SSIM, and of contrast times structure. unbiased: N / (N - 1) for the sample covariance."""
    mean_x, mean_y = smooth(x), smooth(y)
    squares = x * x
    squares += y * y
    product, squares = smooth(x * y), smooth(squares)
    both, means = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    product -= both  # in place from here on: memory bandwidth is the limit
    product *= 2 * unbiased
    product += C2
    squares -= means
    squares *= unbiased
    squares += C2
    product /= squares
    both *= 2
    both += C1
    means += C1
    both /= means
    both *= product
    return both, product


def _in_fp64(x: Tensor, y: Tensor, kernel: np.ndarray, unbiased: float = 1.0) -> Tensor:
    """On the CPU plane by plane, to stay in its cache, with OpenCV's separable filter, far faster than torch's."""
    if x.device.type != "cpu":
        return _similarity(x.double(), y.double(), _valid_filter(kernel, x), unbiased)[0].mean((1, 2, 3))
    import cv2

    edge = len(kernel) // 2
    scores = []
    for frames in zip(x, y, strict=True):
        planes = (frame.contiguous().double().numpy() for frame in frames)
        maps = [
            _similarity(a, b, lambda plane: cv2.sepFilter2D(plane, cv2.CV_64F, kernel, kernel), unbiased)[0]
            for a, b in zip(*planes, strict=True)
        ]
        scores.append(np.mean([m[edge:-edge, edge:-edge].mean() for m in maps]))
    return torch.tensor(scores, dtype=torch.float64)


def _gaussian_filter(like: Tensor) -> Callable[[Tensor], Tensor]:
    return _smooth_planes if like.device.type == "cpu" else _valid_filter(gaussian(), like)


def _smooth_planes(x: Tensor) -> Tensor:
    """[T, C, H, W] -> [T, C, H - 10, W - 10] filtered by the Gaussian without padding, on the CPU."""
    import cv2

    kernel = gaussian()
    planes = [cv2.sepFilter2D(plane, cv2.CV_64F, kernel, kernel) for plane in x.flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(planes)).unflatten(0, x.shape[:2])[..., 5:-5, 5:-5]


def _valid_filter(kernel: np.ndarray, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The same filter as two products with banded matrices: GPUs are fastest at these in fp64."""
    rows, columns = (_band(kernel, side, like.device) for side in like.shape[-2:])
    return lambda x: rows @ x @ columns.T


def _band(kernel: np.ndarray, size: int, device: torch.device) -> Tensor:
    """[size - K + 1, size] matrix whose product with a column is its convolution with the kernel, without padding."""
    band = torch.zeros(size - len(kernel) + 1, size, dtype=torch.float64, device=device)
    for i, weight in enumerate(kernel):
        band.diagonal(i).fill_(weight)
    return band


def _in_fp32(x: Tensor, y: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolutions in fp32, as piq and torchmetrics do; rounding changes the sixth digit."""
    x, y = x.float(), y.float()
    window = kernel.expand(3, 1, *kernel.shape).contiguous()
    mean_x, mean_y, xx, yy, xy = (F.conv2d(p, window, groups=3) for p in (x, y, x * x, y * y, x * y))
    variance_x, variance_y = (xx - mean_x**2).clamp_min(0), (yy - mean_y**2).clamp_min(0)
    contrast = (2 * (xy - mean_x * mean_y) + C2) / (variance_x + variance_y + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (luminance * contrast).mean((1, 2, 3)).double()

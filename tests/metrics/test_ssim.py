from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_msssim import ms_ssim as their_ms_ssim
from skimage.metrics import structural_similarity
from torch import Tensor

from tests.metrics.clips import levels, pair, value
from vae3d.metrics import MetricError, ssim
from vae3d.metrics.frame import MsSsim, Ssim
from vae3d.precision import disable_tf32


def published_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """`cal_ssim.py` of Open-Sora v1.2 written out: correlation with an 11x11 Gaussian, valid area, per channel."""
    offsets = np.arange(11) - 5.0
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(kernel, kernel) / kernel.sum() ** 2

    def smooth(image):
        views = np.lib.stride_tricks.sliding_window_view(image, (11, 11))
        return (views * window).sum((2, 3))

    values = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        mu_a, mu_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mu_a**2, smooth(b * b) - mu_b**2
        covariance = smooth(a * b) - mu_a * mu_b
        top = (2 * mu_a * mu_b + 0.01**2) * (2 * covariance + 0.03**2)
        values.append((top / ((mu_a**2 + mu_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))).mean())
    return float(np.mean(values))


def skimage_ssim(x: Tensor, y: Tensor, **options: object) -> float:
    return structural_similarity(x.double().numpy(), y.double().numpy(), channel_axis=0, data_range=1.0, **options)


@pytest.mark.parametrize("size", [(40, 48), (11, 11), (11, 30), (37, 53)])
def test_ssim_is_the_published_formula(size):
    ref, rec = pair(2, *size)
    expected = [published_ssim(a.numpy(), b.numpy()) for a, b in zip(ref, rec, strict=True)]
    assert ssim.ssim_gaussian(ref, rec).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_is_that_of_scikit_image():
    ref, rec = pair(1)
    gaussian = skimage_ssim(ref[0], rec[0], gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert value(Ssim(), ref, rec) == pytest.approx(gaussian, abs=1e-6)
    assert value(Ssim("uniform"), ref, rec) == pytest.approx(skimage_ssim(ref[0], rec[0]), abs=1e-6)


@pytest.mark.parametrize(("kernel", "unbiased"), [(ssim.gaussian(), 1.0), (np.full(7, 1 / 7), 49 / 48)])
def test_matrix_products_give_what_opencv_gives(kernel, unbiased):
    ref, rec = (x.double() for x in pair(2, 37, 53))
    on_gpu = ssim._similarity(ref, rec, ssim._valid_filter(kernel, ref), unbiased)[0].mean((1, 2, 3))
    torch.testing.assert_close(on_gpu, ssim._in_fp64(ref, rec, kernel, unbiased), rtol=0, atol=1e-12)


@pytest.mark.parametrize("formula", ssim.SSIM)
def test_every_formula_is_symmetric_and_1_for_equal_frames(formula):
    ref, rec = pair(2)
    of = ssim.SSIM[formula]
    torch.testing.assert_close(of(ref, rec), of(rec, ref), rtol=0, atol=1e-6)
    torch.testing.assert_close(of(ref, ref), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (of(ref, rec) < 0.99).all()


def test_inverted_contrast_is_negative():
    ref, _ = pair(1)
    assert ssim.ssim_gaussian(ref, 1 - ref).item() < 0


def test_ssim_of_two_greys_by_hand():
    """Without contrast only the luminance counts."""
    by_hand = (2 * 0.5 * 0.25 + 0.01**2) / (0.5**2 + 0.25**2 + 0.01**2)
    for formula in ssim.SSIM.values():
        got = formula(levels(0.5, height=20, width=20), levels(0.25, height=20, width=20)).item()
        assert got == pytest.approx(by_hand, abs=1e-4)


def test_map_has_the_mean_that_is_the_score():
    ref, rec = pair(2)
    maps = ssim.ssim_map(ref, rec)
    assert maps.shape == (2, 3, 30, 38)
    torch.testing.assert_close(maps.mean((1, 2, 3)), ssim.ssim_gaussian(ref, rec), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["opencv", "matrices"])
@pytest.mark.parametrize("size", [(161, 161), (165, 190), (176, 163)])
def test_ms_ssim_is_that_of_pytorch_msssim(monkeypatch, path, size):
    if path == "matrices":  # what GPUs use
        monkeypatch.setattr(ssim, "_gaussian_filter", lambda like: ssim._valid_filter(ssim.gaussian(), like))
    ref, rec = pair(2, *size, noise=0.2)
    ours = ssim.ms_ssim(ref, rec)
    single = their_ms_ssim(ref, rec, data_range=1.0, size_average=False)
    window = torch.from_numpy(ssim.gaussian()).repeat(3, 1, 1, 1)  # theirs is in fp32
    double = their_ms_ssim(ref.double(), rec.double(), data_range=1.0, size_average=False, win=window)
    torch.testing.assert_close(ours, single.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, double, rtol=0, atol=1e-9)


def test_ms_ssim_without_any_likeness_is_0():
    ref, _ = pair(1, 161, 161)
    assert their_ms_ssim(ref, 1 - ref, data_range=1.0).item() == ssim.ms_ssim(ref, 1 - ref).item() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "formula", [*ssim.SSIM.values(), ssim.ms_ssim, lambda x, y: ssim.ssim_map(x, y).mean((1, 2, 3))]
)
def test_gpus_give_what_the_cpu_gives(formula):
    disable_tf32()
    ref, rec = pair(2, 161, 190)
    torch.testing.assert_close(formula(ref.cuda(), rec.cuda()).cpu(), formula(ref, rec), rtol=0, atol=1e-6)


def test_ms_ssim_needs_161_pixels():
    ref, rec = pair(1, 160, 200)
    with pytest.raises(MetricError, match="ms_ssim needs frames of at least 161 pixels; these are 160x200"):
        value(MsSsim(), ref, rec)

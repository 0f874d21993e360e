from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from tests import tiny
from vae3d.metrics import MetricError, build_metrics
from vae3d.metrics.frame import Lpips, Psnr, Ssim


def pair(count=3, height=40, width=48) -> tuple[torch.Tensor, torch.Tensor]:
    clip = torch.from_numpy(tiny.frames(count, height, width)).permute(0, 3, 1, 2).float() / 255
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    return clip, (clip + noise).clamp(0, 1)


def score(metric, ref, rec) -> list[float]:
    metric.update(ref, rec)
    return metric.result()


def test_psnr_is_that_of_each_frame():
    ref, rec = pair()
    expected = [
        20 * np.log10(1 / np.sqrt(((a.double() - b.double()) ** 2).mean().item()))
        for a, b in zip(ref, rec, strict=True)
    ]
    assert score(Psnr(), ref, rec) == pytest.approx(expected, abs=1e-9)


def test_psnr_of_equal_frames_is_capped():
    ref, _ = pair()
    assert score(Psnr(), ref, ref) == [100.0] * 3
    step = torch.full((1, 3, 16, 16), 1 / 255)
    assert score(Psnr(), torch.zeros_like(step), step) == pytest.approx([48.1308], abs=1e-4)


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


def test_ssim_is_the_published_formula():
    ref, rec = pair()
    expected = [published_ssim(a.numpy(), b.numpy()) for a, b in zip(ref, rec, strict=True)]
    assert score(Ssim(), ref, rec) == pytest.approx(expected, abs=1e-12)
    theirs = structural_similarity(
        ref[0].double().numpy(), rec[0].double().numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=1.0,
    )  # fmt: skip
    assert score(Ssim(), ref, rec)[0] == pytest.approx(theirs, abs=1e-6)
    assert score(Ssim(), ref, ref) == pytest.approx([1.0] * 3)


def test_lpips_sees_pixels_in_minus_one_to_one(trunks):
    ref, rec = pair(height=64, width=64)
    metric = Lpips()
    expected = metric.network(ref * 2 - 1, rec * 2 - 1).flatten().tolist()
    assert score(metric, ref, rec) == pytest.approx(expected, rel=1e-6)
    assert score(metric, ref, ref) == [0.0] * 3


def test_chunks_do_not_matter(trunks):
    ref, rec = pair(count=7)
    for name in ("psnr", "ssim", "lpips"):
        (metric,) = build_metrics([name])
        whole = score(metric, ref, rec)
        for size in (1, 3):
            for a, b in zip(ref.split(size), rec.split(size), strict=True):
                metric.update(a, b)
            assert metric.result() == pytest.approx(whole, rel=1e-6)


def test_what_cannot_be_scored_is_refused(trunks):
    ref, rec = pair()
    with pytest.raises(MetricError, match="differ in shape"):
        Psnr().update(ref, rec[:2])
    with pytest.raises(MetricError, match="ssim needs frames of at least 11 pixels; these are 10x40"):
        Ssim().update(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))
    with pytest.raises(MetricError, match="lpips needs frames of at least 31 pixels; these are 30x40"):
        Lpips().update(torch.zeros(1, 3, 30, 40), torch.zeros(1, 3, 30, 40))
    with pytest.raises(MetricError, match="psnr of frame 1 is nan"):
        bad = rec.clone()
        bad[1, 0, 0, 0] = torch.nan
        score(Psnr(), ref, bad)
    with pytest.raises(MetricError, match="no metric is called vmaf; there are psnr, ssim, lpips"):
        build_metrics(["psnr", "vmaf"])


def test_a_video_given_up_leaves_nothing_behind():
    ref, rec = pair()
    metric = Psnr()
    metric.update(ref, rec)
    metric.reset()
    assert len(score(metric, ref, rec)) == 3


def test_psnr_needs_neither_lpips_nor_torchvision():
    code = "import sys; from vae3d.metrics import build_metrics; build_metrics(['psnr', 'ssim']); print([m for m in ('lpips', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

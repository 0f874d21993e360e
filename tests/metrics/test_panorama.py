from __future__ import annotations

import math

import pytest
import torch

from tests.metrics.clips import levels, pair, result, value
from tests.metrics.test_ssim import published_ssim
from vae3d.metrics import ssim
from vae3d.metrics.frame import Psnr
from vae3d.metrics.panorama import Seam, WsPsnr, WsSsim


def test_ws_psnr_by_hand():
    ref = torch.zeros(1, 3, 4, 5)
    rec = ref.clone()
    rec[:, :, 0] = 0.1
    pole, equator = math.cos(3 * math.pi / 8), math.cos(math.pi / 8)
    mse = 0.01 * pole / (2 * pole + 2 * equator)
    assert value(WsPsnr(), ref, rec) == pytest.approx(-10 * math.log10(mse), abs=1e-5)


def test_ws_psnr_of_two_rows_is_psnr():
    ref, rec = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4)
    rec[:, 1, 0, 2] = 0.3
    assert value(WsPsnr(), ref, rec) == pytest.approx(value(Psnr(), ref, rec, "psnr"), abs=1e-6)


def test_ws_psnr_forgives_errors_at_the_poles():
    ref, _ = pair(1, 48, 96)
    pole, equator = ref.clone(), ref.clone()
    pole[:, :, :8] += 0.1
    equator[:, :, 20:28] += 0.1
    assert value(WsPsnr(), ref, pole) > value(Psnr(), ref, pole, "psnr") + 3
    assert value(WsPsnr(), ref, equator) < value(Psnr(), ref, equator, "psnr") - 1


def test_ws_psnr_is_capped_like_psnr():
    assert value(WsPsnr(), levels(0.5), levels(0.5)) == 100
    assert value(WsPsnr(), levels(0.5), levels(0.5 + 5e-6)) == 100


def test_ws_ssim_by_hand():
    """Windows wrap around the seam; each row of windows weighs the latitude of its centre."""
    ref, rec = pair(1, 16, 24)
    wrapped = [torch.cat([x[..., -5:], x, x[..., :5]], -1) for x in (ref, rec)]
    rows = [published_ssim(*(x[0, :, i : i + 11].numpy() for x in wrapped)) for i in range(6)]
    weights = [math.cos((j + 0.5 - 8) * math.pi / 16) for j in range(5, 11)]
    expected = sum(w * r for w, r in zip(weights, rows, strict=True)) / sum(weights)
    assert value(WsSsim(), ref, rec) == pytest.approx(expected, abs=1e-12)


def test_an_error_at_the_seam_counts_as_much_as_elsewhere():
    ref = pair(1, 32, 1)[0].expand(-1, -1, -1, 64)  # the same at every longitude
    at_seam, inside = ref.clone(), ref.clone()
    at_seam[:, :, 12:20, :2] += 0.2
    inside[:, :, 12:20, 30:32] += 0.2
    assert value(WsSsim(), ref, at_seam) == pytest.approx(value(WsSsim(), ref, inside), abs=1e-12)
    assert ssim.ssim_gaussian(ref, at_seam).item() > ssim.ssim_gaussian(ref, inside).item() + 1e-3


def test_a_rotated_panorama_has_the_same_ws_ssim():
    ref, rec = pair(1, 24, 40)
    for columns in (1, 20):
        turned = value(WsSsim(), ref.roll(columns, -1), rec.roll(columns, -1))
        assert turned == pytest.approx(value(WsSsim(), ref, rec), abs=1e-12)


def test_seam_gradient_is_the_edge_that_was_added():
    ref = torch.full((2, 3, 40, 80), 0.5)
    rec = ref.clone()
    rec[..., 0] += 0.25
    rec[..., -1] -= 0.125
    assert value(Seam(), ref, rec, "seam_gradient") == pytest.approx(0.375)
    ref[..., 0] += 0.25  # an edge that the original has too
    assert value(Seam(), ref, rec, "seam_gradient") == pytest.approx(0.125)


def test_seam_ratio_compares_the_16_columns_at_either_side_with_the_rest():
    ref = torch.full((1, 3, 40, 80), 0.5)
    rec = ref.clone()
    rec[..., :16] += 0.2
    rec[..., -16:] += 0.2
    rec[..., 16:-16] += 0.1
    assert value(Seam(), ref, rec, "seam_ratio") == pytest.approx(4, rel=1e-5)


def test_an_error_that_is_the_same_everywhere_has_a_ratio_of_1():
    got = result(Seam(), levels(0.5, 0.2, height=40, width=80), levels(0.5, 0.3, height=40, width=80)).scores
    assert got["seam_ratio"].frames == pytest.approx([1, 1])
    assert got["seam_gradient"].frames == [0, 0]

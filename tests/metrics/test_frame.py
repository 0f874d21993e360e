from __future__ import annotations

import math

import pytest
import torch

from tests.metrics.clips import levels, lpips_package, pair, result, value
from vae3d.metrics import build_metrics
from vae3d.metrics.frame import Psnr, Sharpness, gradient_energy, upsampled_mean


def decibel(mse: float) -> float:
    return -10 * math.log10(mse)


def test_psnr_is_that_of_each_frame_and_their_mean():
    ref, rec = pair()
    expected = [decibel(error) for error in (ref.double() - rec.double()).square().mean((1, 2, 3)).tolist()]
    score = result(Psnr(), ref, rec).scores["psnr"]
    assert score.frames == pytest.approx(expected, abs=1e-6)
    assert score.value == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_psnr_of_the_video_is_that_of_all_its_pixels():
    ref, rec = levels(0, 0), levels(0.1, 0.5)
    scores = result(Psnr(), ref, rec).scores
    assert scores["psnr_video"].value == pytest.approx(decibel((0.01 + 0.25) / 2), abs=1e-6)
    assert scores["psnr"].value == pytest.approx((20 + decibel(0.25)) / 2, abs=1e-6)
    assert value(Psnr(pool="video"), ref, rec, "psnr") == scores["psnr_video"].value


def test_one_step_of_8_bits_is_48_decibels():
    assert value(Psnr(), levels(0), levels(1 / 255), "psnr") == pytest.approx(20 * math.log10(255), abs=1e-6)


def test_psnr_of_equal_frames_is_100_and_they_are_counted():
    ref, rec = pair()
    rec[1] = ref[1]
    got = result(Psnr(), ref, rec)
    assert got.scores["psnr"].frames[1] == 100
    assert got.counts == {"identical_frames": 1}
    assert value(Psnr(), ref, ref, "psnr_video") == 100


def test_psnr_above_100_is_100_but_its_frame_is_not_identical():
    ref = levels(0.5)
    rec = ref.clone()
    rec[0, 0, 0, 0] += 1e-4  # an MSE of 5e-11
    got = result(Psnr(), ref, rec)
    assert got.scores["psnr"].value == 100
    assert got.counts == {"identical_frames": 0}
    assert value(Psnr(floor=1e-45), ref, rec, "psnr") == pytest.approx(decibel(1e-8 / 192), abs=1e-2)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_bit_for_bit_that_of_the_package(trunks, net):
    ref, rec = pair(height=64, width=48)
    expected = lpips_package(net, trunks)(ref * 2 - 1, rec * 2 - 1).flatten().tolist()
    assert result(build_metrics([f"lpips_{net}"]), ref, rec).scores[f"lpips_{net}"].frames == expected


@pytest.mark.parametrize("net", ["alex", "vgg"])
@pytest.mark.parametrize("size", [(64, 64), (63, 90)])
def test_spatial_lpips_is_the_mean_of_the_packages_map(trunks, net, size):
    ref, rec = pair(2, *size)
    expected = lpips_package(net, trunks, spatial=True)(ref * 2 - 1, rec * 2 - 1).mean((1, 2, 3)).tolist()
    metrics = build_metrics([f"lpips_{net}"], settings={f"lpips_{net}": {"spatial": True}})
    plain, spatial = (value(m, ref, rec) for m in (build_metrics([f"lpips_{net}"]), metrics))
    assert result(metrics, ref, rec).scores[f"lpips_{net}"].frames == pytest.approx(expected, rel=1e-6)
    assert (spatial == pytest.approx(plain, rel=1e-6)) == (net == "vgg" and size == (64, 64))  # whole ratios


@pytest.mark.parametrize("size", [(7, 9), (8, 18), (4, 5), (20, 31)])
def test_mean_of_upsampled_maps_needs_no_upsampling(size):
    maps = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    upsampled = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampled_mean(maps, size), upsampled.mean((1, 2, 3)), rtol=0, atol=1e-6)


def test_lpips_of_vgg_is_computed_in_batches_of_bounded_memory(trunks, monkeypatch):
    from vae3d.metrics import networks

    ref, rec = pair(5, 32, 32)
    (metric,) = metrics = build_metrics(["lpips_vgg"])
    whole = result(metrics, ref, rec).scores["lpips_vgg"].frames
    sizes = []
    features = metric.network.unit_features
    monkeypatch.setattr(metric.network, "unit_features", lambda x: sizes.append(len(x)) or features(x))
    monkeypatch.setattr(networks, "MAX_BATCH_PIXELS", 8 * 32 * 32)
    assert result(metrics, ref, rec).scores["lpips_vgg"].frames == pytest.approx(whole, rel=1e-6)
    assert sizes == [2] * 4 + [1] * 2


def test_gradient_energy_is_that_of_the_steps_between_pixels():
    stripes = levels(0.0, height=4, width=4)
    stripes[..., 1::2] = 0.5  # every step along a row is 0.5, none along a column
    assert gradient_energy(stripes).tolist() == pytest.approx([0.25])


def test_half_the_contrast_has_a_quarter_of_the_sharpness():
    ref, _ = pair()
    assert value(Sharpness(floor=1e-12), ref, ref / 2 + 0.25) == pytest.approx(0.25, rel=1e-4)


def test_blur_lowers_sharpness_and_noise_raises_it():
    ref, noisy = pair()
    blurred = torch.nn.functional.avg_pool2d(ref, 3, 1, 1, count_include_pad=False)
    assert value(Sharpness(), ref, blurred) < 0.9
    assert value(Sharpness(), ref, noisy) > 1.1


def test_frames_without_detail_are_as_sharp_as_each_other():
    assert value(Sharpness(), levels(0.2), levels(0.7)) == 1.0

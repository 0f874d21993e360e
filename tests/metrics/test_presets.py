"""Presets give what their tools give, on the same frames."""

from __future__ import annotations

import math

import numpy as np
import piq
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from tests.metrics.clips import lpips_package, pair, result
from vae3d.metrics import PRESETS, MetricError, Score, build_metrics
from vae3d.metrics.presets import average

LENGTHS = (2, 5, 3)


def videos(lengths: tuple[int, ...] = LENGTHS, height: int = 48, width: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Pairs of unlike quality, in 8 bits."""
    pairs = [pair(n, height, width, noise=0.02 * (i + 1), seed=i) for i, n in enumerate(lengths)]
    return [(ref, (rec * 255).round() / 255) for ref, rec in pairs]


def scores(names: list[str], preset: str, clips: list[tuple[Tensor, Tensor]]) -> dict[str, list[Score]]:
    metrics = build_metrics(names, preset=preset)
    results = [result(metrics, *clip, chunk=2).scores for clip in clips]
    return {column: [r[column] for r in results] for column in results[0]}


def aggregate(name: str, preset: str, clips: list[tuple[Tensor, Tensor]], batch_size: int = 1) -> float:
    """A set's value as a report gives it."""
    (column,) = [c for c in scores([name], preset, clips) if c != "psnr_video"]
    return average(PRESETS[preset], column, scores([name], preset, clips)[column], batch_size)


def of_frames(*values: float) -> Score:
    return Score(math.fsum(values) / len(values), list(values))


# ---- VidTok


@pytest.mark.parametrize("size", [(256, 256), (384, 512), (383, 700), (48, 64)])
def test_vidtok_ssim_is_piqs(size):
    clips = videos((2, 1), *size)
    for (ref, rec), score in zip(clips, scores(["ssim"], "vidtok", clips)["ssim"], strict=True):
        expected = piq.ssim(rec, ref, data_range=1.0, reduction="none").tolist()
        assert score.frames == pytest.approx(expected, abs=1e-6)


def test_vidtok_psnr_is_piqs():
    ref, rec = videos((3,))[0]
    rec[1] = ref[1]
    expected = piq.psnr(rec.double(), ref.double(), data_range=1.0, reduction="none").tolist()
    (got,) = scores(["psnr"], "vidtok", [(ref, rec)])["psnr"]
    assert got.frames == pytest.approx(expected, abs=1e-6)
    assert got.frames[1] == pytest.approx(80)


def test_vidtok_averages_all_frames():
    clips = videos()
    every = torch.cat([piq.psnr(b.double(), a.double(), data_range=1.0, reduction="none") for a, b in clips])
    assert aggregate("psnr", "vidtok", clips) == pytest.approx(every.mean().item(), abs=1e-6)


@pytest.mark.parametrize("preset", ["vidtok", "tokenbench"])
def test_lpips_of_vidtok_and_tokenbench_is_vggs(trunks, preset):
    clips = videos((1, 2), 32, 48)
    values = [lpips_package("vgg", trunks)(a * 2 - 1, b * 2 - 1).flatten().numpy() for a, b in clips]
    expected = np.mean(np.concatenate(values) if preset == "vidtok" else [v.mean() for v in values])
    assert aggregate("lpips", preset, clips) == pytest.approx(expected, rel=1e-6)


# ---- torchmetrics


@pytest.mark.parametrize("size", [(48, 64), (33, 31)])
def test_torchmetrics_ssim(size):
    clips = videos(LENGTHS, *size)
    ref, rec = (torch.cat(x) for x in zip(*clips, strict=True))
    expected = structural_similarity_index_measure(rec, ref, data_range=1.0).item()
    assert aggregate("ssim", "torchmetrics", clips) == pytest.approx(expected, abs=1e-6)


def test_torchmetrics_psnr_pools_the_pixels_of_all_videos():
    clips = videos()
    clips[0][1][0] = clips[0][0][0]  # equal frames have no error
    ref, rec = (torch.cat(x).double() for x in zip(*clips, strict=True))
    expected = peak_signal_noise_ratio(rec, ref, data_range=1.0).item()
    assert aggregate("psnr", "torchmetrics", clips) == pytest.approx(expected, rel=1e-7)  # its ln 10 is in fp32
    assert abs(aggregate("psnr", "default", clips) - expected) > 0.1


def test_torchmetrics_psnr_has_no_cap_but_for_equal_sets():
    ref, rec = videos((1,), 256, 256)[0]
    assert aggregate("psnr", "torchmetrics", [(ref, ref)]) == 100
    rec = ref.clone()
    rec[0, 1, 100, 100] += 1 / 255
    expected = peak_signal_noise_ratio(rec.double(), ref.double(), data_range=1.0).item()
    assert aggregate("psnr", "torchmetrics", [(ref, rec)]) == pytest.approx(expected, rel=1e-7)
    assert expected > 100
    ref, rec = ref.repeat(2, 1, 1, 1), torch.cat([ref, rec])  # an equal frame has no error, not one of 100 dB
    assert aggregate("psnr", "torchmetrics", [(ref, rec)]) == pytest.approx(expected + 10 * math.log10(2), rel=1e-7)


# ---- TokenBench


def test_tokenbench_ssim_is_scikit_images_default():
    clips = videos((2, 1))

    def frame(a: Tensor, b: Tensor) -> float:
        a, b = ((x * 255).permute(1, 2, 0).numpy() for x in (a, b))
        return structural_similarity(a, b, data_range=255.0, channel_axis=-1)

    expected = np.mean([np.mean([frame(a, b) for a, b in zip(*clip, strict=True)]) for clip in clips])
    assert aggregate("ssim", "tokenbench", clips) == pytest.approx(expected, abs=1e-6)


def test_tokenbench_psnr_is_that_of_each_videos_pixels():
    clips = videos()
    values = []
    for ref, rec in clips:
        root = np.sqrt(((ref.double().numpy() - rec.double().numpy()) ** 2).mean()) * 255
        values.append(20 * np.log10(255 / (root + np.finfo(np.float32).eps)))
    assert aggregate("psnr", "tokenbench", clips) == pytest.approx(np.mean(values), abs=1e-6)


def test_tokenbench_psnr_of_equal_videos():
    ref, _ = pair(2)
    assert aggregate("psnr", "tokenbench", [(ref, ref)]) == pytest.approx(186.6, abs=0.01)


# ---- Open-Sora v1.2


def test_opensora_weighs_a_short_last_batch_as_a_whole_one():
    values = [of_frames(v) for v in (28.0, 30.0, 32.0, 34.0, 40.0)]
    assert average(PRESETS["opensora12"], "psnr", values, 2) == 34.0
    for preset, batch_size in (("opensora12", 1), ("opensora12", 5), ("default", 2)):
        assert average(PRESETS[preset], "psnr", values, batch_size) == pytest.approx(32.8, abs=1e-12)


def test_opensora_averages_the_frames_of_a_batch_at_each_time():
    values = [of_frames(10.0, 20.0), of_frames(30.0, 40.0), of_frames(50.0, 60.0, 70.0, 80.0)]
    expected = np.mean([20, 30, 50, 60, 70, 80])
    assert average(PRESETS["opensora12"], "psnr", values, 2) == pytest.approx(expected)


@pytest.mark.parametrize("preset", ["opensora12", "wfvae"])
def test_videos_of_unequal_length_cannot_be_in_one_batch(preset):
    values = [of_frames(1.0, 2.0), of_frames(3.0)]
    with pytest.raises(MetricError, match="cannot batch videos of different lengths or sizes; choose --num_frames"):
        average(PRESETS[preset], "psnr", values, 2)
    with pytest.raises(MetricError, match="cannot batch"):  # also if it has no pairs at all
        average(PRESETS[preset], "flolpips", [of_frames(1.0, 2.0), Score(None)], 2)


def test_a_video_without_a_value_does_not_shift_the_batches():
    values = [Score(None), Score(None), of_frames(1.0), of_frames(2.0), of_frames(6.0)]
    assert average(PRESETS["opensora12"], "flolpips", values, 2) == (1.5 + 6) / 2


@pytest.mark.parametrize("preset", ["opensora12", "wfvae"])
def test_lpips_of_opensora_and_wfvae_is_alexnets_spatial_one(trunks, preset):
    clips = videos((2, 2), 64, 80)
    theirs = lpips_package("alex", trunks, spatial=True)
    expected = np.mean([theirs(a * 2 - 1, b * 2 - 1).mean().item() for a, b in clips])
    assert aggregate("lpips", preset, clips) == pytest.approx(expected, rel=1e-6)


def test_opensora_has_the_default_psnr_and_ssim():
    clips = videos()
    for name in ("psnr", "ssim"):
        assert scores([name], "opensora12", clips) == scores([name], "default", clips)


# ---- WF-VAE


def wfvae_psnr(batch: list[tuple[Tensor, Tensor]]) -> float:
    """`cal_psnr.py` in fp64."""
    ref, rec = (torch.cat(x).double() for x in zip(*batch, strict=True))
    psnr = (20 * torch.log10(1 / (rec - ref).square().mean((1, 2, 3)).sqrt())).mean()
    return 100.0 if psnr == torch.inf else psnr.item()


def test_wfvae_averages_each_batch_of_frames():
    clips = videos((3, 3, 3))
    expected = np.mean([wfvae_psnr(clips[:2]), wfvae_psnr(clips[2:])])
    assert aggregate("psnr", "wfvae", clips, 2) == pytest.approx(expected, abs=1e-6)


def test_in_wfvae_one_equal_frame_makes_its_batch_100():
    clips = videos((3, 3, 3))
    clips[1][1][2] = clips[1][0][2]
    assert wfvae_psnr(clips[:2]) == 100
    assert aggregate("psnr", "wfvae", clips, 2) == pytest.approx((100 + wfvae_psnr(clips[2:])) / 2, abs=1e-6)


def test_in_wfvae_a_frame_that_is_almost_equal_does_not():
    clips = videos((2, 2), 256, 256)
    clips[0][1][1] = clips[0][0][1]
    clips[0][1][1, 0, 100, 100] += 1 / 255  # an MSE of 8e-11
    expected = wfvae_psnr(clips)
    assert expected < 60
    assert aggregate("psnr", "wfvae", clips, 2) == pytest.approx(expected, abs=1e-5)


# ---- all


@pytest.mark.parametrize("preset", PRESETS)
def test_no_value_at_all_is_none(preset):
    assert average(PRESETS[preset], "flolpips", [Score(None)] * 2, 2) is None
    assert average(PRESETS[preset], "flolpips", [], 2) is None


@pytest.mark.parametrize("preset", PRESETS)
def test_values_without_frames_are_averaged_over_videos(preset):
    assert average(PRESETS[preset], "psnr_video", [Score(30.0), Score(40.0)], 2) == 35


@pytest.mark.parametrize("preset", PRESETS)
def test_of_one_frame_all_averages_are_the_frame(preset):
    assert average(PRESETS[preset], "ssim", [of_frames(0.75)], 2) == 0.75
    assert average(PRESETS[preset], "psnr", [of_frames(30.0)], 2) == pytest.approx(30)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_of_a_preset_are_stated(quick, preset):
    names = ["psnr", "ssim", "lpips", "flolpips"]
    stated = {metric.name: metric.settings() for metric in build_metrics(names, preset=preset)}
    assert set(stated) == {"psnr", "ssim", PRESETS[preset].lpips, "flolpips"}
    for name, settings in PRESETS[preset].settings.items():
        assert settings.items() <= stated[name].items()

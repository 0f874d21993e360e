"""What holds for each metric of METRICS."""

from __future__ import annotations

import math

import pytest
import torch

from tests.metrics import clips as made
from tests.metrics.clips import pair
from vae3d.metrics import METRICS, MetricError, MetricSet, VideoResult, build_metrics
from vae3d.metrics.base import goodness
from vae3d.metrics.temporal import Flicker

NAMES = list(METRICS)
IDEAL = {
    **dict.fromkeys(("psnr", "psnr_video", "alpha_psnr", "tpsnr", "ws_psnr"), 100.0),
    **dict.fromkeys(("ssim", "ms_ssim", "alpha_ssim", "ws_ssim", "seam_ratio", "sharpness"), 1.0),
    **dict.fromkeys(("lpips_alex", "lpips_vgg", "tof", "tlp", "seam_gradient", "rfid", "rfvd"), 0.0),
    **dict.fromkeys(("flolpips", "flolpips_raft_large", "flolpips_raft_small"), 0.0),
    **dict.fromkeys(METRICS["polar"].kind.columns | METRICS["cube"].kind.columns, 100.0),
    **dict.fromkeys(METRICS["cube_lpips"].kind.columns, 0.0),
}


@pytest.fixture
def metrics(request: pytest.FixtureRequest, quick: object) -> MetricSet:
    return build_metrics([request.param])


each = pytest.mark.parametrize("metrics", NAMES, indirect=True)


def clips(metrics: MetricSet, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair that the metric takes, hardly larger than it must be; the reconstruction flickers and has a seam."""
    (metric,) = metrics
    side = max(33, metric.min_size)
    ref, rec = pair(max(count, metric.min_frames), side, side + 3)
    rec[::2] += 0.1
    rec[..., :2] += 0.1
    return ref, rec.clamp(0, 1)


def result(metrics: MetricSet, ref: torch.Tensor, rec: torch.Tensor, chunk: int | None = None) -> VideoResult:
    return made.result(metrics, *with_alpha(metrics, ref, rec), chunk)


def with_alpha(metrics: MetricSet, *videos: torch.Tensor) -> list[torch.Tensor]:
    """For metrics of alpha, the first colour is also alpha."""
    scored = any(metric.alpha for metric in metrics)
    return [torch.cat([video, video[:, :1]], 1) if scored else video for video in videos]


def values(metrics: MetricSet, ref: torch.Tensor, rec: torch.Tensor, chunk: int | None = None) -> dict[str, float]:
    """Of one video; distances between sets are taken over its frames, or over the video twice."""
    got = result(metrics, ref, rec, chunk)
    return metrics.aggregate([got, got])


@each
def test_scores_do_not_depend_on_the_chunks(metrics):
    ref, rec = clips(metrics, 4)
    whole = values(metrics, ref, rec)
    for chunk in (1, 3):
        assert values(metrics, ref, rec, chunk) == pytest.approx(whole, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_frames_of_any_precision_are_scored_in_fp32(quick, dtype):
    metrics = build_metrics(["psnr", "cube", "lpips_alex"])
    ref, rec = (video.to(dtype) for video in pair(2, 33, 36))
    assert made.result(metrics, ref, rec).scores == made.result(metrics, ref.float(), rec.float()).scores


@each
def test_frames_are_scored_once_beside_a_metric_of_pairs(metrics):
    ref, rec = clips(metrics, 4)
    alone = result(metrics, ref, rec, 3).scores
    both = result(MetricSet([*metrics, Flicker()]), ref, rec, 3).scores
    for column, score in alone.items():
        assert both[column].frames == pytest.approx(score.frames, rel=1e-6, abs=1e-8)


@each
@pytest.mark.smoke
def test_an_equal_video_has_the_ideal_score(metrics):
    ref, _ = clips(metrics)
    got = values(metrics, ref, ref)
    if "warping_error" in got:  # that of the original
        assert got["warping_error"] == got["warping_error_ori"]
    elif "flicker_rec" in got:
        assert (got["flicker_rec"], got["flicker_excess"]) == (got["flicker_ori"], 0)
    else:
        assert got == pytest.approx({column: IDEAL[column] for column in metrics.columns}, abs=1e-9)


@each
def test_a_worse_video_scores_worse_in_the_direction_that_is_stated(metrics):
    ref, rec = clips(metrics)
    ideal, got = values(metrics, ref, ref), values(metrics, ref, rec)
    assert got.keys() == metrics.columns.keys()
    for column, better in metrics.columns.items():
        if better is not None:
            assert goodness(got[column], better) < goodness(ideal[column], better), column
            assert got[column] != ideal[column]


@each
@pytest.mark.parametrize("kind", ["still", "black", "black reconstruction", "black original"])
def test_videos_without_content_or_motion_have_scores(metrics, kind):
    ref, rec = clips(metrics)
    if kind == "still":
        ref, rec = (x[:1].expand_as(x) for x in (ref, rec))
    if kind in ("black", "black original"):
        ref = torch.zeros_like(ref)
    if kind in ("black", "black reconstruction"):
        rec = torch.zeros_like(rec)
    for column, value in values(metrics, ref, rec).items():
        assert math.isfinite(value), column


@each
def test_a_single_frame_has_scores_but_no_motion(metrics):
    ref, rec = (x[:1] for x in clips(metrics))
    (metric,) = metrics
    if metric.min_frames > 1:
        with pytest.raises(MetricError, match="needs at least 10 frames; there are 1"):
            result(metrics, ref, rec)
        return
    for value in values(metrics, ref, rec).values():
        assert (value is None) == metric.pairs
        assert metric.pairs or math.isfinite(value)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("ssim", 11),
        ("ms_ssim", 161),
        ("lpips_alex", 31),
        ("lpips_vgg", 16),
        ("psnr", 1),
        ("seam", 8),
        ("polar", 6),
        ("cube", 2),
        ("cube_lpips", 62),
    ],
)
def test_no_larger_frames_are_required_than_the_formula_needs(quick, name, side):
    assert [metric.min_size for metric in build_metrics([name])] == [side]


@each
def test_the_smallest_size_is_scored_and_a_smaller_one_refused(metrics):
    (metric,) = metrics
    side = metric.min_size
    ref, rec = pair(max(2, metric.min_frames), side, side)
    assert all(math.isfinite(value) for value in values(metrics, ref, rec).values())
    assert metric.why_unsupported(len(ref), side, side, channels=4) is None
    if side > 1:
        reason = f"{metric.name} needs frames of at least {side} pixels; these are {side - 1}x{side}"
        assert metric.why_unsupported(len(ref), side - 1, side, channels=4) == reason
        with pytest.raises(MetricError, match=reason):
            result(metrics, ref[:, :, 1:], rec[:, :, 1:])


@each
def test_a_discarded_video_leaves_nothing_behind(metrics):
    ref, rec = clips(metrics)
    whole, counts = values(metrics, ref, rec), result(metrics, ref, rec).counts
    metrics.update(*with_alpha(metrics, ref, ref))
    metrics.reset()
    assert values(metrics, ref, rec) == whole
    assert result(metrics, ref, rec).counts == counts


@each
def test_results_are_named_as_the_metric_says(metrics):
    (metric,) = metrics
    got = result(metrics, *clips(metrics))
    assert got.scores.keys() | got.features.keys() == metrics.columns.keys()
    assert set(got.counts) == set(metric.count_columns)
    assert metric.name in METRICS


@pytest.mark.parametrize("which", ["original", "reconstruction"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("names", [["tof"], ["warping_error"], ["rfid", "psnr"]])
def test_a_pixel_that_is_not_finite_is_an_error_that_names_its_frame(quick, names, wrong, which):
    ref, rec = pair(5)
    (ref if which == "original" else rec)[4, 1, 20, 20] = wrong
    with pytest.raises(MetricError, match=f"the {which}: .* the first in frame 4"):
        result(build_metrics(names), ref, rec, chunk=3)


@each
def test_videos_that_differ_in_shape_are_refused(metrics):
    ref, rec = clips(metrics)
    for other in (rec[:-1], rec[..., 1:]):
        with pytest.raises(MetricError, match="the videos differ in shape"):
            metrics.update(ref, other)


def test_scores_are_in_real_fp32_whatever_the_program_allows(monkeypatch):
    """The switches only matter on GPUs; here it is seen that a metric finds them off and leaves them as they were."""
    from vae3d.metrics.frame import Psnr

    seen = []
    measure = Psnr.measure

    def spy(self, chunk):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return measure(self, chunk)

    monkeypatch.setattr(Psnr, "measure", spy)
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        metrics = build_metrics(["psnr"])
        metrics.update(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16))
        assert seen == [(False, False)]
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value

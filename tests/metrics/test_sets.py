"""Distances between sets of videos, and sets of metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.metrics.clips import frechet_distance, levels, pair, result, value
from vae3d.metrics import Metric, MetricError, MetricSet, VideoResult, build_metrics
from vae3d.metrics.base import Score
from vae3d.metrics.distribution import ROWS_KEPT, Features, Rfid, Rfvd, frechet
from vae3d.metrics.frame import AlphaPsnr, Psnr, Ssim
from vae3d.metrics.temporal import Flicker


def rows(count: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def gathered(*parts: torch.Tensor) -> Features:
    features = Features()
    for part in parts:
        features.add(part)
    return features


# ---- Features


def test_few_features_are_kept_as_they_are():
    a = rows(10)
    features = gathered(a[:3], a[3:])
    assert torch.equal(features.rows, a)
    assert features.moments.count == 0


def test_many_features_become_moments():
    a = rows(2 * ROWS_KEPT + 5)
    features = gathered(*a.split(100))
    assert len(features.rows) < ROWS_KEPT
    assert features.moments.count + len(features.rows) == len(a)
    features.moments.update(features.rows)
    torch.testing.assert_close(features.moments.cov(), a.double().T.cov(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [0, 7, ROWS_KEPT + 7])
def test_features_survive_a_file(tmp_path, count):
    features = gathered(*rows(count).split(1000))
    np.savez(tmp_path / "features.npz", **features.arrays())
    with np.load(tmp_path / "features.npz") as arrays:
        again = Features.from_arrays(arrays)
    assert torch.equal(again.rows, features.rows)
    assert again.moments.count == features.moments.count
    assert torch.equal(again.moments.mean, features.moments.mean)
    assert torch.equal(again.moments.scatter, features.moments.scatter)


# ---- distances


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("sizes", [(5, 20, 1), (ROWS_KEPT + 3, 30, 2)])
def test_the_distance_is_that_of_all_features_in_any_order(networks, sizes, order):
    total = sum(sizes)
    ref, rec = rows(total), rows(total) * 1.1 + 0.2 * rows(total, seed=1)
    videos = [(gathered(a), gathered(b)) for a, b in zip(ref.split(sizes), rec.split(sizes), strict=True)]
    distance, count, _ = Rfid(networks).combine(iter(videos[::order]))
    assert count == total
    assert distance == pytest.approx(frechet_distance(ref, rec), rel=1e-6)


def test_combining_leaves_the_videos_features_as_they_were(networks):
    videos = [(gathered(rows(ROWS_KEPT + 1, seed=i)), gathered(rows(9, seed=9 + i))) for i in range(2)]
    metric = Rfid(networks)
    assert metric.combine(videos) == metric.combine(videos)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_have_no_distance(networks, count):
    videos = [(gathered(rows(count)), gathered(rows(count)))]
    assert Rfid(networks).combine(videos) == (None, count, [f"rfid needs at least 2 samples; there are {count}"])
    assert Rfid(networks).aggregate([]) == {"rfid": None}


@pytest.mark.parametrize(
    ("name", "count", "warning"),
    [
        ("rfid", 2047, "rfid of N=2047 samples is not comparable"),
        ("rfid", 2048, "rfid of N=2048 samples: compare it only with the same N"),
        ("rfid", 10_000, None),
        ("rfvd", 399, "rfvd of N=399 samples is not comparable"),
        ("rfvd", 400, "rfvd of N=400 samples: compare it only with the same N"),
        ("rfvd", 2048, None),
    ],
)
def test_few_samples_are_warned_of(quick, name, count, warning):
    (metric,) = build_metrics([name])
    _, _, warnings = metric.combine([(gathered(rows(count)), gathered(rows(count)))])
    assert [doubt.startswith(warning or "-") for doubt in warnings] == [True] * bool(warning)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_rfid_takes_every_nth_frame_of_a_video(networks, chunk):
    ref, rec = pair(7)
    metric = Rfid(networks, stride=3)
    for _ in range(2):  # and of the next one
        of_ref, of_rec = result(metric, ref, rec, chunk).features["rfid"]
        assert torch.equal(of_ref.rows, metric.network(ref[::3]))
        assert torch.equal(of_rec.rows, metric.network(rec[::3]))


def test_rfid_among_metrics_of_pairs_sees_no_frame_twice(networks):
    ref, rec = pair(5)
    got = result(MetricSet([Flicker(), Rfid(networks)]), ref, rec, chunk=2)
    assert [len(features.rows) for features in got.features["rfid"]] == [5, 5]


def test_rfid_with_the_real_network(all_weights):
    (metric,) = metrics = build_metrics(["rfid"])
    ref, rec = (x[:, :, :8, :8] for x in pair(2, 32, 32))
    outputs = []
    metric.network.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    features = result(metrics, ref, rec).features["rfid"]
    assert [output.shape for output in outputs] == [(2, 2048)] * 2
    assert all(torch.equal(f.rows, output) for f, output in zip(features, outputs, strict=True))


def test_rfvd_of_a_video_is_i3ds_features_of_its_first_frames(networks):
    ref, rec = pair(20)
    metric = Rfvd(networks, frames=12)
    of_ref, of_rec = result(metric, ref, rec, chunk=5).features["rfvd"]
    seen = networks.i3d().seen
    assert [tuple(video.shape) for video in seen] == [(1, 3, 12, 40, 48)] * 2
    assert torch.equal(seen[0][0].transpose(0, 1), ref[:12])
    assert torch.equal(seen[1][0].transpose(0, 1), rec[:12])
    assert of_ref.rows.shape == of_rec.rows.shape == (1, 12)
    assert not torch.equal(of_ref.rows, of_rec.rows)


def test_rfvd_takes_16_frames_or_what_there_is(networks):
    for count, taken in ((30, 16), (11, 11)):
        result(Rfvd(networks), *pair(count, 16, 16))
        assert networks.i3d().seen[-1].shape[2] == taken


def test_rfvd_over_videos_is_one_distance(networks):
    metrics = MetricSet([Rfvd(networks)])
    results = [result(metrics, *pair(10, 16, 16, seed=seed)) for seed in range(4)]
    stacked = [torch.cat([r.features["rfvd"][i].rows for r in results]) for i in range(2)]
    assert metrics.aggregate(results)["rfvd"] == pytest.approx(frechet_distance(*stacked), rel=1e-6)


def test_rfvd_with_the_real_network(all_weights):
    (metric,) = metrics = build_metrics(["rfvd"])
    ref, _ = pair(10, 16, 16)
    seen = []
    metric.network.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
    of_ref, _ = result(metrics, ref, ref).features["rfvd"]
    assert seen == [((1, 3, 10, 224, 224), (1, 400))] * 2
    assert of_ref.rows.isfinite().all()


def test_rfvd_keeps_no_frame_that_it_does_not_need(networks):
    metric = Rfvd(networks, frames=10)
    metrics = MetricSet([metric])
    ref, rec = pair(30, 16, 16)
    for a, b in zip(ref.split(5), rec.split(5), strict=True):
        metrics.update(a.clone(), b.clone())
    for video in metric._videos:
        assert sum(part.untyped_storage().nbytes() for part in video) == 10 * 3 * 16 * 16 * 4


def test_too_few_frames_for_rfvd_are_refused(networks):
    metric = Rfvd(networks)
    with pytest.raises(MetricError, match="rfvd needs at least 10 frames; there are 9"):
        result(metric, *pair(9))
    with pytest.raises(MetricError, match=r"rfvd needs at least 10 frames; .*9"):
        Rfvd(networks, frames=9)
    assert metric.why_unsupported(9, 64, 64, channels=3) == "rfvd needs at least 10 frames; there are 9"


@pytest.mark.parametrize("name", ["rfid", "rfvd"])
def test_a_feature_that_is_not_finite_is_an_error(quick, monkeypatch, name):
    (metric,) = metrics = build_metrics([name])
    monkeypatch.setattr(metric.network, "forward", lambda x: torch.full((len(x), 4), torch.nan))
    monkeypatch.setattr(metric.network, "features", lambda x: torch.full((1, 4), torch.inf))
    with pytest.raises(MetricError, match=f"{name}: a feature is not finite"):
        result(metrics, *pair(10))


def test_a_distance_of_moments_is_that_of_rows(networks):
    a, b = rows(50), rows(60, seed=1)
    as_moments = gathered(a), gathered(b)
    for features in as_moments:
        features.moments.update(features.rows)
    assert frechet(*(f.moments for f in as_moments)) == pytest.approx(frechet_distance(a, b), rel=1e-9)


# ---- MetricSet


def test_a_set_gives_what_its_metrics_give(networks):
    ref, rec = pair(12)
    metrics = [Psnr(), Ssim(), Flicker(), Rfvd(networks)]
    together = result(MetricSet(metrics), ref, rec, chunk=5)
    for metric in metrics:
        alone = result(metric, ref, rec, chunk=5)
        assert alone.scores.items() <= together.scores.items()
        assert alone.counts.items() <= together.counts.items()
        assert alone.features.keys() <= together.features.keys()
    assert together.scores.keys() == {"psnr", "psnr_video", "ssim", "flicker_ori", "flicker_rec", "flicker_excess"}


def test_columns_are_those_of_all_metrics_in_their_order():
    metrics = MetricSet([Flicker(), Psnr()])
    assert list(metrics.columns) == ["flicker_ori", "flicker_rec", "flicker_excess", "psnr", "psnr_video"]
    assert metrics.columns["psnr"] is True
    assert metrics.columns["flicker_excess"] is None
    assert [metric.name for metric in metrics] == ["flicker", "psnr"]


def test_the_next_video_starts_from_zero():
    metrics = MetricSet([Flicker(), Psnr()])
    ref, rec = levels(0.1, 0.2), levels(0.1, 0.4)
    first = result(metrics, ref, rec)
    assert result(metrics, ref, rec) == first
    assert len(first.scores["flicker_rec"].frames) == 1  # no pair of two videos' frames


def test_a_failed_result_leaves_nothing_behind(networks):
    metrics = MetricSet([Psnr(), Rfvd(networks)])
    with pytest.raises(MetricError, match="rfvd needs"):
        result(metrics, *pair(5))
    got = result(metrics, *pair(10))
    assert len(got.scores["psnr"].frames) == 10


def test_a_set_says_which_metrics_cannot_score_a_video_and_why(networks):
    metrics = MetricSet([Psnr(), Ssim(), AlphaPsnr(), Rfvd(networks)])
    assert metrics.reasons(16, 64, 64, channels=4) == {}
    reasons = metrics.reasons(9, 8, 64, channels=3)
    assert list(reasons) == ["ssim", "alpha_psnr", "rfvd"]
    assert "8x64" in reasons["ssim"]
    ref, rec = pair(12)
    with pytest.raises(MetricError, match=metrics.reasons(12, 40, 48, channels=3)["alpha_psnr"]):
        metrics.update(ref, rec)


class FailsOnce(Psnr):
    """A PSNR whose second update runs out of memory, once."""

    updates = 0

    def measure(self, chunk):
        self.updates += 1
        if self.updates == 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().measure(chunk)


def test_a_failed_update_leaves_nothing_behind():
    metrics = MetricSet([Flicker(), FailsOnce()])
    ref, rec = pair(3)
    with pytest.raises(torch.OutOfMemoryError):
        result(metrics, ref, ref, chunk=1)
    assert result(metrics, ref, rec) == result(MetricSet([Flicker(), Psnr()]), ref, rec)


def test_a_video_whose_frames_failed_leaves_nothing_behind():
    metrics = MetricSet([Flicker(), Psnr()])
    ref, rec = pair(3)

    def broken():
        yield ref, ref
        raise MetricError("the file ends here")

    with pytest.raises(MetricError, match="the file ends here"):
        metrics.score(broken())
    assert metrics.score([(ref, rec)]) == result(MetricSet([Flicker(), Psnr()]), ref, rec)


def test_the_mean_over_videos_leaves_out_those_without_a_value():
    results = [VideoResult({"tpsnr": Score(v)}) for v in (30.0, None, 40.0)]

    class Some(Metric):
        name, columns = "tpsnr", {"tpsnr": True}

    assert MetricSet([Some()]).aggregate(results) == {"tpsnr": 35.0}
    assert MetricSet([Some()]).aggregate(results[1:2]) == {"tpsnr": None}


def test_videos_that_need_a_gradient_are_scored_without_one():
    ref, rec = levels(0.1, 0.2, height=16, width=16), levels(0.1, 0.4, height=16, width=16).requires_grad_()
    assert value(Ssim(), ref, rec) < 1  # through NumPy, which takes no tensor that needs one

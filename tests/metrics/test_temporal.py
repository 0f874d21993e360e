from __future__ import annotations

import lpips
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.metrics.clips import levels, lpips_package, pair, result, value
from vae3d.metrics import MetricError, MetricSet, build_metrics
from vae3d.metrics.frame import Lpips
from vae3d.metrics.networks import Networks
from vae3d.metrics.temporal import Flicker, FloLpips, TLpips, TOf, TPsnr, WarpingError, occluded, warp

# ---- flicker and tPSNR


def test_flicker_is_the_mean_change_of_a_pixel():
    got = result(Flicker(), levels(0.2, 0.5, 0.4), levels(0.2, 0.6, 0.3)).scores
    assert got["flicker_ori"].frames == pytest.approx([0.3, 0.1], abs=1e-6)
    assert got["flicker_rec"].frames == pytest.approx([0.4, 0.3], abs=1e-6)
    assert got["flicker_excess"].value == pytest.approx(0.15, abs=1e-6)


def test_a_smoother_video_has_negative_excess():
    assert value(Flicker(), levels(0.2, 0.5), levels(0.3, 0.4), "flicker_excess") == pytest.approx(-0.2, abs=1e-6)


def test_tpsnr_sees_an_alternating_error_and_not_a_constant_one():
    ref, _ = pair(4)
    ref = 0.25 + ref / 2
    sign = torch.tensor([1.0, -1, 1, -1])[:, None, None, None]
    assert value(TPsnr(), ref, ref + 0.02) == 100
    assert value(TPsnr(), ref, ref + 0.02 * sign) == pytest.approx(-20 * torch.tensor(0.04).log10().item(), abs=1e-3)


# ---- tOF


def texture(count: int, step: int, size: int = 64) -> Tensor:
    """Smooth noise that moves left by `step` pixels per frame."""
    noise = torch.rand(1, 3, 16, 40, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(noise, (size, 160), mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.cat([wide[..., step * t : step * t + size] for t in range(count)])


def test_tof_is_the_length_of_the_missing_motion():
    moving, still = texture(3, 2), texture(1, 0).repeat(3, 1, 1, 1)
    assert value(TOf(), moving, moving) == 0
    assert value(TOf(), moving, still) == pytest.approx(2, rel=0.1)
    assert value(TOf(), moving, texture(3, 4)) == pytest.approx(2, rel=0.25)


def test_tof_is_farnebacks_flow_on_grey_frames():
    import cv2
    import numpy as np

    ref, rec = pair(2, 40, 48)
    flows = []
    for clip in (ref, rec):
        rgb = (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()
        first, second = (cv2.cvtColor(np.ascontiguousarray(frame[..., ::-1]), cv2.COLOR_BGR2GRAY) for frame in rgb)
        flows.append(cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0).astype(float))
    expected = np.sqrt(((flows[0] - flows[1]) ** 2).sum(-1)).mean()
    assert value(TOf(), ref, rec) == pytest.approx(expected, abs=1e-5)


# ---- tLP


def test_tlp_is_the_difference_of_the_lpips_of_neighbours(networks, all_weights):
    ref, rec = pair(3)
    theirs = lpips_package("alex", all_weights)
    changes = [theirs(x[:-1] * 2 - 1, x[1:] * 2 - 1).flatten() for x in (ref, rec)]
    expected = (100 * (changes[0] - changes[1]).abs()).tolist()
    assert result(TLpips(networks), ref, rec).scores["tlp"].frames == pytest.approx(expected, rel=1e-4)


# ---- warping error


class Flow(torch.nn.Module):
    """Gives one motion to every later frame and another one back."""

    def __init__(self, forward: Tensor, backward: Tensor) -> None:
        super().__init__()
        self.motions = forward, backward

    def forward(self, frames: Tensor) -> Tensor:
        return self.motions[0].expand(len(frames) - 1, 2, *frames.shape[-2:])

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        return self.motions[1].expand(len(first), 2, *first.shape[-2:])


class KnownFlow(Networks):
    def __init__(self, forward: tuple[float, float] | Tensor, backward: tuple[float, float] | Tensor) -> None:
        super().__init__()
        vectors = (torch.as_tensor(v, dtype=torch.float32) for v in (forward, backward))
        self._flow = Flow(*(v if v.ndim == 4 else v[None, :, None, None] for v in vectors))

    def flow(self, name: str) -> torch.nn.Module:
        return self._flow


def moving_square(count: int = 4, by: tuple[int, int] = (3, 2)) -> Tensor:
    """A textured square that moves over black, by (x, y) pixels per frame; it never meets the border."""
    square = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = torch.zeros(count, 3, 32, 40)
    for t in range(count):
        x, y = 6 + by[0] * t, 6 + by[1] * t
        frames[t, :, y : y + 8, x : x + 8] = square
    return frames


def test_warping_undoes_a_translation():
    frames = moving_square()
    back = warp(frames[1:], torch.tensor([3.0, 2.0])[None, :, None, None].expand(3, 2, 32, 40))
    torch.testing.assert_close(back, frames[:-1], rtol=0, atol=1e-5)


def test_warping_samples_between_pixels_and_repeats_the_border():
    image = torch.tensor([0.0, 1.0, 4.0]).view(1, 1, 1, 3)
    motion = torch.tensor([0.5, 0.0])[None, :, None, None].expand(1, 2, 1, 3)
    assert warp(image, motion).flatten().tolist() == pytest.approx([0.5, 2.5, 4.0], abs=1e-6)
    assert warp(image, -4 * motion).flatten().tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_translation_along_the_flow_has_no_warping_error():
    frames = moving_square()
    got = result(WarpingError(KnownFlow((3, 2), (-3, -2))), frames, frames)
    assert got.scores["warping_error"].value == pytest.approx(0, abs=1e-9)
    assert got.counts == {"warping_error_hidden_frames": 0}


def test_warping_error_is_the_mean_square_of_what_flickers():
    ref = moving_square()
    rec = ref / 2 + levels(0.1, 0.3, 0.2, 0.2, height=32, width=40)
    got = result(WarpingError(KnownFlow((3, 2), (-3, -2))), ref, rec).scores
    assert got["warping_error"].frames == pytest.approx([0.04, 0.01, 0], abs=1e-6)
    assert got["warping_error_ori"].frames == pytest.approx([0, 0, 0], abs=1e-9)


def test_warping_error_leaves_out_what_is_occluded():
    backward = torch.zeros(1, 2, 32, 40)
    backward[:, 0, :, 20:] = 5.0
    ref = torch.zeros(2, 3, 32, 40)
    rec = ref.clone()
    rec[1, ..., 20:] = 1.0  # an error that is hidden
    rec[1, ..., :5] = 0.5
    got = value(WarpingError(KnownFlow((0, 0), backward)), ref, rec, "warping_error")
    assert got == pytest.approx(0.25 * 5 / 20, abs=1e-6)


def test_pairs_of_which_nothing_is_visible_have_no_error_and_are_counted():
    ref, rec = pair(3, 32, 40)
    got = result(WarpingError(KnownFlow((9, 0), (9, 0))), ref, rec)
    assert got.scores["warping_error"].frames == [0, 0]
    assert got.counts == {"warping_error_hidden_frames": 2}


def test_occluded_is_where_the_motion_back_does_not_return():
    forward, backward = torch.zeros(2, 1, 2, 4, 6)
    backward[0, 0, 1, 2] = 2.0  # 4 > 0.01 * 4 + 0.5
    backward[0, 0, 2, 4] = 0.7  # 0.49 < 0.01 * 0.49 + 0.5
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(occluded(forward, backward)[0, 0], expected)


def test_occlusion_looks_at_the_motion_back_where_the_pixel_went():
    forward, backward = torch.zeros(2, 1, 2, 4, 8)
    forward[:, 0] = 3.0
    backward[:, 0] = -3.0
    backward[0, 0, 2, 6] = 0.0  # where the pixel (2, 3) went
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2, 3] = True
    assert torch.equal(occluded(forward, backward)[0, 0], expected)


def test_occluded_is_where_the_motion_has_an_edge():
    forward = torch.zeros(1, 2, 4, 6)
    forward[..., 3:] = 1.0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:, 2] = True  # 1 + 1 > 0.01 * 0 + 0.002
    assert torch.equal(occluded(forward, -forward)[0, 0], expected)


def test_fast_motion_may_change_more_from_pixel_to_pixel():
    for speed, edge in ((0.0, True), (5.0, False)):  # 0.1^2 > 0.002, but not > 0.01 * 5^2 + 0.002
        forward = torch.zeros(1, 2, 4, 6)
        forward[:, 1] = speed
        forward[:, 1, :, 3:] += 0.1
        assert occluded(forward, -forward)[0, 0, 0, 2].item() is edge


# ---- FloLPIPS


def published_flolpips(ref: Tensor, rec: Tensor, flow: torch.nn.Module, theirs: torch.nn.Module) -> list[float]:
    """Frame by frame as danier97/flolpips computes it, with the networks of the lpips package."""
    scores = []
    for t in range(len(ref) - 1):
        move_ref, move_rec = (flow.flow(x[t : t + 1], x[t + 1 : t + 2]) for x in (ref, rec))
        features = [theirs.net(theirs.scaling_layer(x[t : t + 1] * 2 - 1)) for x in (ref, rec)]
        total = 0.0
        for a, b, lin in zip(*features, theirs.lins, strict=True):
            error = lin((lpips.normalize_tensor(a) - lpips.normalize_tensor(b)) ** 2)
            difference = F.interpolate(move_ref - move_rec, error.shape[-2:], mode="bilinear", align_corners=False)
            length = (difference[:, 0] ** 2 + difference[:, 1] ** 2).sqrt()[:, None]
            total += (error * length / length.sum()).sum().item()
        scores.append(total)
    return scores


@pytest.mark.parametrize("motion", ["pwc", "raft_small"])
def test_flolpips_is_the_published_formula(real_networks, all_weights, motion):
    ref, rec = pair(3, 40, 72)
    metric = FloLpips(real_networks, motion)
    expected = published_flolpips(ref, rec, real_networks.flow(motion), lpips_package("alex", all_weights))
    assert result(metric, ref, rec).scores[metric.name].frames == pytest.approx(expected, rel=1e-5)
    assert result(metric, rec, ref).scores[metric.name].frames == pytest.approx(expected, rel=1e-5)


def test_flolpips_with_raft_large(all_weights):
    ref, rec = pair(2, 32, 40)
    (metric,) = metrics = build_metrics(["flolpips_raft_large"])
    (got,) = result(metrics, ref, rec).scores["flolpips_raft_large"].frames
    assert metric.networks.flow("raft_large").net == "raft_large"
    plain = value(Lpips(metric.networks), ref[:1], rec[:1])
    assert 0 < got != pytest.approx(plain, rel=1e-3)


def test_flolpips_of_equal_videos_is_0_and_counted(networks):
    ref, _ = pair(3)
    got = result(FloLpips(networks), ref, ref)
    assert got.scores["flolpips"].frames == [0, 0]
    assert got.counts == {"flolpips_uniform_frames": 2}


def test_flolpips_without_motion_to_tell_apart_is_lpips(networks):
    ref, rec = pair(3)
    networks.flow("raft_large").pixels = 0.0
    plain = result(Lpips(networks), ref, rec).scores["lpips_alex"].frames
    got = result(FloLpips(networks, "raft_large"), ref, rec)
    assert got.scores["flolpips_raft_large"].frames == pytest.approx(plain[:2], rel=1e-5)
    assert got.counts == {"flolpips_raft_large_uniform_frames": 2}


def test_only_frames_without_motion_are_counted(networks):
    ref, rec = pair(4)
    rec[2:] = ref[2:]
    assert result(FloLpips(networks), ref, rec).counts == {"flolpips_uniform_frames": 1}


def test_zero_flow_nan_is_an_error_that_names_the_frames(quick):
    ref, rec = pair(4)
    rec[2:] = ref[2:]
    with pytest.raises(MetricError, match="flolpips of frames 2 and 3 is nan"):
        result(build_metrics(["flolpips"], preset="opensora12"), ref, rec)


def test_pwc_nets_warp_is_chosen_and_stated(all_weights):
    ref, rec = pair(2, 40, 72)
    scores = []
    for warping in ("flolpips", "exact"):
        (metric,) = metrics = build_metrics(["flolpips"], pwc_warp=warping)
        assert metric.settings() == {"zero_flow": "uniform", "pwc_warp": warping}
        scores.append(value(metrics, ref, rec))
    assert scores[0] != scores[1]


# ---- shared


def test_metrics_share_features_and_flows(networks, monkeypatch):
    ref, rec = pair(3)
    trunk, flows = networks.lpips("alex"), networks.flow("raft_large")
    calls = []
    features = trunk.unit_features
    monkeypatch.setattr(trunk, "unit_features", lambda x: calls.append(len(x)) or features(x))
    metrics = [Lpips(networks), TLpips(networks), FloLpips(networks, "raft_large"), WarpingError(networks)]
    alone = {column: s.value for metric in metrics for column, s in result(metric, ref, rec).scores.items()}
    calls.clear(), flows.seen.clear()
    together = result(MetricSet(metrics), ref, rec).scores
    assert calls == [3, 3]  # the original and the reconstruction
    assert len(flows.seen) == 2
    assert {column: score.value for column, score in together.items()} == alone


def test_flows_are_computed_in_batches_of_bounded_memory(networks, monkeypatch):
    ref, rec = pair(5)
    metric, flows = FloLpips(networks, "raft_large"), networks.flow("raft_large")
    whole = result(metric, ref, rec).scores[metric.name].frames
    flows.seen.clear()
    monkeypatch.setattr("vae3d.metrics.networks.MAX_BATCH_PIXELS", 2 * 40 * 48)
    assert result(metric, ref, rec).scores[metric.name].frames == pytest.approx(whole, rel=1e-6)
    assert [len(frames) for frames in flows.seen] == [3, 3] * 2  # two pairs share a frame


def test_a_flow_of_neighbours_in_two_chunks_is_not_lost(networks):
    metric = FloLpips(networks, "raft_large")
    ref, rec = pair(5)
    assert len(result(metric, ref, rec, chunk=2).scores[metric.name].frames) == 4
    assert [len(frames) for frames in networks.flow("raft_large").seen] == [2, 2, 3, 3, 2, 2]

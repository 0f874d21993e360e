"""Losses against flicker: values by hand, and where they apply."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.losses.test_erp import clip_and_error, loaded, loss_of
from tests.losses.test_objective import as_clip
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.pixel import L1
from vae3d.losses.temporal import FlowLoss, TemporalDifference, WarpedConsistency, WindowConsistency
from vae3d.models.interface import attach_decoder
from vae3d.models.taehv import TAEHV
from vae3d.optical_flow import dis_flow
from vae3d.pretrained.raft import Raft
from vae3d.pretrained.weights import WeightsMissing
from vae3d.types import Reconstruction


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moving(frames: int, side: int, speed: int) -> torch.Tensor:
    """Smooth noise that moves to the left by `speed` pixels per frame, [1, 3, T, side, side] in [-1, 1]."""
    still = F.interpolate(noise(1, 3, 12, 16), (side, 2 * side), mode="bicubic").clamp(-2, 2) / 2
    return torch.stack([still[..., speed * i : speed * i + side] for i in range(frames)], 2)


# ---- temporal difference


def test_temporal_difference_by_hand():
    error = torch.tensor([0.5, 0.5, 0.1, -0.2]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 8, 8)
    clip, out = clip_and_error(error)
    loss = loss_of(TemporalDifference(), clip, out)
    assert loss.item() == pytest.approx((0 + 0.4 + 0.3) / 3, rel=1e-6)
    assert loss_of(TemporalDifference(), clip, out, reduction="sum").item() == pytest.approx(0.7 / 3 * 3 * 64, rel=1e-6)
    loss.backward()
    assert out.video.grad[0, 0, :, 0, 0].sign().tolist() == [0, 1, 0, -1]


def test_pairs_with_an_invalid_pixel_do_not_count():
    error = torch.zeros(1, 3, 3, 4, 4)
    error[:, :, 1] = 0.5
    valid = torch.ones(1, 1, 3, 4, 4, dtype=torch.bool)
    valid[:, :, 1, :2] = False  # half of the frame in the middle, where the reconstruction is replaced
    clip, out = clip_and_error(error, valid)
    assert loss_of(TemporalDifference(), clip, out).item() == pytest.approx(0.5)
    valid[:, :, 1] = False
    clip, out = clip_and_error(error, valid)
    assert loss_of(TemporalDifference(), clip, out).item() == 0


@pytest.mark.parametrize("term", [TemporalDifference(), WarpedConsistency(), WindowConsistency()])
def test_single_images_have_no_such_loss(term):
    clip, out = clip_and_error(torch.full((1, 3, 1, 16, 16), 0.5))
    terms = {"l1": WeightedTerm(L1(), 1.0), "t": WeightedTerm(term, 1.0)}
    loss, metrics = Objective(terms, "mean")(clip, out, 0)
    assert loss.item() == pytest.approx(0.5)
    assert "loss/t" not in metrics


# ---- warped consistency


def test_of_a_still_clip_it_is_the_change_of_the_reconstruction():
    video = noise(1, 3, 1, 16, 16).clamp(-1, 1).expand(-1, -1, 3, -1, -1)
    rec = video + torch.tensor([0.0, 0.2, 0.1]).view(1, 1, 3, 1, 1)
    out = Reconstruction(rec, None, video)
    assert loss_of(WarpedConsistency(), as_clip(video), out).item() == pytest.approx(0.15, rel=1e-5)


def test_pixels_that_the_flow_does_not_explain_count_less():
    """A grey clip whose brightness jumps by 0.1 of [0, 1]: no motion, and a mask of exp(-50 (3 x 0.1)^2)."""
    video = torch.tensor([-0.1, 0.1]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 16, 16)
    loss = loss_of(WarpedConsistency(), as_clip(video), Reconstruction(video, None, video))
    assert loss.item() == pytest.approx(0.2 * math.exp(-50 * 0.09), rel=1e-4)
    assert loss_of(WarpedConsistency(alpha=0), as_clip(video), Reconstruction(video, None, video)).item() == (
        pytest.approx(0.2, rel=1e-5)
    )


def test_it_follows_the_motion():
    video = moving(3, 48, speed=2)
    flow = dis_flow(*(video[0, :, i : i + 1].transpose(0, 1) / 2 + 0.5 for i in (1, 0)))
    inside = flow[..., 8:-8, 8:-8]
    assert inside[:, 0].mean().item() == pytest.approx(2, abs=0.2)
    assert inside[:, 1].abs().mean() < 0.2
    change = video.diff(dim=2).abs().mean().item()
    still = loss_of(WarpedConsistency(), as_clip(video), Reconstruction(video, None, video)).item()
    flickering = video + 0.2 * torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1, 1)
    unsteady = loss_of(WarpedConsistency(), as_clip(video), Reconstruction(flickering, None, video)).item()
    assert still < 0.2 * change
    assert unsteady > 3 * still


def test_small_frames_have_no_flow():
    clip, out = clip_and_error(torch.zeros(1, 3, 2, 8, 16))
    with pytest.raises(ValueError, match="at least 12 pixels; these are 8x16"):
        loss_of(WarpedConsistency(), clip, out)


@pytest.mark.parametrize("term", [FlowLoss(), WarpedConsistency(flow="raft_large")])
def test_missing_weights_of_raft_are_named(term, monkeypatch, tmp_path):
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsMissing, match="raft_large_C_T_SKHT_V2-ff5fadd5"):
        term.find_weights()


# ---- flow


def test_flow_loss_equals_the_published_formula(all_weights):
    """Both directions at half size, enlarged and doubled; the mean of |difference| over components and directions."""
    video = moving(2, 32, speed=2)
    rec = (video + 0.05 * noise(*video.shape)).requires_grad_()
    loss = loss_of(loaded(FlowLoss(net="raft_small")), as_clip(video), Reconstruction(rec, None, video))
    raft = Raft("raft_small").load()

    def flows(x: torch.Tensor) -> torch.Tensor:
        small = F.interpolate(x, (2, 16, 16), mode="trilinear") / 2 + 0.5
        a, b = small[:, :, 0], small[:, :, 1]
        both = torch.stack([raft.flow(a, b), raft.flow(b, a)], 2)
        return 2 * F.interpolate(both, (2, 32, 32), mode="trilinear")

    with torch.no_grad():
        published = (flows(video) - flows(rec)).abs().mean()
    assert published > 0
    torch.testing.assert_close(loss.detach(), published, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, rec)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


# ---- windows


def tiny_taehv() -> TAEHV:
    torch.manual_seed(0)
    return TAEHV(variant="taew2_1", channels=4, decoder_channels=[4, 4, 4, 4])


@pytest.mark.parametrize("latents", [False, True])
def test_windows_by_hand(latents):
    model, video = tiny_taehv(), noise(2, 3, 17, 16, 16).clamp(-1, 1)
    out = attach_decoder(model(video), model)
    term = WindowConsistency(num_frames=9, step=4, latents=latents)
    loss = loss_of(term, as_clip(video), out)
    windows = [model(video[:, :, start : start + 9]) for start in (0, 4, 8)]
    pairs = [(a, b) for a, b in zip(windows, windows[1:], strict=False)]
    expected = sum((a.video[:, :, 4:] - b.video[:, :, :5]).abs().mean() for a, b in pairs) / 2
    if latents:  # three latents of nine frames; a step is one of them
        difference = sum((a.z[:, :, 1:] - b.z[:, :, :-1]).abs().mean() for a, b in pairs) / 2
        expected = expected + difference * 3 * 3 * 8 * 8 / 16
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_codes_frames_alone_is_consistent():
    video = noise(1, 3, 7, 16, 16)
    out = Reconstruction(video, None, video, reconstruct=lambda v: Reconstruction(v.tanh(), None, v))
    assert loss_of(WindowConsistency(num_frames=3, step=2), as_clip(video), out).item() == 0


def test_windows_that_do_not_fit_are_named():
    video = noise(1, 3, 12, 16, 16)
    out = Reconstruction(video, None, video, reconstruct=lambda v: Reconstruction(v, None, v))
    with pytest.raises(ValueError, match=r"12 frames does not hold two windows of 9 frames, 4\s+apart"):
        loss_of(WindowConsistency(), as_clip(video), out)
    with pytest.raises(ValueError, match="step is 9, num_frames 9"):
        WindowConsistency(step=9)
    with pytest.raises(ValueError, match="attach_decoder"):
        loss_of(WindowConsistency(num_frames=5), as_clip(video), replace(out, reconstruct=None))

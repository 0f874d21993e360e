from __future__ import annotations

import pytest
import torch
from einops import rearrange

from tests import tiny
from vae3d.losses.latent import KL, Identity, LatentL1
from vae3d.losses.objective import ErrorMap, Objective, Term, WeightedTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel import L1, MSE
from vae3d.types import ClipBatch, Posterior, Reconstruction, SpatialPath


def as_clip(video: torch.Tensor) -> ClipBatch:
    return ClipBatch(video, torch.zeros(len(video), dtype=torch.long), [""] * len(video))


def reconstruction(video: torch.Tensor, seed: int = 1) -> Reconstruction:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    b, _, t, h, w = video.shape
    posterior = Posterior(noise(b, 4, 2, h // 8, w // 8), noise(b, 4, 2, h // 8, w // 8))
    path = SpatialPath(noise(b, 4, t, h // 8, w // 8), noise(b, 4, t, h // 8, w // 8).requires_grad_())
    rec = (video + 0.1 * noise(*video.shape)).requires_grad_()
    return Reconstruction(rec, posterior, posterior.sample(generator), path)


def published_loss(video, rec, posterior, perceptual, perceptual_weight=0.1, kl_weight=1e-6):
    """VAELoss of Open-Sora v1.2 written out: sums over a frame, mean over frames; KL sums over a clip."""
    x, y = (rearrange(v, "b c t h w -> (b t) c h w") for v in (video, rec))
    error = (x - y).abs()
    if perceptual is not None:
        error = error + perceptual_weight * perceptual(x, y)
    nll = error.sum() / error.shape[0]
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / posterior.mean.shape[0]
    return nll + kl_weight * kl


def test_stage3_equals_the_published_loss_and_its_gradient(trunks):
    video = torch.rand(2, 3, 3, 32, 40) * 2 - 1
    out = reconstruction(video)
    lpips = LPIPS(frame_batch=2)
    lpips.load("cpu")
    objective = Objective(
        {"l1": WeightedTerm(L1(), 1.0), "lpips": WeightedTerm(lpips, 0.1), "kl": WeightedTerm(KL(), 1e-6)}, "sum"
    )
    loss, metrics = objective(as_clip(video), out, step=0)
    (ours,) = torch.autograd.grad(loss, out.video)
    expected = published_loss(video, out.video, out.posterior, lpips.network)
    (theirs,) = torch.autograd.grad(expected, out.video)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    assert metrics["loss/l1"] / metrics["loss_mean/l1"] == pytest.approx(3 * 32 * 40)
    torch.testing.assert_close(sum(v for k, v in metrics.items() if k.startswith("loss_weighted/")), loss.detach())


def test_stage1_and_2_equal_the_published_loss_on_latents():
    video = torch.rand(2, 3, 1, 32, 40) * 2 - 1
    out = reconstruction(video)
    out.z = torch.randn_like(out.spatial.latent).requires_grad_()
    objective = Objective({"latent": WeightedTerm(LatentL1(), 1.0), "identity": WeightedTerm(Identity(), 1.0)}, "sum")
    loss, _ = objective(as_clip(video), out, step=0)
    x = out.spatial.latent
    expected = (x - out.spatial.latent_rec).abs().sum() / 2 + (x - out.z).abs().sum() / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_mse_is_the_mean_square_under_the_mean_reduction():
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    out = reconstruction(video)
    loss, _ = Objective({"mse": WeightedTerm(MSE(), 2.0)}, "mean")(as_clip(video), out, step=0)
    torch.testing.assert_close(loss, 2 * (video - out.video).square().mean())


def test_reductions_differ_by_the_number_of_elements():
    video = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    out = reconstruction(video)
    for term, elements in ((L1(), 3 * 16 * 16), (LatentL1(), 4 * 2 * 2), (KL(), 4 * 2 * 2 * 2)):
        value = {r: Objective({"t": WeightedTerm(term, 1.0)}, r)(as_clip(video), out, 0)[0] for r in ("sum", "mean")}
        assert value["sum"].item() == pytest.approx(value["mean"].item() * elements, rel=1e-5)


def test_kl_has_its_closed_form():
    posterior = Posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, torch.e]]))
    expected = 0.5 * (1.0 + 1.0 - 1.0 - 0.0) + 0.5 * (0.0 + torch.e**torch.e - 1.0 - torch.e)
    assert posterior.kl().item() == pytest.approx(expected, rel=1e-5)
    moments = torch.cat([torch.zeros(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 99.0)], 1)
    assert Posterior.from_moments(moments).logvar.item() == 20.0


def test_kl_of_a_video_sums_over_every_axis_but_the_batch():
    """diffusers' distribution sums over three axes only, which omits the width of videos."""
    posterior = Posterior(torch.ones(2, 4, 3, 2, 5), torch.zeros(2, 4, 3, 2, 5))
    torch.testing.assert_close(posterior.kl(), torch.full((2,), 0.5 * 4 * 3 * 2 * 5))


def test_target_of_the_latent_losses_gets_no_gradient():
    out = reconstruction(torch.rand(1, 3, 1, 16, 16))
    out.spatial.latent.requires_grad_()
    out.z = torch.randn_like(out.spatial.latent).requires_grad_()
    objective = Objective({"latent": WeightedTerm(LatentL1(), 1.0), "identity": WeightedTerm(Identity(), 1.0)}, "sum")
    objective(as_clip(torch.rand(1, 3, 1, 16, 16)), out, 0)[0].backward()
    assert out.spatial.latent.grad is None
    assert out.spatial.latent_rec.grad is not None
    assert out.z.grad is not None


def test_identity_applies_to_single_frames_only():
    video = torch.rand(1, 3, 2, 16, 16)
    assert Identity()(as_clip(video), reconstruction(video)) is None
    with pytest.raises(ValueError, match=r"none of the loss terms \['identity'\] applies to a clip of 2 frames"):
        Objective({"identity": WeightedTerm(Identity(), 1.0)}, "sum")(as_clip(video), reconstruction(video), 0)


def test_identity_needs_equal_channels():
    video = torch.rand(1, 3, 1, 16, 16)
    out = reconstruction(video)
    out.z = torch.randn(1, 8, 1, 2, 2)
    with pytest.raises(ValueError, match="2D latents of 4 channels with temporal latents of 8"):
        Identity()(as_clip(video), out)


def test_latent_losses_need_a_two_stage_model():
    video = torch.rand(1, 3, 1, 16, 16)
    out = reconstruction(video)
    out.spatial = None
    with pytest.raises(ValueError, match="need a model with a 2D VAE inside"):
        LatentL1()(as_clip(video), out)


class Counting(Term):
    needs_pixels = False

    def __init__(self):
        self.calls = 0

    def __call__(self, clip, out):
        self.calls += 1
        return ErrorMap(torch.tensor([2.0, 4.0], requires_grad=True), 10)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (200, 0.0), (350, 0.25), (500, 0.5), (5000, 0.5)])
def test_weights_ramp_linearly(step, weight):
    objective = Objective({"t": WeightedTerm(Counting(), 0.5, (200, 500))}, "mean")
    loss, metrics = objective(as_clip(torch.zeros(1, 3, 1, 4, 4)), reconstruction(torch.zeros(1, 3, 1, 8, 8)), step)
    assert loss.item() == pytest.approx(3.0 * weight)
    assert metrics["loss/t"].item() == 3.0


def test_a_term_of_weight_zero_costs_nothing_unless_it_is_to_be_logged():
    silent, logged, kept = Counting(), Counting(), Counting()
    objective = Objective(
        {"a": WeightedTerm(silent, 0.0), "b": WeightedTerm(logged, 0.0, log=True), "c": WeightedTerm(kept, 1.0)}, "sum"
    )
    _, metrics = objective(as_clip(torch.zeros(1, 3, 1, 4, 4)), reconstruction(torch.zeros(1, 3, 1, 8, 8)), 0)
    assert (silent.calls, logged.calls, kept.calls) == (0, 1, 1)
    assert "loss/a" not in metrics
    assert metrics["loss_weighted/b"] == 0.0


def test_losses_are_summed_in_fp32_under_autocast():
    video = torch.rand(1, 3, 2, 16, 16)
    out = reconstruction(video)
    out.video = out.video.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = Objective({"l1": WeightedTerm(L1(), 1.0), "kl": WeightedTerm(KL(), 1e-6)}, "sum")(
            as_clip(video), out, 0
        )
    assert loss.dtype == metrics["loss/l1"].dtype == torch.float32
    expected = (out.video.float() - video).abs().sum() / 2 + 1e-6 * out.posterior.kl().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_pixels_are_decoded_only_if_a_term_reads_them():
    assert not Objective({"kl": WeightedTerm(KL(), 1.0), "l1": WeightedTerm(L1(), 0.0)}, "sum").needs_pixels
    assert Objective({"kl": WeightedTerm(KL(), 1.0), "l1": WeightedTerm(L1(), 1.0)}, "sum").needs_pixels


@pytest.mark.parametrize("frame_batch", [1, 3, 100])
def test_lpips_checkpointing_and_frame_batches_are_exact(trunks, frame_batch):
    video = torch.rand(2, 3, 2, 32, 32) * 2 - 1
    values = []
    for checkpointing in (False, True):
        term = LPIPS(frame_batch=frame_batch, gradient_checkpointing=checkpointing)
        term.load("cpu")
        out = reconstruction(video)
        error = term(as_clip(video), out)
        error.map.sum().backward()
        values.append((error.map.detach(), out.video.grad))
    for plain, recomputed in zip(*values, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-9)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction is 'avg'; use one of sum, mean"):
        Objective({}, "avg")


def test_stage1_gradients_reach_exactly_the_temporal_parts():
    from vae3d.training.freeze import train_parts

    model = tiny.model("temporal_vae")
    train_parts(model, {"temporal_encoder": 1.0, "temporal_decoder": 1.0})
    terms = {
        "latent": WeightedTerm(LatentL1(), 1.0),
        "identity": WeightedTerm(Identity(), 1.0),
        "kl": WeightedTerm(KL(), 1e-6),
    }
    objective = Objective(terms, "sum")
    for frames in (1, 5):
        model.zero_grad()
        clip = as_clip(torch.rand(1, 3, frames, 8, 8) * 2 - 1)
        out = model(clip.video, pixels=objective.needs_pixels)
        assert out.video is None
        objective(clip, out, 0)[0].backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None and p.grad.abs().sum() > 0) == name.startswith("temporal_vae."), name


class Learned(L1):
    def __init__(self, trained):
        self.scale = torch.nn.Linear(3, 3).requires_grad_(trained)


def test_a_term_of_another_kind_and_one_that_would_have_to_be_trained_are_refused():
    with pytest.raises(ValueError, match="Linear is not a loss term; make it a subclass of Term in vae3d/losses"):
        WeightedTerm(torch.nn.Linear(3, 3), 1.0)
    with pytest.raises(ValueError, match="Learned has parameters, which would not be trained; set requires_grad=False"):
        WeightedTerm(Learned(trained=True), 1.0)
    term = Learned(trained=False)
    assert WeightedTerm(term, 1.0).weight == 1.0
    term.factor = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="would not be trained"):
        WeightedTerm(term, 1.0)

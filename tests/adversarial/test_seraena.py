"""Seraena: the published correction, losses, and draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.adversarial import toy
from vae3d.adversarial.base import UpdatePhase, group_frames
from vae3d.adversarial.discriminators import ConditionalPatchDiscriminator
from vae3d.adversarial.seraena import group_latents, ungroup_frames

# ---- what is published


def published_scores(state: dict[str, torch.Tensor], images: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """`PatchDiscWithContext` in eval mode, from its definition and its tensors in their published order: six of each
    block, then the heads."""
    tensors = list(state.values())
    blocks = len(tensors) // 7
    x = torch.cat([2 * images - 1, F.interpolate(context, images.shape[-2:], mode="nearest")], 1)
    scores = []
    for i in range(blocks):
        weight, gain, bias, mean, variance, _ = tensors[6 * i : 6 * i + 6]
        x = F.conv2d(x, weight, stride=2 if weight.shape[-1] == 4 else 1, padding=1)
        x = F.relu(F.batch_norm(x, mean, variance, gain, bias, training=False))
        scores.append(F.adaptive_avg_pool2d(F.conv2d(x, tensors[6 * blocks + i]), [s // 8 for s in images.shape[-2:]]))
    return torch.cat(scores, 1)


def published_correction(state, real, fake, context):
    c = torch.zeros_like(fake, requires_grad=True)
    difference = published_scores(state, real, context) - published_scores(state, fake + c, context)
    difference.square().mean((1, 2, 3)).sum().backward()
    return -c.grad / (c.grad.std(correction=0) + 1e-5)


def trained(**settings):
    adversary = toy.seraena(**settings)
    toy.train(adversary, range(20))
    return adversary


def test_the_discriminator_has_the_published_tensors():
    with torch.device("meta"):
        network = ConditionalPatchDiscriminator(9, 16, [64, 128, 256, 512, 512, 512], "batch")
    kernels = [(64, 25, 3, 3), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (512, 512, 3, 3), (512, 512, 3, 3)]
    blocks = [shape for k in kernels for shape in (k, *[k[:1]] * 4, ())]
    assert [tuple(t.shape) for t in network.state_dict().values()] == [*blocks, *((1, k[0], 1, 1) for k in kernels)]
    assert sum(p.numel() for p in network.parameters()) == 7_491_456


@pytest.mark.parametrize("frames", [1, 5, 6])
def test_correction_target_and_gradient_are_the_published_ones(frames):
    adversary = trained(weight=0.5)
    clip, out = toy.pair(seed=9, frames=frames)
    real, fake = ((v.detach() + 1) / 2 for v in (clip.video, out.video))
    groups = -(-frames // 3)
    missing = -frames % 3
    grouped = [
        torch.cat([v.transpose(1, 2), v.transpose(1, 2)[:, [0] * missing if frames == 1 else slice(0, missing)]], 1)
        for v in (real, fake)
    ]
    real_images, fake_images = (g.reshape(2 * groups, 9, 16, 16) for g in grouped)
    context = out.z.detach().mean(2).repeat_interleave(groups, dim=0)
    state = adversary.discriminator.state_dict()
    correction = published_correction(state, real_images, fake_images, context)
    target = (fake_images + correction).reshape(2, -1, 3, 16, 16)[:, :frames].transpose(1, 2)

    found, _ = adversary.correction(real_images, fake_images, context)
    torch.testing.assert_close(found, correction, rtol=1e-4, atol=1e-5)
    loss, metrics = adversary.generator_loss(clip, out, F.mse_loss(out.video, clip.video), step=2)
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(fake, target), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(loss, out.video)
    # Of [0, 1] it is -2 * weight * c / numel, of [-1, 1] half of it.
    torch.testing.assert_close(gradient, -0.5 * (target - fake) / fake.numel(), rtol=1e-4, atol=1e-8)
    scores = [published_scores(state, images, context).mean() for images in (fake_images, real_images)]
    torch.testing.assert_close(metrics["seraena/score_gap"], scores[0] - scores[1], rtol=1e-3, atol=1e-5)


def test_nothing_is_corrected_where_nothing_differs():
    adversary = toy.seraena()
    clip, out = toy.pair()
    fresh, _ = adversary.generator_loss(clip, out, out.video.mean(), step=0)
    assert 0 < fresh < 0.1  # far from 1: the floor holds corrections of random weights back
    out.video = clip.video.clone().requires_grad_()
    for one in (adversary, trained()):
        loss, metrics = one.generator_loss(clip, out, out.video.mean(), step=0)
        assert loss == metrics["seraena/score_gap"] == 0
    value, _ = trained(eps=1e-9).generator_loss(*toy.pair(), out.video.mean(), step=1)
    assert value.item() == pytest.approx(1.0, abs=0.05)  # whatever the generator's quality


def test_the_ratio_is_that_of_the_gradients_at_the_pixels():
    adversary = trained()
    clip, out = toy.pair()
    recon = F.mse_loss(out.video, clip.video)
    loss, metrics = adversary.generator_loss(clip, out, recon, step=4)
    norms = [torch.autograd.grad(value, out.video, retain_graph=True)[0].norm() for value in (loss, recon)]
    torch.testing.assert_close(metrics["seraena/correction_over_reconstruction"], norms[0] / norms[1])
    assert "seraena/correction_over_reconstruction" not in adversary.generator_loss(clip, out, recon, step=5)[1]
    unrelated = out.z.square().mean()
    assert adversary.generator_loss(clip, out, unrelated, step=4)[1]["seraena/correction_over_reconstruction"].isinf()


# ---- frames, images, context


def test_frames_are_grouped_and_filled_up_from_the_first_on():
    video = torch.arange(4.0)[None, None, :, None, None].expand(2, 3, 4, 8, 8)
    images = group_frames(video, 3)
    assert images.shape == (4, 9, 8, 8)
    assert images[:2, ::3, 0, 0].tolist() == [[0, 1, 2], [3, 0, 1]]
    assert torch.equal(ungroup_frames(images, 2, 4), video)
    assert group_frames(video[:, :, :1], 3)[0, ::3, 0, 0].tolist() == [0, 0, 0]


def test_context_is_the_clips_mean_or_of_the_images_time():
    z = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 60.0]])[:, None, :, None, None].expand(2, 4, 3, 2, 2)
    assert group_latents(z, 2, nearest=False)[:, 0, 0, 0].tolist() == [3, 3, 30, 30]
    assert group_latents(z, 3, nearest=True)[:, 0, 0, 0].tolist() == [1, 2, 6, 10, 20, 60]
    assert group_latents(z, 2, nearest=True)[:, 0, 0, 0].tolist() == [1.5, 4, 15, 40]  # the middle one is of both
    assert group_latents(z, 6, nearest=True)[:6, 0, 0, 0].tolist() == [1, 1, 2, 2, 6, 6]
    adversary = toy.seraena(context="nearest", frames=1)
    loss, _ = adversary.discriminator_loss(*toy.pair(frames=5), 0)
    assert loss.isfinite()


# ---- who learns from what


def test_gradients_reach_the_generator_or_the_discriminator_and_never_both():
    adversary = toy.seraena()
    clip, out = toy.pair()
    loss, _ = adversary.generator_loss(clip, out, out.video.mean(), step=0)
    loss.backward()
    assert out.video.grad.abs().sum() > 0
    assert out.z.grad is None
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    out.video.grad = None
    adversary.discriminator_loss(clip, out, 0)[0].backward()
    assert out.video.grad is None
    assert out.z.grad is None
    assert all(p.grad.abs().sum() > 0 for p in adversary.discriminator.parameters())


def test_before_its_start_the_generator_is_left_alone_and_the_discriminator_may_begin():
    adversary = toy.seraena(start=10, ramp=4, discriminator_start=6, weight=2.0)
    clip, out = toy.pair()
    adversary.discriminator = None  # which costs nothing, then
    for step in (0, 9, 10):
        loss, metrics = adversary.generator_loss(clip, out, out.video.mean(), step)
        assert (loss, metrics) == (0, {})
    assert [adversary.update_phase(step) for step in (5, 6)] == [UpdatePhase(True, False), UpdatePhase(True, True)]
    assert toy.seraena(start=3).update_phase(2) == UpdatePhase(True, False)
    whole = {}
    for step in (11, 13, 14, 20):
        _, metrics = toy.seraena(start=10, ramp=4, weight=2.0).generator_loss(clip, out, out.video.mean(), step)
        whole[step] = (metrics["loss_weighted/seraena"] / metrics["loss/seraena"]).item()
    assert whole == pytest.approx({11: 0.5, 13: 1.5, 14: 2.0, 20: 2.0})


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 3), (3, 1), (2, 3), (5, 3)])
@pytest.mark.parametrize("fresh", [0.0, 0.5, 1.0])
def test_odd_even_and_single_batches(batch, frames, fresh):
    adversary = toy.seraena(fresh_fraction=fresh)
    for step in range(3):
        loss, _ = adversary.discriminator_loss(*toy.pair(step, batch, frames), step)
        loss.backward()
        adversary.step(float(adversary.average_gradients()))
    assert loss.isfinite()
    assert len(adversary.buffer) == min(10, 3 * batch)


def test_half_of_the_fakes_are_fresh_also_of_a_single_image():
    adversary = toy.seraena(buffer_length=1000)
    draws = torch.Generator().manual_seed(0)
    images = torch.zeros(1000, 1, 1, 1)
    adversary.buffer.push(images, images, draws)
    for count in (1, 2, 5):
        picked = torch.stack([adversary._draw_fakes(count, draws) for _ in range(2000)])
        own = picked == 1000 + torch.arange(count)
        assert own.float().mean().item() == pytest.approx(0.5, abs=0.03)
        if count == 2:
            assert (own.sum(1) == 1).float().mean() > 0.99
        assert own.float().mean(0).sub(0.5).abs().max() < 0.05  # whatever the place in the batch
        assert len(picked.unique()) > 600


def test_what_is_shown_is_labelled_and_has_its_own_context():
    adversary = toy.seraena(buffer_length=100)
    shown = {}
    adversary.discriminator_criterion = lambda images, contexts, is_fake: (
        shown.update(i=images, c=contexts, f=is_fake) or images.sum()
    )
    kept = torch.full((100, 9, 16, 16), 7.0), torch.full((100, 4, 2, 2), 70.0)
    adversary.buffer.push(*kept, torch.Generator())
    clip, out = toy.pair(batch=64, frames=3)
    clip.video, out.video = torch.full_like(clip.video, 1.0), torch.full_like(out.video, -1.0)
    out.z = torch.full_like(out.z, 5.0)
    adversary.discriminator_loss(clip, out, 0)
    image, context = shown["i"][:, 0, 0, 0], shown["c"][:, 0, 0, 0]
    assert set(image.tolist()) == {0.0, 1.0, 7.0}
    assert torch.equal(image != 1.0, shown["f"].flatten())
    assert torch.equal(context == 70.0, image == 7.0)
    assert 20 <= shown["f"].sum() <= 44

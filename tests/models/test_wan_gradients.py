"""Gradients of the Wan VAEs: whole, checkpointed and in chunks, at reduced precision, on the meta device."""

from __future__ import annotations

import pytest
import torch

from tests.models import wan
from vae3d.checkpoints.wan import from_diffusers
from vae3d.models.wan import WanVAE

WAYS = {
    "checkpointed": {"gradient_checkpointing": True},
    "chunked": {"chunk_latents": 1},
    "chunked and checkpointed": {"chunk_latents": 2, "gradient_checkpointing": True},
}


def loss_gradients(ours, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter, for a loss on pixels, means and log-variances."""
    out = ours(video, generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(out.video.shape, generator=torch.Generator().manual_seed(2)).to(video)
    return wan.gradients(ours, (out.video * pixels).sum() + out.posterior.kl().sum())


@pytest.mark.parametrize(("style", "dtype"), [("wan", torch.float32), ("wan22", torch.float64)])
def test_training_whole_checkpointed_and_in_chunks_has_the_same_gradients(style, dtype):
    ours = wan.model(style, dtype)
    video = wan.clip(ours, 9, 1, 2)
    whole = loss_gradients(ours, video)
    for settings in WAYS.values():
        for name, value in {"chunk_latents": None, "gradient_checkpointing": False, **settings}.items():
            setattr(ours, name, value)
        for name, found in loss_gradients(ours, video).items():
            error = wan.relative_error(found, whole[name])
            assert error < (1e-4 if dtype == torch.float32 else 1e-10), (settings, name, error)


@pytest.mark.parametrize("style", wan.STYLES)
def test_gradients_are_those_of_diffusers(style):
    ours = wan.model(style, torch.float64)
    theirs = wan.reference(ours, style).double()
    video = wan.clip(ours, 5, 1, 2)
    encoded = theirs.encode(video).latent_dist.mean
    decoded = theirs.decode(encoded).sample
    assert decoded.abs().max() < 1  # where diffusers would clamp
    pixels = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(2)).to(video)
    (decoded * pixels).sum().backward()
    expected = from_diffusers({name: p.grad for name, p in theirs.named_parameters()})
    found = wan.gradients(ours, (ours(video, sample=False).video * pixels).sum())
    for name, gradient in found.items():
        error = wan.relative_error(gradient, expected[name])
        assert error < 1e-5, (name, error)  # diffusers upsamples in fp32


def test_values_beyond_1_keep_their_gradient():
    """decode of diffusers and VideoX-Fun clamps, which loses the gradient."""
    ours = wan.model()
    with torch.no_grad():
        ours.decoder.head["2"].bias.fill_(3.0)
    z = wan.latents(ours, 2).requires_grad_()
    pixels = ours.decode(z)
    assert pixels.min() > 1
    pixels.sum().backward()
    assert z.grad.abs().min() > 0
    theirs = wan.reference(ours)
    z = z.detach().requires_grad_()
    theirs.decode(z).sample.sum().backward()
    assert z.grad.abs().max() == 0


@pytest.mark.parametrize("style", wan.STYLES)
def test_single_frames_give_every_parameter_a_gradient(style):
    """All parameters need a gradient; those of the time convolutions are zero."""
    ours = wan.model(style)
    gradients = loss_gradients(ours, wan.clip(ours, 1))
    idle = {name for name, gradient in gradients.items() if gradient.abs().max() == 0}
    assert idle == {name for name in gradients if "time_conv" in name}
    for p in ours.parameters():
        p.requires_grad_(False)
    ours.decoder.conv1.weight.requires_grad_(True)  # time convolutions that are frozen stay so
    ours.decode(wan.latents(ours, 1)).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is not None and p.requires_grad] == [
        "decoder.conv1.weight"
    ]


def test_a_frozen_encoder_is_left_out_of_backward():
    ours = wan.model()
    ours.encoder.requires_grad_(False)
    ours.conv1.requires_grad_(False)
    out = ours(wan.clip(ours, 5), sample=False)
    assert not out.z.requires_grad
    out.video.sum().backward()
    assert all((p.grad is None) == name.startswith(("encoder.", "conv1.")) for name, p in ours.named_parameters())


@pytest.mark.parametrize("style", wan.STYLES)
def test_autocast_to_bf16_stays_near_fp32_with_gradients_in_fp32(style):
    ours = wan.model(style)
    video = wan.clip(ours, 5)
    exact = loss_gradients(ours, video)
    with torch.no_grad():
        expected = ours(video, sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(video, sample=False)
        near = loss_gradients(ours, video)
    assert out.posterior.mean.dtype == torch.float32
    assert wan.relative_error(out.z, expected.z) < 0.05
    assert wan.relative_error(out.video.float(), expected.video) < 0.05
    for name, gradient in near.items():
        assert gradient.dtype == torch.float32
        assert wan.relative_error(gradient, exact[name]) < 0.25, name


def test_bf16_weights_work():
    ours = wan.model()
    video = wan.clip(ours, 5)
    with torch.no_grad():
        expected = ours(video, sample=False).video
        found = ours.to(torch.bfloat16)(video, sample=False).video
    assert wan.relative_error(found.float(), expected) < 0.05


def test_shapes_go_through_the_meta_device():
    with torch.device("meta"):
        ours = WanVAE(**wan.STYLES["wan22"], chunk_latents=1, gradient_checkpointing=True)
        video = torch.empty(1, 3, 5, 64, 64)
    out = ours(video, sample=False)
    out.video.sum().backward()
    assert out.video.shape == video.shape
    assert out.z.shape[1:] == ours.latent_shape(5, 64, 64)
    assert all(p.grad.shape == p.shape for p in ours.decoder.parameters())

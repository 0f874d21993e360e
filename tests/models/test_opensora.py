from __future__ import annotations

import json

import pytest
import torch

import vae3d
from tests import tiny
from vae3d.checkpoints.opensora import to_published
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.temporal import TemporalVAE

KEYS = json.loads((tiny.ROOT / "tests/keys/opensora_v1_2.json").read_text())
FRAMES = (1, 2, 4, 5, 16, 17, 18, 33, 34, 51)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["temporal_vae", "opensora_v1_2"])
def test_keys_shapes_and_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        model = vae3d.build(name)
    assert {k: list(v.shape) for k, v in to_published(model.state_dict()).items()} == KEYS
    assert sum(p.numel() for p in model.spatial_vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in model.temporal_vae.parameters()) == 309_687_144


def test_published_preset_has_the_published_factors():
    model = vae3d.build("opensora_v1_2", *tiny.MODEL["opensora_v1_2"])
    assert model.spatial_vae.scaling_factor == 0.18215
    torch.testing.assert_close(model.latents_std.flatten(), torch.tensor([3.85, 2.32, 2.33, 3.06]))
    torch.testing.assert_close(model.latents_mean.flatten(), torch.tensor([-0.10, 0.34, 0.27, 0.98]))
    assert model.latents_std.shape == (1, 4, 1, 1, 1)
    assert vae3d.build("temporal_vae", *tiny.MODEL["temporal_vae"]).spatial_vae.scaling_factor == 0.13025


@pytest.mark.parametrize("name", ["spatial", "temporal_vae"])
def test_models_keep_the_protocol(name):
    assert isinstance(tiny.model(name), VideoAutoencoder)


# Latent frames of the published code for T frames, in pieces of 17 and whole.
LATENTS_17 = {1: 1, 4: 1, 5: 2, 16: 4, 17: 5, 18: 6, 32: 9, 33: 9, 34: 10, 51: 15}
LATENTS_WHOLE = {1: 1, 4: 1, 5: 2, 16: 4, 17: 5, 18: 5, 32: 8, 33: 9, 34: 9, 51: 13}


@pytest.mark.parametrize(("micro_frames", "expected"), [(17, LATENTS_17), (None, LATENTS_WHOLE)])
def test_latent_frames_are_the_published_ones(micro_frames, expected):
    model = tiny.model("temporal_vae")
    model.micro_frames = micro_frames
    assert {t: model.latent_shape(t, 16, 16)[1] for t in expected} == expected


@pytest.mark.parametrize("micro_frames", [17, 16, 3, None])
@pytest.mark.parametrize("frames", FRAMES)
def test_as_many_frames_come_out_as_went_in(frames, micro_frames):
    model = tiny.model("temporal_vae")
    model.micro_frames = micro_frames
    video = torch.randn(1, 3, frames, 10, 8)
    with torch.no_grad():
        out = model(video)
        assert out.video.shape == video.shape
        assert out.z.shape[1:] == out.posterior.mean.shape[1:] == model.latent_shape(frames, 10, 8)
        assert model.decode(out.z, frames).shape[2] == frames
        assert model.decode(out.z).shape[2] >= frames


def test_pieces_are_coded_independently():
    model = tiny.model("temporal_vae")
    video = torch.randn(1, 3, 34, 8, 8)
    with torch.no_grad():
        whole, second = model(video, sample=False), model(video[:, :, 17:], sample=False)
    torch.testing.assert_close(whole.z[:, :, 5:], second.z, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.video[:, :, 17:], second.video, rtol=0, atol=1e-6)


def test_convolutions_are_causal_once_norms_are_out_of_the_way():
    model = TemporalVAE(channels=8, multipliers=(1, 1, 2), downsample=(True, True), layers=1, groups=4)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    import vae3d.models.temporal as temporal

    original = temporal.norm_silu
    temporal.norm_silu = lambda norm, x: torch.nn.functional.silu(x)
    try:
        x = torch.randn(1, 4, 16, 4, 4)
        changed = x.clone()
        changed[:, :, 12:] += 1.0
        before, after = model.encode(x).mean, model.encode(changed).mean
        torch.testing.assert_close(before[:, :, :3], after[:, :, :3], rtol=0, atol=0)
        assert not torch.equal(before[:, :, 3], after[:, :, 3])
    finally:
        temporal.norm_silu = original


@pytest.mark.parametrize("frames", [4, 9, 100])
def test_wrong_frame_count_for_latents_is_refused(frames):
    model = tiny.model("temporal_vae")
    with pytest.raises(ValueError, match=f"num_frames is {frames}"):
        model.decode(torch.randn(1, 4, 2, 4, 4), frames)


def test_noise_of_a_clip_does_not_depend_on_its_batch():
    model = tiny.model("temporal_vae")
    video = torch.randn(2, 3, 5, 8, 8)
    with torch.no_grad():
        both = model(video, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
        one = model(video[1:], generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(both.z[1:], one.z, rtol=0, atol=1e-5)
    assert not torch.equal(both.z, both.posterior.mode())


def test_mode_is_deterministic_and_one_generator_is_needed_per_clip():
    model = tiny.model("temporal_vae")
    video = torch.randn(2, 3, 5, 8, 8)
    assert torch.equal(model(video, sample=False).video, model(video, sample=False).video)
    with pytest.raises(ValueError, match="1 generators for a batch of 2 clips"):
        model(video, generator=[torch.Generator()])


def test_given_latents_are_decoded_without_encoding():
    model = tiny.model("temporal_vae")
    video = torch.randn(1, 3, 5, 8, 8)
    z = torch.randn(1, *model.latent_shape(5, 8, 8))
    out = model(video, latents=z)
    assert out.posterior is None
    torch.testing.assert_close(out.video, model.decode(z, 5))


def test_pixels_can_be_left_out():
    assert tiny.model("temporal_vae")(torch.randn(1, 3, 5, 8, 8), pixels=False).video is None


def test_normalisation_uses_the_buffers():
    model = tiny.model("opensora_v1_2")
    z = torch.randn(1, 4, 2, 4, 4)
    expected = (z[:, 1] - 0.34) / 2.32
    torch.testing.assert_close(model.normalize(z)[:, 1], expected)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (model.spec.latents_mean, model.spec.latents_std)
    )
    torch.testing.assert_close((z - mean) / std, model.normalize(z))


def test_every_parameter_belongs_to_a_part():
    for name in ("spatial", "temporal_vae"):
        model = tiny.model(name)
        owned = {id(p) for modules in model.trainable_parts().values() for m in modules for p in m.parameters()}
        assert owned == {id(p) for p in model.parameters()}


def test_temporal_checkpointing_is_exact():
    gradients = []
    for checkpointing in ("false", "true"):
        model = tiny.model("temporal_vae", f"model.temporal.gradient_checkpointing={checkpointing}")
        torch.manual_seed(1)
        model(torch.randn(1, 3, 5, 8, 8), sample=False).video.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_weights_work():
    model = tiny.model("temporal_vae").to(torch.bfloat16)
    out = model(torch.randn(1, 3, 5, 8, 8))
    assert out.video.dtype == torch.bfloat16
    assert out.posterior.kl().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_norm_and_activation_recompute_themselves_exactly(dtype, frozen):
    from vae3d.models.layers.norm import norm_silu

    norm = torch.nn.GroupNorm(2, 8).requires_grad_(not frozen)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 8, 3, 4, 4, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = norm_silu(norm, x)
    assert [t.numel() for t in kept] == [x.numel(), 8, 8]
    expected = torch.nn.functional.silu(norm(x.float())).to(dtype)
    wrt = [x] if frozen else [x, norm.weight, norm.bias]
    assert torch.equal(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), wrt), torch.autograd.grad(expected.sum(), wrt), strict=True):
        torch.testing.assert_close(ours, theirs)

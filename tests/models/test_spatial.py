from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL as Reference

from tests import tiny
from vae3d.models.spatial import AutoencoderKL, SpatialVAE

KEYS = json.loads((tiny.ROOT / "tests/keys/sd_vae.json").read_text())


def reference(channels=(8, 16, 16), **kwargs) -> Reference:
    torch.manual_seed(0)
    return Reference(
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=4,
        **kwargs,
    ).eval()


def test_keys_shapes_and_parameters_are_the_published_ones():
    with torch.device("meta"):
        model = SpatialVAE().module
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: shape for k, (_, shape, _) in KEYS.items()}
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


@pytest.mark.smoke
@pytest.mark.parametrize("quant_convs", [True, False])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("images", [1, 4])
def test_equals_diffusers_on_shared_weights(images, attention, quant_convs):
    theirs = reference(use_quant_conv=quant_convs, use_post_quant_conv=quant_convs, mid_block_add_attention=attention)
    ours = AutoencoderKL((8, 16, 16), 1, 4, 4, attention, quant_convs).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(images, 3, 32, 24)
    with torch.no_grad():
        moments = ours.encode(x)
        mean = theirs.encode(x).latent_dist.mean
        torch.testing.assert_close(moments.chunk(2, 1)[0], mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=0, atol=1e-5)


def test_full_size_equals_diffusers_on_shared_weights():
    theirs = Reference(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    ).eval()
    ours = SpatialVAE().module.eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 24, 32) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(x).latent_dist.mean
        torch.testing.assert_close(ours.encode(x).chunk(2, 1)[0], mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=0, atol=1e-5)


def test_a_frame_does_not_depend_on_the_others():
    model = tiny.model("spatial")
    video = torch.randn(1, 3, 4, 16, 16)
    whole = model.encode(video).mean
    torch.testing.assert_close(model.encode(video[:, :, 2:3]).mean, whole[:, :, 2:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (17, 19), (8, 23)])
@pytest.mark.parametrize("frames", [1, 3])
def test_any_size_comes_back_as_it_went_in(size, frames):
    model = tiny.model("spatial")
    video = torch.randn(1, 3, frames, *size)
    out = model(video)
    assert out.video.shape == video.shape
    assert out.z.shape[1:] == model.latent_shape(frames, *size)


@pytest.mark.parametrize("frame_batch", [1, 2, 3])
def test_frame_batches_and_checkpointing_change_neither_output_nor_gradient(frame_batch):
    plain = tiny.model("spatial")
    batched = tiny.model("spatial", f"model.frame_batch={frame_batch}", "model.gradient_checkpointing=true")
    video = torch.randn(2, 3, 3, 16, 16)
    gradients = []
    for model in (plain, batched):
        out = model(video, sample=False)
        out.video.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_checkpointing_keeps_only_the_frames():
    """No tensor as wide as a hidden layer may be saved for backward."""
    kept = []
    model = SpatialVAE((8, 8), layers=1, groups=4, frame_batch=1, gradient_checkpointing=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model.decode(torch.randn(1, 4, 3, 16, 16)).sum()
    assert max(kept) <= 3 * 3 * 32 * 32


def test_latents_are_scaled_in_one_place():
    model = tiny.model("spatial", "model.scaling_factor=0.5")
    z = torch.randn(1, 4, 2, 8, 8)
    torch.testing.assert_close(model.normalize(z), z * 0.5)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (model.spec.latents_mean, model.spec.latents_std)
    )
    torch.testing.assert_close((z - mean) / std, model.normalize(z))


def test_channels_must_divide_into_groups():
    with pytest.raises(ValueError, match=r"channels are \[6, 8\]; each must be a multiple of groups=4"):
        SpatialVAE((6, 8), groups=4)


def test_convolutions_run_channels_last_where_no_gradient_is_computed():
    model = SpatialVAE((8, 16), layers=1, groups=4)  # its weights could train
    seen = []
    for part in (model.module.encoder.conv_in, model.module.decoder.conv_in):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.decode(model.encode(torch.rand(1, 3, 2, 16, 16)).mode())
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [True, True]

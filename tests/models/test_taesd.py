"""TAESD: published keys and results, frames independent of each other, any size, gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from vae3d.models.interface import VideoAutoencoder
from vae3d.models.taesd import TAESD, VARIANTS

# Parameters of the published encoders and decoders (madebyollin/taesd).
PUBLISHED = {
    "taesd": (1_222_532, 1_222_531),
    "taesdxl": (1_222_532, 1_222_531),
    "taesd3": (1_229_456, 1_229_443),
    "taef1": (1_229_456, 1_229_443),
    "taef2": (1_338_528, 1_338_499),
    "taesana": (1_256_288, 8_301_763),
}


def toy(variant: str) -> TAESD:
    """Weights that keep activations near 1, so that every layer matters."""
    rng = torch.Generator().manual_seed(0)
    model = TAESD(variant=variant)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 4:
                p.copy_(torch.randn(p.shape, generator=rng) * (1 / p[0].numel()) ** 0.5)
            elif name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    return model.double().eval()


def clip(frames: int = 2, height: int = 32, width: int = 64) -> Tensor:
    rng = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, height, width, generator=rng, dtype=torch.float64) * 2 - 1


def block(net: nn.Sequential, x: Tensor) -> Tensor:
    """A residual block as published, from its weights."""
    if net.pool is not None:
        wide = nn.functional.conv2d(x, net.pool[0].weight)
        wide = nn.functional.group_norm(wide, 4, net.pool[1].weight, net.pool[1].bias).relu()
        x = x + nn.functional.conv2d(wide, net.pool[3].weight)
    y = x
    for i in (0, 2, 4):
        y = nn.functional.conv2d(y, net.conv[i].weight, net.conv[i].bias, padding=1)
        y = y.relu() if i < 4 else y
    return (x + y).relu()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_published(variant):
    with torch.device("meta"):
        model = TAESD(variant=variant)
    assert isinstance(model, VideoAutoencoder)
    assert (
        tuple(sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))
        == PUBLISHED[variant]
    )


@pytest.mark.parametrize("variant", ["taesd", "taef1"])
def test_equals_diffusers_autoencoder_tiny(variant):
    ours = toy(variant)
    theirs = AutoencoderTiny(latent_channels=ours.spec.channels).double().eval()
    state = {f"encoder.layers.{key}": value for key, value in ours.encoder.state_dict().items()}
    for key, value in ours.decoder.state_dict().items():  # diffusers does not count the clamp
        index, rest = key.split(".", 1)
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    theirs.load_state_dict(state)
    video = clip()
    frames = video[0].transpose(0, 1)
    with torch.no_grad():
        z = theirs.encode(frames).latents
        expected = theirs.decode(z).sample
        assert torch.allclose(ours.encode(video).mean[0].transpose(0, 1), z, atol=1e-12)
        assert torch.allclose(ours.decode(z.transpose(0, 1)[None])[0].transpose(0, 1), expected, atol=1e-12)


@pytest.mark.parametrize("variant", ["taef2", "taesana"])
def test_equals_the_published_layers_one_by_one(variant):
    model, video = toy(variant), clip()
    with torch.no_grad():
        x = video[0].transpose(0, 1) / 2 + 0.5
        for layer in model.encoder:
            x = block(layer, x) if hasattr(layer, "pool") else layer(x)
        z = x
        x = torch.tanh(x / 3) * 3
        for layer in list(model.decoder)[1:]:
            if hasattr(layer, "pool"):
                x = block(layer, x)
            elif type(layer).__name__ == "UpConv":
                x = nn.functional.conv2d(nn.functional.interpolate(x, scale_factor=2), layer.weight, padding=1)
            else:
                x = layer(x)
        assert z.std() > 0.1
        assert torch.allclose(model.encode(video).mean[0].transpose(0, 1), z, atol=1e-12)
        assert torch.allclose(model.decode(z.transpose(0, 1)[None])[0].transpose(0, 1), 2 * x - 1, atol=1e-12)


@pytest.mark.parametrize("variant", ["taesd", "taef2", "taesana"])
def test_any_size_and_frame_count_comes_back_and_frames_are_independent(variant):
    model = toy(variant)
    video = clip(3, 37, 50)
    with torch.no_grad():
        out = model(video)
        assert out.video.shape == video.shape
        assert out.z.shape[1:] == model.latent_shape(3, 37, 50)
        alone = torch.cat([model(frame).video for frame in video.split(1, 2)], 2)
    assert torch.allclose(out.video, alone, atol=1e-12)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = toy("taef2").train()
        model.gradient_checkpointing = recompute
        model(clip()).video.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"variant": "taef3"}, "taef3"),
        ({"variant": "taesd", "latent": "scaled"}, "scaled"),
        ({"variant": "taesd", "decoder_channels": [8, 8, 8]}, "decoder_channels has 3 entries; give 4"),
        ({"variant": "taesana", "decoder_blocks": [1, 1, 1, 1]}, "decoder_blocks has 4 entries; give 6"),
        ({"variant": "taesd", "latents_std": [1.0] * 4}, "normalized"),
        ({"variant": "taef2", "latents_std": [1.0] * 4}, "32"),
    ],
)
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        TAESD(**arguments)


def test_raw_latents_are_normalised_by_their_statistics():
    model = TAESD(variant="taef2", latents_mean=[0.5] * 32, latents_std=[2.0] * 32)
    z = torch.randn(1, 32, 1, 2, 2)
    assert torch.allclose(model.normalize(z), (z - 0.5) / 2)
    assert torch.allclose(model.denormalize(model.normalize(z)), z, atol=1e-6)


def test_a_decoder_of_other_widths_and_depths_has_them_and_the_published_one_is_the_default():
    model = TAESD(
        variant="taef2", decoder_channels=[8, 6, 5, 4], decoder_blocks=[2, 0, 1, 0], decoder_hidden=[3, 6, 7, 4]
    )
    shapes = {name: tuple(p.shape[:2]) for name, p in model.decoder.named_parameters() if name.endswith("weight")}
    assert shapes["1.weight"] == (8, 32)
    assert [shapes[f"{block}.conv.{i}.weight"] for block in (3, 4) for i in (0, 2, 4)] == 2 * [(3, 8), (3, 3), (8, 3)]
    assert [shapes[f"{layer}.weight"] for layer in (6, 8, 11, 12)] == [(6, 8), (5, 6), (4, 5), (3, 4)]
    assert shapes["9.conv.2.weight"] == (7, 7)
    published = TAESD(variant="taef2", decoder_channels=[64] * 4, decoder_blocks=[3, 3, 3, 1], decoder_hidden=[64] * 4)
    default = TAESD(variant="taef2")
    assert {k: v.shape for k, v in published.state_dict().items()} == {
        k: v.shape for k, v in default.state_dict().items()
    }
    assert model.decode(torch.zeros(1, 32, 2, 3, 4)).shape == (1, 3, 2, 24, 32)

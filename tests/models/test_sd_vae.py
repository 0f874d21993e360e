"""The image VAE at several compressions and widths."""

from __future__ import annotations

import itertools

import pytest
import torch

import vae3d
from tests import tiny
from vae3d.loading import instantiate, model_config

FACTORS = {4: "[8,8,8]", 8: "[8,8,8,8]", 16: "[8,8,8,8,8]"}


def parameters(*overrides: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in instantiate(model_config("sd_vae", *overrides)).parameters())


def test_presets_have_the_published_numbers_of_parameters():
    assert parameters() == 83_653_863
    assert parameters("model.latent_channels=16", "model.quant_convs=false") == 83_819_683


@pytest.mark.parametrize(
    ("factor", "channels", "attention", "quant_convs"),
    [
        *itertools.product(FACTORS, (4, 16, 32), (True,), (True,)),
        (8, 4, False, True),
        (8, 16, True, False),
        (16, 32, False, False),
    ],
)
def test_every_compression_reconstructs_images_of_any_size(factor, channels, attention, quant_convs):
    vae = vae3d.build(
        "sd_vae", *tiny.MODEL["sd_vae"], f"model.channels={FACTORS[factor]}", f"model.latent_channels={channels}",
        f"model.attention={attention}", f"model.quant_convs={quant_convs}",
    )  # fmt: skip
    for height, width in ((65, 71), (7, 32)):
        with torch.no_grad():
            out = vae(torch.rand(1, 3, 1, height, width) * 2 - 1)
        assert out.video.shape == (1, 3, 1, height, width)
        assert out.z.shape == (1, channels, 1, -(-height // factor), -(-width // factor))
        assert out.z.shape[1:] == vae.latent_shape(1, height, width)


def test_pixels_beyond_a_multiple_of_the_stride_reach_the_latents():
    """diffusers floors 71 to 64 pixels; here sides are padded and cropped."""
    vae = vae3d.build("sd_vae", *tiny.MODEL["sd_vae"], f"model.channels={FACTORS[8]}")
    video = torch.zeros(1, 3, 1, 64, 71)
    other = video.clone()
    other[..., 64:] = 1
    with torch.no_grad():
        assert not torch.equal(vae.encode(video).mean[..., -1], vae.encode(other).mean[..., -1])

"""The codec changes nothing but units: every family's reconstruction, shapes, pixel ranges, precision, chunks."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.latents import families
from tests.models.test_diffusers_vae import COGVIDEOX
from vae3d.latents import LatentCodec
from vae3d.latents.codec import Moments, PixelError
from vae3d.models.interface import VideoAutoencoder
from vae3d.types import Delta, LatentSpec

UNIT_FACTORS = {
    "spatial": {"scaling_factor": 1.0, "shift_factor": 0.0},
    "wan": {"latents_mean": torch.zeros(1), "latents_std": torch.ones(1)},
}


def codec(name, **settings):
    return LatentCodec(families.model(name), **settings)


@pytest.mark.parametrize("name", families.NAMES)
def test_decoding_what_was_encoded_is_the_models_own_reconstruction(name):
    ours, video = codec(name), families.clip(5, batch=2)
    with torch.no_grad():
        reference = ours.model(video, sample=False)
    z = ours.encode(video)
    assert z.shape == (2, *ours.latent_shape(5, 16, 24))
    assert (z.shape[1], z.dtype) == (ours.channels, torch.float32)
    torch.testing.assert_close(z, ours.model.normalize(reference.z))
    back = ours.decode(z, 5, (16, 24))
    torch.testing.assert_close(back, reference.video.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNIT_FACTORS)
def test_without_factors_that_round_it_is_the_reconstruction_to_the_bit(name):
    ours, video = codec(name), families.clip(5)
    for key, value in UNIT_FACTORS[name].items():
        setattr(ours.model, key, value)
    with torch.no_grad():
        reference = ours.model(video, sample=False).video.clamp(-1, 1)
    assert torch.equal(ours.decode(ours.encode(video), 5, (16, 24)), reference)


@pytest.mark.parametrize("name", families.NAMES)
def test_normalisation_is_the_specs_and_is_inverted(name):
    ours = codec(name)
    z = torch.randn(2, *ours.latent_shape(5, 16, 16)) * 5
    shift, scale = (
        torch.tensor(told)[:, None, None, None] for told in (ours.model.spec.latents_mean, ours.model.spec.latents_std)
    )
    torch.testing.assert_close(ours.model.normalize(z), (z - shift) / scale)
    torch.testing.assert_close(ours.model.denormalize(ours.model.normalize(z)), z, rtol=1e-5, atol=1e-5)
    video = families.clip(5)
    raw, normalised = ours.raw_moments(video), ours.moments(video)
    torch.testing.assert_close(normalised.mean, (raw.mean - shift) / scale)
    torch.testing.assert_close(normalised.std, raw.std / scale)
    deterministic = name.startswith("taehv")
    assert bool((raw.std == 0).all()) == deterministic
    assert bool((raw.std > 0).all()) != deterministic


def test_images_have_one_latent_frame_and_odd_sizes_come_back():
    for name in ("spatial", "wan", "temporal_vae"):
        ours = codec(name)
        z = ours.encode(families.clip(1, 18, 22)[:, :, 0])
        assert z.shape == (1, *ours.latent_shape(1, 18, 22))
        assert z.shape[2] == 1
        assert ours.decode(z, 1, (18, 22)).shape == (1, 3, 1, 18, 22)


def test_samples_are_mean_plus_noise_of_each_clips_own_generator():
    ours, video = codec("spatial"), families.clip(2, batch=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    z = ours.encode(video, "sample", generators)
    moments = ours.moments(video)
    noise = torch.randn(moments.mean.shape[1:], generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(z[1], moments.mean[1] + moments.std[1] * noise)
    assert torch.equal(z[1:], Moments(moments.mean[1:], moments.std[1:]).sample([torch.Generator().manual_seed(4)]))
    with pytest.raises(ValueError, match="mode is 'mode'; use one of sample, mean"):
        ours.encode(video, "mode")


@pytest.mark.parametrize("name", ["spatial", "wan", "taehv"])
def test_ranges_of_pixels_mean_the_same(name):
    levels = torch.randint(0, 256, (1, 3, 5, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = {"uint8": levels, "unit": levels / 255, "signed": levels / 127.5 - 1}
    codecs = {kind: codec(name, pixel_range=kind) for kind in given}
    latents = {kind: codecs[kind].encode(pixels) for kind, pixels in given.items()}
    for kind in ("unit", "signed"):
        torch.testing.assert_close(latents[kind], latents["uint8"], rtol=1e-4, atol=1e-5)
    rec = {kind: codecs[kind].decode(z, 5, (16, 16)) for kind, z in latents.items()}
    assert rec["uint8"].dtype == torch.uint8
    torch.testing.assert_close(rec["unit"] * 2 - 1, rec["signed"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rec["uint8"].float(), rec["unit"] * 255, rtol=0, atol=0.6)
    assert rec["unit"].aminmax() >= (0, 0)
    assert rec["unit"].max() <= 1


class Identity(VideoAutoencoder):
    """An autoencoder that loses nothing, to see what the codec itself does to pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.spec = LatentSpec(3, 1, 1, True, (0.25,) * 3, (2.0,) * 3)

    def encode(self, video):
        return Delta(video)

    def decode(self, z, num_frames=None):
        return z

    def normalize(self, z):
        return (z - 0.25) / 2

    def denormalize(self, z):
        return z * 2 + 0.25


@pytest.mark.parametrize(
    ("kind", "level", "signed"), [("uint8", 51, -0.6), ("unit", 0.2, -0.6), ("signed", -0.6, -0.6)]
)
def test_a_constant_image_survives_in_its_range(kind, level, signed):
    ours = LatentCodec(Identity(), pixel_range=kind)
    image = torch.full((1, 3, 4, 4), level, dtype=torch.uint8 if kind == "uint8" else torch.float32)
    z = ours.encode(image)
    torch.testing.assert_close(z, torch.full((1, 3, 1, 4, 4), (signed - 0.25) / 2))
    back = ours.decode(z)[:, :, 0]
    assert back.dtype == image.dtype
    torch.testing.assert_close(back, image)
    torch.testing.assert_close(
        ours.decode(torch.full_like(z, 9.0)).float().max(), torch.tensor({"uint8": 255.0}.get(kind, 1.0))
    )


@pytest.mark.parametrize(
    ("kind", "pixels", "message"),
    [
        ("unit", torch.full((1, 3, 4, 4), -1.0), r"pixels lie in \[-1, -1\], but pixel_range=unit declares \[0, 1\]"),
        ("signed", torch.full((1, 3, 4, 4), 255.0), r"\[255, 255\], but pixel_range=signed declares \[-1, 1\]"),
        ("unit", torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "pixels are torch.uint8, but pixel_range=unit"),
        ("uint8", torch.zeros(1, 3, 4, 4), "pixels are torch.float32, but pixel_range=uint8"),
        ("signed", torch.full((1, 3, 4, 4), float("nan")), r"\[nan, nan\]"),
        ("signed", torch.zeros(1, 1, 4, 4), r"\[1, 1, 4, 4\]; use \[B, 3, H, W\]"),
        ("signed", torch.zeros(3, 4, 4), r"\[3, 4, 4\]; use"),
    ],
)
def test_other_pixels_are_refused_with_what_they_are(kind, pixels, message):
    with pytest.raises(PixelError, match=message):
        LatentCodec(Identity(), pixel_range=kind).encode(pixels)


def test_rounding_to_bf16_is_no_other_range():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(1.0004).bfloat16()
    LatentCodec(Identity(), pixel_range="unit").encode(image)


@pytest.mark.parametrize(("name", "chunk"), [("wan", 2), ("wan", 4), ("spatial", 1), ("temporal_vae", 2), ("taehv", 4)])
def test_pieces_give_what_the_whole_gives(name, chunk):
    whole, pieces = codec(name), codec(name, chunk_frames=chunk)
    whole.model.fit_chunks = lambda height, width: None
    video = families.clip(13)
    z = whole.encode(video)
    torch.testing.assert_close(pieces.encode(video), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pieces.decode(z, 13), whole.decode(z, 13), rtol=1e-5, atol=1e-5)


def test_a_long_clip_is_coded_in_pieces_unasked():
    ours = codec("wan")
    seen, step = [], ours.model._moments
    ours.model._moments = lambda video, *rest: (seen.append(video.shape[2]), step(video, *rest))[1]
    ours.encode(families.clip(41, 8, 8))
    assert len(seen) > 1
    assert sum(seen) == 41


def test_the_model_is_frozen_and_a_dtype_is_the_codecs_own():
    model = families.model("wan").train()
    ours, half = LatentCodec(model), LatentCodec(copy.deepcopy(model), dtype=torch.bfloat16)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    video = families.clip(5)
    z = ours.encode(video)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.encode(video), z)
        outside = half.encode(video)
    assert torch.equal(half.encode(video), outside)
    assert outside.dtype == torch.float32
    assert not torch.equal(outside, z)
    torch.testing.assert_close(outside, z, rtol=0.1, atol=0.1)
    assert not z.requires_grad
    assert not z.is_inference()  # a diffusion model trains on it


def test_wrong_settings_are_refused():
    for settings, message in [
        ({"pixel_range": "255"}, "pixel_range is '255'; use one of uint8, unit, signed"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"chunk_frames": 0}, "chunk_frames is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            codec("wan", **settings)
    with pytest.raises(ValueError, match=r"a DiffusersVAE .* chunk_frames"):
        codec(COGVIDEOX, chunk_frames=4)
    with pytest.raises(PixelError, match=r"\[1, 3, 1, 4, 4\]; the model takes \[B, 4, t, h, w\]"):
        codec("wan").decode(torch.zeros(1, 3, 1, 4, 4))
    decimated = families.model("taehv")
    decimated.time_upscale = 1
    with pytest.raises(ValueError, match="does not invert"):
        LatentCodec(decimated)

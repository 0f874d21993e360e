"""The Wan VAEs: published keys, diffusers' results, and the same results in any chunks."""

from __future__ import annotations

import json

import pytest
import torch

import vae3d
from tests import tiny
from tests.models import wan
from vae3d.checkpoints.wan import from_diffusers, to_diffusers
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.layers.borders import Borders
from vae3d.models.layers.wan_blocks import Downsample, Upsample
from vae3d.models.wan import WanVAE

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
KEYS = {name: json.loads((tiny.ROOT / f"tests/keys/wan_{name}.json").read_text()) for name in ("official", "diffusers")}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}


@pytest.fixture(scope="module", params=wan.STYLES)
def pair(request):
    ours = wan.model(request.param)
    return ours, wan.reference(ours, request.param)


# ---- what is published


def test_keys_shapes_and_parameters_are_the_published_ones():
    with torch.device("meta"):
        model = vae3d.build("wan")
    state = model.state_dict()
    assert shapes(state) == KEYS["official"]
    assert shapes(to_diffusers(state)) == KEYS["diffusers"]
    assert shapes(from_diffusers(to_diffusers(state))) == KEYS["official"]
    assert sum(p.numel() for p in model.parameters()) == 126_892_531
    assert (model.spec.channels, model.spec.time_stride, model.spec.space_stride) == (16, 4, 8)


def test_wan22_has_the_published_size_and_diffusers_keys():
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = vae3d.build("wan22")
        theirs = AutoencoderKLWan(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        )
    assert sum(p.numel() for p in model.parameters()) == 704_688_668
    assert len(model.state_dict()) == 196
    assert shapes(to_diffusers(model.state_dict())) == shapes(theirs.state_dict())
    assert shapes(from_diffusers(theirs.state_dict())) == shapes(model.state_dict())
    assert (model.spec.channels, model.spec.time_stride, model.spec.space_stride) == (48, 4, 16)


@pytest.mark.smoke
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_and_decode_equal_diffusers(pair, frames):
    ours, theirs = pair
    video = wan.clip(ours, frames)
    with torch.no_grad():
        expected = theirs.encode(video).latent_dist
        found = ours.encode(video)
        z = wan.latents(ours, 1 + frames // 4)
        pixels = theirs.decode(z).sample
    assert expected.mean.std() > 0.1
    assert pixels.abs().max() < 1  # where diffusers would clamp
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logvar, expected.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(z).detach(), pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_normalisation_uses_the_published_constants(name):
    """First and last values of the model cards' lists; all of Wan2.1's are diffusers' defaults."""
    config = vae3d.loading.model_config(name)
    if name == "wan":
        from diffusers import AutoencoderKLWan

        defaults = AutoencoderKLWan(base_dim=2, dim_mult=[1, 1], temperal_downsample=[False]).config
        assert (config["latents_mean"], config["latents_std"]) == (
            list(defaults.latents_mean),
            list(defaults.latents_std),
        )
    else:
        assert [config["latents_mean"][i] for i in (0, -1)] == [-0.2289, -0.0667]
        assert [config["latents_std"][i] for i in (0, -1)] == [0.4765, 0.7744]
    channels = len(config["latents_mean"])
    small = {
        "channels": 8,
        "latent_channels": channels,
        "latents_mean": config["latents_mean"],
        "latents_std": config["latents_std"],
    }
    model = WanVAE(**small, multipliers=[1], downsample=[])
    z = torch.randn(2, channels, 3, 2, 2)
    mean, std = (torch.tensor(config[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(model.normalize(z), (z - mean) / std)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    assert (list(model.spec.latents_mean), list(model.spec.latents_std)) == (
        config["latents_mean"],
        config["latents_std"],
    )


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_models_keep_the_protocol(name):
    model = tiny.model(name)
    assert isinstance(model, VideoAutoencoder)
    members = [id(p) for modules in model.trainable_parts().values() for module in modules for p in module.parameters()]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


# ---- chunks


@pytest.mark.parametrize(("style", "dtype"), [("wan", torch.float32), ("wan", torch.float64), ("wan22", torch.float64)])
def test_a_clip_is_coded_the_same_whole_and_in_chunks(style, dtype):
    ours = wan.model(style, dtype)
    video, z = wan.clip(ours, 17, 1, 2), wan.latents(ours, 5, 1, 2)
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    with torch.no_grad():
        whole, pixels = wan.moments(ours.encode(video)), ours.decode(z)
        for lengths in ([1, 4, 4, 8], [1, 8, 8], [1, 16], [5, 12]):
            torch.testing.assert_close(wan.encode_in(ours, video, lengths), whole, **close)
        for lengths in ([1, 1, 1, 1, 1], [1, 2, 2], [1, 4], [3, 1, 1]):
            torch.testing.assert_close(wan.decode_in(ours, z, lengths), pixels, **close)
        for chunk_latents in (1, 2, 3):
            ours.chunk_latents = chunk_latents
            torch.testing.assert_close(wan.moments(ours.encode(video)), whole, **close)
            torch.testing.assert_close(ours.decode(z), pixels, **close)
    assert pixels.dtype == whole.dtype == dtype


def test_a_batch_of_two_is_two_batches_of_one():
    ours = wan.model()
    video = wan.clip(ours, 5, batch=2)
    with torch.no_grad():
        both = ours(video, sample=False).video
        for one, found in zip(video, both, strict=True):
            torch.testing.assert_close(ours(one[None], sample=False).video[0], found, rtol=0, atol=1e-5)


# ---- time


def test_the_first_latent_enters_no_time_convolution():
    """Frame 0 skips time_conv, and zeros precede frame 1: a port that convolves over all frames gets this wrong."""
    torch.manual_seed(0)
    up = Upsample(4, 2, True, Borders())
    x = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    out, _ = up(x)
    assert out.shape == (1, 2, 5, 4, 4)
    assert torch.autograd.grad(out[:, :, 1:].sum(), x, retain_graph=True)[0][:, :, 0].abs().max() == 0
    assert torch.autograd.grad(out[:, :, :1].sum(), up.time_conv.weight)[0].abs().max() == 0
    torch.testing.assert_close(up(x[:, :, 1:])[0][:, :, :1], up(x[:, :, 1:2])[0])

    down = Downsample(4, True, Borders())
    out, _ = down(x.repeat(1, 1, 1, 2, 2))
    assert out.shape == (1, 4, 2, 2, 2)
    assert torch.autograd.grad(out[:, :, :1].sum(), down.time_conv.weight)[0].abs().max() == 0


@pytest.mark.parametrize("style", wan.STYLES)
@pytest.mark.parametrize("changed", [4, 5])
def test_a_frame_changes_no_earlier_latent_and_no_earlier_frame(style, changed):
    ours = wan.model(style, torch.float64)
    video, other = wan.clip(ours, 9), wan.clip(ours, 9)
    other[:, :, changed] += 1
    latent = ours.latent_frames(changed + 1) - 1
    with torch.no_grad():
        first, second = ours(video, sample=False), ours(other, sample=False)
    frame = 0 if latent == 0 else 1 + 4 * (latent - 1)
    assert (first.z - second.z)[:, :, :latent].abs().max() < 1e-14
    assert (first.z - second.z)[:, :, latent].abs().max() > 1e-4
    assert (first.video - second.video)[:, :, :frame].abs().max() < 1e-14
    assert (first.video - second.video)[:, :, frame].abs().max() > 1e-4


@pytest.mark.parametrize(("frames", "beyond"), [(1, 3), (2, 0), (4, 0), (5, 3), (6, 3), (8, 0)])
def test_as_many_frames_of_the_same_size_come_out_as_went_in(frames, beyond):
    """The last frame, row and column are repeated; the reconstruction is cropped."""
    ours = wan.model()
    video = wan.clip(ours, frames, beyond=beyond)
    later = -(frames - 1) % 4
    more = (-video.shape[-2]) % 8, (-video.shape[-1]) % 8
    with torch.no_grad():
        out = ours(video, sample=False)
        full = torch.cat([video, video[:, :, -1:].repeat(1, 1, later, 1, 1)], 2)
        full = torch.cat([full, full[..., -1:, :].repeat(1, 1, 1, more[0], 1)], -2)
        full = torch.cat([full, full[..., -1:].repeat(1, 1, 1, 1, more[1])], -1)
        expected = ours(full, sample=False)
    assert out.video.shape == video.shape
    assert out.z.shape[1:] == ours.latent_shape(frames, *video.shape[-2:])
    assert ours.frames_valid(frames) == (later == 0)
    torch.testing.assert_close(out.z, expected.z, rtol=0, atol=1e-5)
    cut = expected.video[:, :, :frames, : video.shape[-2], : video.shape[-1]]
    torch.testing.assert_close(out.video, cut, rtol=0, atol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample": [True, True]}, "downsample has 2 entries for 4 multipliers; give one per level boundary, 3"),
        ({"latents_mean": [0.0] * 3}, "latents_mean and latents_std have 3 and 4 entries; give 4 each"),
        ({"pad_w": "circle"}, "pad_w is 'circle'; give one of zeros, circular"),
        ({"pad_h": "poles"}, "pad_h is 'poles'; give one of zeros, pole"),
        ({"pad_h": "pole"}, "pad_h=pole turns rows around the panorama; it needs pad_w=circular"),
        ({"chunk_latents": 0}, "chunk_latents is 0; give an integer from 1 "),
        ({"shortcuts": True, "multipliers": [1, 3, 4, 4]}, "the patches of 8 channels cannot be averaged to 24"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        wan.model(**changes)


def test_chunks_that_do_not_fit_are_refused():
    ours = wan.model()
    first = r"4 frames of 16x24; .*1 \+ n \* 4 .*\b8$"
    with pytest.raises(ValueError, match=first):
        ours.encode_chunk(wan.clip(ours, 4), None)
    with torch.no_grad():
        _, cache = ours.encode_chunk(wan.clip(ours, 1), None)
    with pytest.raises(ValueError, match=r"5 frames of 16x24; give n \* 4 frames"):
        ours.encode_chunk(wan.clip(ours, 5), cache)
    with pytest.raises(ValueError, match="1 frame of 17x25"):
        ours.encode_chunk(wan.clip(ours, 1, beyond=1), None)


@pytest.mark.parametrize("frames", [1, 4, 5, 10])
def test_a_number_of_frames_that_does_not_fit_the_latents_is_refused(frames):
    ours = wan.model()
    with pytest.raises(ValueError, match=f"num_frames is {frames}, which does not fit 3 latent frames"):
        ours.decode(wan.latents(ours, 3), frames)
    assert ours.decode(wan.latents(ours, 3), 7).shape[2] == 7


def test_columns_are_not_added_across_a_seam():
    ours = wan.model(pad_w="circular")
    with pytest.raises(ValueError, match=r"width is 27; .*pad_w=circular.* multiple of 8"):
        ours(wan.clip(ours, 1, beyond=3))
    with pytest.raises(ValueError, match=r"width is 56; .*pad_w=circular.* multiple of 16"):  # with patches of 2 pixels
        wan.model("wan22", pad_w="circular").stream(32, 56)
    assert ours(wan.clip(ours, 1)[..., :13, :]).video.shape[-2:] == (13, 24)  # rows may be
    ours = wan.model(pad_w="circular", pad_h="pole")
    with pytest.raises(ValueError, match=r"width is 24; .*pad_h=pole.* multiple of 16"):
        ours(wan.clip(ours, 1))

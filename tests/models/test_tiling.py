"""Tiled coding: exact with margins, close and seamless when blended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models import autoencoders

from tests import tiny
from tests.models import diffusers_tiny, wan
from vae3d.errors import UserError
from vae3d.models import taesd as taesd_module
from vae3d.models import wan as wan_module
from vae3d.models.diffusers_classes import CLASSES
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.taehv import TAEHV
from vae3d.models.taehv import VARIANTS as TAEHV_VARIANTS
from vae3d.models.taesd import TAESD
from vae3d.types import Delta, LatentSpec

SMALL = {"multipliers": [1, 2], "downsample": [True], "layers": 1}  # of stride 2; Wan2.2's 4
SIZES = {"wan": (14, 16), "wan22": (20, 22)}  # in latents


def small(style: str = "wan", **changes: object):
    if style == "wan22":
        changes = {"multipliers": [1, 1], **changes}
    return wan.model(style, torch.float64, **{**SMALL, **changes})


def tiles(model: VideoAutoencoder, height: int, width: int) -> int:
    """Of the decoder. height, width: of the latents."""
    tiling, margin = model.tiling, model.tiling.margin("decoder")
    return len(tiling.spans(height, margin, False, 1)) * len(tiling.spans(width, margin, tiling.circular, 1))


# ---- Wan: attention at the lowest resolution sees whole frames


@pytest.mark.parametrize(("style", "pad_w"), [("wan", "zeros"), ("wan", "circular"), ("wan22", "circular")])
def test_tiles_with_halos_are_exact(style, pad_w):
    ours = small(style, pad_w=pad_w)
    height, width = SIZES[style]
    frames = [1, 2]
    video, z = wan.clip(ours, sum(frames), height, width), wan.latents(ours, 2, height, width)
    with torch.no_grad():
        coded, pixels = wan.moments(ours.encode(video)), ours.decode(z)
        whole = ours(video, sample=False).video
    for tile in (3, 5) if style == "wan" else (5,):
        ours.set_tiles(tile * ours.spec.space_stride)
        assert tiles(ours, height, width) > 3
        with torch.no_grad():
            torch.testing.assert_close(wan.encode_in(ours, video, frames), coded, rtol=0, atol=1e-10)
            torch.testing.assert_close(wan.decode_in(ours, z, [1, 1]), pixels, rtol=0, atol=1e-10)
    stream = ours.stream(*video.shape[-2:], 1e-9)
    assert stream.chunks(3) == [1] + [ours.spec.time_stride] * (2 // ours.spec.time_stride)
    with torch.no_grad():
        found = torch.cat([stream(piece).video for piece in video.split(frames, 2)], 2)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_the_published_depth_is_exact_too():
    """Four levels; the lowest is not tiled."""
    ours = wan.model(dtype=torch.float64, pad_w="circular", layers=1)
    video, z = wan.clip(ours, 1, 2, 24), wan.latents(ours, 1, 2, 24)
    with torch.no_grad():
        coded, pixels = wan.moments(ours.encode(video)), ours.decode(z)
        ours.set_tiles(16)
        torch.testing.assert_close(wan.encode_in(ours, video, [1]), coded, rtol=0, atol=1e-10)
        torch.testing.assert_close(wan.decode_in(ours, z, [1]), pixels, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pad_w", ["zeros", "circular"])
@pytest.mark.parametrize("overlap", [4, 8])
def test_blended_weights_sum_to_one_everywhere(pad_w, overlap):
    """A decoder and an encoder with constant results give this constant."""
    ours = small(pad_w=pad_w)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.zero_() if name.endswith("weight") else p.fill_(0.5)
    ours.set_tiles(16, overlap)
    pixels = wan.decode_in(ours, wan.latents(ours, 2, 20, 24), [1, 1])
    assert pixels.shape == (1, 3, 3, 40, 48)
    torch.testing.assert_close(pixels, torch.full_like(pixels, 0.5), rtol=0, atol=1e-12)
    moments = wan.encode_in(ours, wan.clip(ours, 3, 20, 24), [1, 2])
    torch.testing.assert_close(moments, torch.full_like(moments, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pad_w", ["zeros", "circular"])
def test_where_tiles_differ_the_blend_is_a_line(monkeypatch, pad_w):
    """Every tile is filled with its index: pixels rise linearly over the overlap."""
    ours = small(pad_w=pad_w)
    ours.set_tiles(16, 8)
    numbers = iter(range(100))

    def numbered(layers, x, cache, return_cache):
        if not layers:
            return x, []
        shape = (1, 3, 1, x.shape[-2] * 2, x.shape[-1] * 2)
        return torch.full(shape, float(next(numbers)), dtype=torch.float64), [None]

    monkeypatch.setattr(wan_module, "run_chain", numbered)
    row = wan.decode_in(ours, wan.latents(ours, 1, 4, 24), [1])[0, 0, 0, 0]
    rise = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    expected = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat_interleave(16)
    expected[12:20], expected[28:36] = rise, 1 + rise
    if pad_w == "circular":
        expected[44:], expected[:4] = (2 - 2 * rise).split(4)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


def test_blending_is_near_to_whole_frames():
    ours = small(pad_w="circular")
    z = wan.latents(ours, 1, 20, 24)
    error = {}
    with torch.no_grad():
        whole = ours.decode(z)
        for overlap in (4, 8):
            ours.set_tiles(16, overlap)
            error[overlap] = wan.relative_error(wan.decode_in(ours, z, [1]), whole)
    assert 1e-6 < error[8] < 0.35  # never equal: attention sees a tile only
    assert error[8] < error[4]


def test_poles_are_refused():
    with pytest.raises(ValueError, match="pad_h=pole cannot be coded in tiles; use pad_h=zeros, or whole frames"):
        small(pad_w="circular", pad_h="pole").set_tiles(16)


def test_chunks_of_a_stream_are_as_long_as_the_memory_for_a_tile_allows():
    ours = small()
    whole = ours.stream(512, 512, 1e-3).chunk_latents
    ours.set_tiles(4)
    side = ours.coded_size(512, 512)
    assert side[0] == side[1] < 64
    budget = ours.chunk_memory(2, *side) / 2**30
    assert ours.stream(512, 512, budget).chunk_latents == 2
    ours.set_tiles(None)
    assert ours.stream(512, 512, budget).chunk_latents == 1
    assert ours.stream(512, 512, 1e-3).chunk_latents == whole


# ---- convolutions only: any size, any model


def taesd(variant: str) -> TAESD:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taesd_module, "WIDTH", 8)
        widths = [8] * (6 if variant == "taesana" else 4)
        return TAESD(variant=variant, decoder_channels=widths).double().eval()


def taehv(variant: str, **changes: object) -> TAEHV:
    torch.manual_seed(0)
    widths = {"channels": 8, "decoder_channels": [8, 8, 8, 8]}
    return TAEHV(variant=variant, **{**widths, **changes}).double().eval()


def diffusers(kind: str, **config: object) -> DiffusersVAE:
    torch.manual_seed(0)
    model = DiffusersVAE(kind, {**diffusers_tiny.CONFIGS[kind], **config})
    diffusers_tiny.randomised(model.vae)
    return model.double().eval()


LOCAL = {
    "AutoencoderTiny": {},
    "AutoencoderKLLTXVideo": {"decoder_inject_noise": [False] * 5},
    "AutoencoderKLLTX2Video": {},
    "Kandinsky6SRVAE": {},
}
EXACT = {
    # one of each structure
    **{variant: lambda variant=variant: taesd(variant) for variant in ("taesd", "taef2", "taesana")},
    **{
        variant: lambda variant=variant: taehv(variant)
        for variant in ("taew2_1", "taecvx", "taeltx_2", "taehv1_5_super")
    },
    "taew2_2, pruned": lambda: taehv("taew2_2", decoder_blocks=[0, 4, 1], pixel_channels=4),
    **{kind: lambda kind=kind: diffusers(kind, **LOCAL[kind]) for kind in LOCAL},
}


def noise(channels: int, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, channels, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_tiles_of_convolutions_are_exact_and_their_margin_is_needed(name):
    """Sizes that are no multiples of the stride, and frames that are smaller than a tile along one side."""
    if name in LOCAL and not hasattr(autoencoders, name):
        pytest.skip(f"this diffusers has no {name}")
    model = EXACT[name]()
    stride, frames = model.spec.space_stride, 1 if name in LOCAL else 1 + model.spec.time_stride
    model.set_tiles(stride)
    tile = max(model.tiling.reach.values())
    sides = 2 * stride - 1, (3 * tile + 1) * stride - 1
    for height, width in (sides, sides[::-1]) if name in ("taesd", "taew2_1") else (sides,):
        video = noise(model.pixel_channels, frames, height, width)
        z = noise(model.spec.channels, model.latent_frames(frames), *model.spec.latent_size(height, width))
        model.set_tiles(None)
        coded, pixels = model.encode(video).mode(), model.decode(z)
        model.set_tiles(tile * stride)
        assert tiles(model, *z.shape[-2:]) == 4
        torch.testing.assert_close(model.encode(video).mode(), coded, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.decode(z), pixels, rtol=0, atol=1e-6)
    assert str(model.tiling) == f"exact tiles of {tile * stride} x {tile * stride}"
    model.tiling = replace(model.tiling, reach={"encoder": 0, "decoder": 0})
    assert (model.encode(video).mode() - coded).abs().max() > 1e-5
    assert (model.decode(z) - pixels).abs().max() > 1e-5


@torch.no_grad()
def test_exact_tiles_of_a_class_of_diffusers_continue_across_the_seam_of_a_panorama():
    model = DiffusersVAE("AutoencoderTiny", diffusers_tiny.CONFIGS["AutoencoderTiny"], pad_w="circular").double().eval()
    diffusers_tiny.randomised(model.vae)
    stride = model.spec.space_stride
    model.set_tiles(stride)
    tile = max(model.tiling.reach.values())
    video = noise(3, 1, stride, (3 * tile + 1) * stride)
    assert tiles(model, 1, 3 * tile + 1) > 2
    tiled = model(video, sample=False)
    model.set_tiles(None)
    whole = model(video, sample=False)
    torch.testing.assert_close(tiled.z, whole.z, rtol=0, atol=1e-6)
    torch.testing.assert_close(tiled.video, whole.video, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", TAEHV_VARIANTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_every_taehv_has_narrow_margins(variant, mode):
    """Layers at a quarter of the resolution or less are not tiled: without that the margins would be 9."""
    model = taehv(variant)
    with mode():
        model.set_tiles(model.spec.space_stride)
    assert model.tiling.reach == {"encoder": 3, "decoder": 3 if variant.endswith(("super", "wide")) else 4}


@pytest.mark.parametrize(
    ("model", "overlap"),
    [
        (lambda: taehv("taew2_1"), None),
        (lambda: taehv("taecvx"), None),
        (lambda: taehv("taew2_2_super"), 32),
        (lambda: diffusers("AutoencoderKLWan"), 16),
        (lambda: taesd("taesd"), None),
    ],
)
@torch.no_grad()
def test_a_stream_in_tiles_gives_what_a_clip_in_tiles_gives(model, overlap):
    """Each tile has a state of its own."""
    model = model()
    stride = model.spec.space_stride
    model.set_tiles(stride if overlap is None else 2 * overlap, overlap)
    frames, height, width = 9, stride, 10 * stride - 1
    video = noise(3, frames, height, width)
    assert tiles(model, *model.spec.latent_size(height, width)) > 1
    stream = model.stream(height, width, 1e-9)
    lengths = stream.chunks(frames)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert len(lengths) > 1
    pieces = [video[:, :, end - n : end + stream.lookahead] for n, end in zip(lengths, ends, strict=True)]
    found = torch.cat([stream(piece).video for piece in pieces], 2)
    torch.testing.assert_close(found, model(video, sample=False).video, rtol=0, atol=1e-9)


# ---- GroupNorm and attention over whole frames: blended


def test_the_classes_of_diffusers_that_have_exact_tiles():
    assert {kind for kind, entry in CLASSES.items() if not entry.whole_frames} == set(LOCAL)


@pytest.mark.parametrize("name", tiny.MODEL)
@torch.no_grad()
def test_every_model_of_conf_codes_in_tiles(name):
    """Otherwise frames are coded whole, in more memory than was asked for, and records say that they were not."""
    model = tiny.model(name).eval()
    stride = model.spec.space_stride
    model.set_tiles(4 * stride, 2 * stride)
    tiling, parts = model.tiling, []

    class Recorder:
        def __getattr__(self, name):
            return getattr(tiling, name)

        def __call__(self, part, *args, **kwargs):
            parts.append(part)
            return tiling(part, *args, **kwargs)

    model.tiling = Recorder()
    video = noise(model.pixel_channels, 2, stride, 6 * stride).float()
    out = model(video, sample=False)
    assert {*parts} == {"encoder", "decoder"}
    assert out.video.shape == video.shape
    parts.clear()
    stream = model.stream(*video.shape[-2:])
    stream.chunks(2)
    stream(video)
    assert {*parts} == {"encoder", "decoder"}


class Untiled(VideoAutoencoder):
    """A model that ignores `tiling`."""

    whole_frames = "GroupNorm"

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 3, 1)
        self.spec = LatentSpec(3, 1, 2, True, (0.0,) * 3, (1.0,) * 3)

    def encode(self, video):
        return Delta(self.conv(video[..., ::2, ::2]))

    def decode(self, z, num_frames=None):
        return self.conv(z).repeat_interleave(2, 3).repeat_interleave(2, 4)


@pytest.mark.parametrize("overlap", [None, 4])
def test_a_model_that_does_not_code_in_tiles_is_refused(overlap):
    model = Untiled()
    with pytest.raises(
        UserError,
        match=f"tile=8{'' if overlap is None else ', tile_overlap=4'}: Untiled .*encoder and decoder.*leave out tile",
    ):
        model.set_tiles(8, overlap)
    assert model.tiling is None


BLENDED = {
    "spatial": lambda: tiny.model("spatial"),
    "temporal_vae": lambda: tiny.model("temporal_vae"),
    "temporal_taef2": lambda: tiny.model("temporal_taef2"),
    "opensora_v1_3": lambda: tiny.model("opensora_v1_3"),
    "AutoencoderKL": lambda: diffusers("AutoencoderKL"),
    "AutoencoderDC": lambda: diffusers("AutoencoderDC"),
    "AutoencoderKLLTXVideo": lambda: diffusers("AutoencoderKLLTXVideo"),  # whose decoder draws noise
}


@pytest.mark.parametrize("name", BLENDED)
@torch.no_grad()
def test_blended_tiles_of_other_models(name):
    """One tile that covers the frame is the frame; several differ from it."""
    model = BLENDED[name]().double().eval()
    diffusers_tiny.randomised(model)
    stride = model.spec.space_stride
    video = noise(3, model.spec.time_stride + 1, 2 * stride, 14 * stride - 1)
    whole = model(video, sample=False)
    with pytest.raises(UserError, match=rf"tile={8 * stride}: .*tile_overlap={2 * stride}"):
        model.set_tiles(8 * stride)
    assert model.tiling is None
    model.set_tiles(12 * stride, 4 * stride)
    assert torch.equal(model(video, sample=False).video, whole.video)
    model.set_tiles(8 * stride, 4 * stride)
    tiled = model(video, sample=False)
    assert tiled.video.shape == video.shape
    assert tiled.z.shape == whole.z.shape
    error = wan.relative_error(tiled.video, whole.video)
    assert 1e-9 < error < 1
    assert str(model.tiling) == f"blended tiles of {8 * stride} x {8 * stride}, overlapping by {4 * stride}"
    if whole.spatial is not None:
        assert tiled.spatial.latent_rec.shape == whole.spatial.latent_rec.shape
        assert model.spatial_vae.tiling.exact == (name == "temporal_taef2")


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (3, None, "tile=3: tile must be a multiple of the model's space stride 2"),
        (0, None, "tile=0: tile must be a multiple"),
        (16, 6, "tile_overlap=6: tile_overlap must be a multiple of 4 of at most half the tile's 16"),
        (16, 12, "tile_overlap=12: tile_overlap must be a multiple of 4 of at most half the tile's 16"),
        (16, 0, "tile_overlap=0: tile_overlap must be a multiple of 4"),
    ],
)
@pytest.mark.parametrize("model", [small, lambda: tiny.model("spatial")])
def test_sizes_that_do_not_divide_are_refused(model, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        model().set_tiles(tile, overlap)


def test_half_precision_is_blended_in_full():
    """Weights of a ramp do not sum to one in bf16."""
    model = tiny.model("spatial").bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_() if "weight" in name else p.fill_(0.7)
        model.set_tiles(16, 8)
        pixels = model.decode(torch.zeros(1, model.spec.channels, 1, 4, 20))
        assert pixels.dtype == torch.bfloat16
        assert len(pixels.unique()) == 1

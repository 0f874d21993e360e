"""Tiled coding: exact with margins, close and seamless when blended."""

from __future__ import annotations

import pytest
import torch

from tests.models import wan
from vae3d.models import tiling
from vae3d.models.streaming import CausalStream
from vae3d.models.tiling import Tiled

SMALL = {"multipliers": [1, 2], "downsample": [True], "layers": 1}  # of stride 2; Wan2.2's 4
SIZES = {"wan": (14, 16), "wan22": (20, 22)}  # in latents


def small(style: str = "wan", **changes: object):
    if style == "wan22":
        changes = {"multipliers": [1, 1], **changes}
    return wan.model(style, torch.float64, **{**SMALL, **changes})


def tiles(coder: Tiled, ours, height: int, width: int) -> int:
    margin = coder._margin(coder._decoder[0])
    return len(coder._spans(height, margin, False, 1)) * len(coder._spans(width, margin, coder.circular, 1))


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
        tiled = Tiled(ours, tile * ours.spec.space_stride)
        assert tiles(tiled, ours, height, width) > 3
        torch.testing.assert_close(wan.encode_in(tiled, video, frames), coded, rtol=0, atol=1e-10)
        torch.testing.assert_close(wan.decode_in(tiled, z, [1, 1]), pixels, rtol=0, atol=1e-10)
    stream = CausalStream(tiled, 1)
    found = torch.cat([stream(piece).video for piece in video.split(stream.chunks(sum(frames)), 2)], 2)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_the_published_depth_is_exact_too():
    """Four levels; the lowest is not tiled."""
    ours = wan.model(dtype=torch.float64, pad_w="circular", layers=1)
    video, z = wan.clip(ours, 1, 2, 24), wan.latents(ours, 1, 2, 24)
    tiled = Tiled(ours, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            wan.encode_in(tiled, video, [1]), wan.moments(ours.encode(video)), rtol=0, atol=1e-10
        )
        torch.testing.assert_close(wan.decode_in(tiled, z, [1]), ours.decode(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_half_of_the_halo_would_not_be_exact(monkeypatch, part):
    ours = small()
    video, z = wan.clip(ours, 1, 20, 24), wan.latents(ours, 1, 20, 24)
    reach = tiling._reach
    monkeypatch.setattr(tiling, "_reach", lambda layers, behind=0: reach(layers, behind) // 2)
    tiled = Tiled(ours, 8)
    with torch.no_grad():
        if part == "encode":
            error = wan.encode_in(tiled, video, [1]) - wan.moments(ours.encode(video))
        else:
            error = wan.decode_in(tiled, z, [1]) - ours.decode(z)
    assert error.abs().max() > 1e-4


@pytest.mark.parametrize("pad_w", ["zeros", "circular"])
@pytest.mark.parametrize("overlap", [4, 8])
def test_blended_weights_sum_to_one_everywhere(pad_w, overlap):
    """A decoder and an encoder with constant results give this constant."""
    ours = small(pad_w=pad_w)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.zero_() if name.endswith("weight") else p.fill_(0.5)
    tiled = Tiled(ours, 16, overlap)
    pixels = wan.decode_in(tiled, wan.latents(ours, 2, 20, 24), [1, 1])
    assert pixels.shape == (1, 3, 3, 40, 48)
    torch.testing.assert_close(pixels, torch.full_like(pixels, 0.5), rtol=0, atol=1e-12)
    moments = wan.encode_in(tiled, wan.clip(ours, 3, 20, 24), [1, 2])
    torch.testing.assert_close(moments, torch.full_like(moments, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pad_w", ["zeros", "circular"])
def test_where_tiles_differ_the_blend_is_a_line(monkeypatch, pad_w):
    """Every tile is filled with its index: pixels rise linearly over the overlap."""
    ours = small(pad_w=pad_w)
    tiled = Tiled(ours, 16, 8)
    numbers = iter(range(100))

    def numbered(layers, x, cache, return_cache):
        if not layers:
            return x, []
        shape = (1, 3, 1, x.shape[-2] * 2, x.shape[-1] * 2)
        return torch.full(shape, float(next(numbers)), dtype=torch.float64), [None]

    monkeypatch.setattr(tiling, "run_chain", numbered)
    row = wan.decode_in(tiled, wan.latents(ours, 1, 4, 24), [1])[0, 0, 0, 0]
    rise = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    expected = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat_interleave(16)
    expected[12:20], expected[28:36] = rise, 1 + rise
    if pad_w == "circular":
        expected[44:], expected[:4] = (2 - 2 * rise).split(4)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


def test_blending_is_near_to_whole_frames():
    ours = small(pad_w="circular")
    z = wan.latents(ours, 1, 20, 24)
    with torch.no_grad():
        error = {
            overlap: wan.relative_error(wan.decode_in(Tiled(ours, 16, overlap), z, [1]), ours.decode(z))
            for overlap in (4, 8)
        }
    assert 1e-6 < error[8] < 0.35  # never equal: attention sees a tile only
    assert error[8] < error[4]


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (3, None, "tile is 3; use a multiple of the model's space stride 2"),
        (0, None, "tile is 0; use a multiple"),
        (16, 6, "overlap is 6; use a multiple of 4 of at most half the tile's 16"),
        (16, 12, "overlap is 12; use a multiple of 4 of at most half the tile's 16"),
        (16, 0, "overlap is 0; use a multiple of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        Tiled(small(), tile, overlap)


def test_poles_are_refused():
    with pytest.raises(ValueError, match="pad_h=pole cannot be coded in tiles; use pad_h=zeros, or whole frames"):
        Tiled(small(pad_w="circular", pad_h="pole"), 16)


def test_chunks_of_a_stream_are_as_long_as_the_memory_for_a_tile_allows():
    ours = small()
    tiled = Tiled(ours, 4)
    assert tiled.pixels < 64
    budget = ours.chunk_memory(2, tiled.pixels, tiled.pixels) / 2**30
    assert tiled.stream(512, 512, budget).chunk_latents == 2
    assert ours.stream(512, 512, budget).chunk_latents == 1
    assert tiled.spec is ours.spec

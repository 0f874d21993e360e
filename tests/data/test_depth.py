from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vae3d.data.batches.batch_schedule import ClipIndex
from vae3d.data.batches.clips import ClipSettings, collate, open_frames, read_clip, to_sample
from vae3d.data.decoding.depth import (
    DepthReader,
    DepthSettings,
    depth_of,
    encode_depth,
    from_metres,
    nearest,
    to_metres,
)
from vae3d.data.media import MediaError
from vae3d.types import ClipBatch

MAPPINGS = ("log", "inverse")
BOUNDS = torch.tensor([0.1, 20.0])


def metres(*values: float) -> torch.Tensor:
    """[1, 1, 1, N]."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def write(folder, *maps: np.ndarray) -> str:
    for i, stored in enumerate(maps):
        Image.fromarray(stored).save(folder / f"depth_{i:04d}.png")
    return str(folder / "depth_*.png")


def grid(height=4, width=8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(500, 9000, (height, width)).astype(np.uint16)


def test_log_by_hand():
    bounds = torch.tensor([0.1, 10.0])
    mapped = from_metres(metres(0.1, 1.0, 10.0, 0.01, 50.0), bounds, "log")
    torch.testing.assert_close(mapped, metres(-1, 0, 1, -1, 1), atol=1e-6, rtol=0)


def test_inverse_by_hand():
    """1 / metres runs from 4 at the near bound to 0.5 at the far one: 1 m lies (4 - 1) / 3.5 of the way."""
    bounds = torch.tensor([0.25, 2.0])
    mapped = from_metres(metres(0.25, 1.0, 2.0), bounds, "inverse")
    torch.testing.assert_close(mapped, metres(-1, 2 * 3 / 3.5 - 1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_metres_come_back(mapping):
    there = metres(*np.geomspace(0.1, 20.0, 50).tolist())
    torch.testing.assert_close(
        to_metres(from_metres(there, BOUNDS, mapping), BOUNDS, mapping), there, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_a_network_adds_beyond_the_range_is_clipped(mapping):
    torch.testing.assert_close(to_metres(metres(-1.3, 1.7), BOUNDS, mapping), metres(0.1, 20.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_each_clip_of_a_batch_has_its_own_bounds(mapping):
    bounds = torch.tensor([[0.5, 4.0], [1.0, 30.0]])
    ends = metres(-1.0, 1.0).expand(2, 1, 1, 1, 2)
    torch.testing.assert_close(to_metres(ends, bounds, mapping).flatten(1), bounds)


def test_depth_of_a_video_is_the_mean_of_its_channels():
    video = torch.arange(2 * 3 * 2, dtype=torch.float32).reshape(2, 3, 1, 1, 2)
    assert depth_of(video).tolist() == [[[[[2.0, 3.0]]]], [[[[8.0, 9.0]]]]]


def test_encoding_marks_what_was_not_measured_and_gives_it_a_harmless_value():
    stored = np.array([[[0, 100, 1000, 20000, 50]]], np.uint16)
    video, valid, bounds = encode_depth(stored, DepthSettings("log"))
    assert (video.dtype, valid.dtype, video.shape, valid.shape) == (
        torch.float32,
        torch.bool,
        (3, 1, 1, 5),
        (1, 1, 1, 5),
    )
    assert valid.flatten().tolist() == [False, True, True, True, True]
    middle = 2 * math.log(10) / math.log(200) - 1
    for channel in video:
        assert channel.flatten().tolist() == pytest.approx([0, -1, middle, 1, -1], abs=1e-6)
    assert bounds.tolist() == pytest.approx([0.1, 20.0])


def test_the_unit_says_what_a_metre_is():
    stored = np.array([[[256, 2560]]], np.uint16)
    video, _, bounds = encode_depth(stored, DepthSettings("log", unit=256.0))
    assert to_metres(depth_of(video), bounds, "log").flatten().tolist() == pytest.approx([1, 10], rel=1e-5)


def test_percentiles_are_the_clips_own_and_forget_the_invalid():
    stored = np.zeros((2, 1, 101), np.uint16)
    stored[0, 0] = 1000 + 10 * np.arange(101)  # the second frame holds nothing
    video, valid, bounds = encode_depth(stored, DepthSettings("inverse", bounds="percentiles"))
    assert bounds.tolist() == pytest.approx([1.02, 1.98])
    assert video[0, 0, 0, :3].tolist() == pytest.approx([-1, -1, -1])
    assert video[0, 0, 0, -3:].tolist() == pytest.approx([1, 1, 1])
    assert valid.sum() == 101


def test_a_bare_wall_is_not_stretched():
    video, _, bounds = encode_depth(np.full((1, 2, 2), 2000, np.uint16), DepthSettings("log", bounds="percentiles"))
    assert bounds.tolist() == pytest.approx([2.0, 2.02])
    assert video.flatten().tolist() == pytest.approx([-1] * 12)


# --- files


def test_stored_values_are_read_in_order_without_loss(tmp_path):
    maps = [grid(seed=i) for i in range(3)]
    reader = DepthReader(write(tmp_path, *maps))
    assert (reader.info.num_frames, reader.info.height, reader.info.width, reader.info.bits) == (3, 4, 8, 16)
    np.testing.assert_array_equal(reader.read([2, 0]), np.stack([maps[2], maps[0]]))


def test_resizing_invents_no_depth():
    stored = np.zeros((8, 16), np.uint16)
    stored[:, 8:] = 9000
    stored[2:6] = 700
    small = nearest(stored, (3, 5))
    assert set(np.unique(small)) <= {0, 700, 9000}
    np.testing.assert_array_equal(nearest(np.arange(8)[None], (1, 4)), [[1, 3, 5, 7]])
    np.testing.assert_array_equal(nearest(np.arange(3)[None], (1, 6)), [[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize(
    ("pixels", "kind"), [(np.uint8, "8-bit L"), (np.float32, "floating-point"), ((np.uint8, 3), "8-bit RGB")]
)
def test_other_pixels_than_16_bit_grey_are_refused(tmp_path, pixels, kind):
    dtype, shape = (pixels[0], (4, 8, 3)) if isinstance(pixels, tuple) else (pixels, (4, 8))
    Image.fromarray(np.ones(shape, dtype)).save(tmp_path / "depth_0.tiff")
    with pytest.raises(MediaError, match=rf"depth_0\.tiff: holds {kind} pixels;"):
        DepthReader(tmp_path / "depth_*.tiff").read([0])


def test_maps_of_mixed_sizes_are_refused(tmp_path):
    reader = DepthReader(write(tmp_path, grid(), grid(8, 16)))
    with pytest.raises(MediaError, match=r"depth_0001\.png: is 8x16, .* 4x8"):
        reader.read([0, 1])


# --- clips


SETTINGS = ClipSettings(4, 8, panorama=True, depth=DepthSettings("log"))


def sample(path: str, settings: ClipSettings = SETTINGS, frames: int = 2):
    return to_sample(
        read_clip(open_frames(path, settings), path, settings, frames, 0.0), ClipIndex(7, 0, frames), path, settings
    )


def test_a_batch_of_depth_has_masks_and_bounds_and_moves_with_them(tmp_path):
    maps = [grid(seed=i) for i in range(2)]
    maps[1][:, 3] = 0
    clip = collate([sample(write(tmp_path, *maps))] * 2)
    assert (clip.video.shape, clip.valid.shape, clip.depth_bounds.shape) == ((2, 3, 2, 4, 8), (2, 1, 2, 4, 8), (2, 2))
    moved = clip.to("meta")
    assert moved.video.device.type == moved.valid.device.type == moved.depth_bounds.device.type == "meta"
    back = to_metres(depth_of(clip.to("cpu").video), clip.depth_bounds, "log")[0, 0]
    stored = torch.from_numpy(np.stack(maps).astype(np.float32)) / 1000
    torch.testing.assert_close(back[clip.valid[0, 0]], stored[clip.valid[0, 0]], rtol=1e-4, atol=0)
    assert not clip.valid[:, :, 1, :, 3].any()
    assert clip.valid.sum() == 2 * (2 * 32 - 4)


def test_clips_of_colours_have_neither(clip):
    plain = ClipBatch(clip, torch.zeros(2), ["", ""]).to("cpu")
    assert plain.valid is None
    assert plain.depth_bounds is None


def test_a_clip_without_any_measurement_is_refused(tmp_path):
    with pytest.raises(MediaError, match=r"depth_\*\.png: holds no depth: every pixel is 0"):
        sample(write(tmp_path, *[np.zeros((4, 8), np.uint16)] * 2))

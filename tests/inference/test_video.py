from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from tests import tiny
from vae3d.data.decoding.readers import open_media
from vae3d.inference.video import VideoWriter, write_image, write_video
from vae3d.pixels import to_uint8


@pytest.mark.parametrize("size", [(32, 40), (33, 41)])
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_lossless_is_bit_exact_for_any_size(tmp_path, size, reader):
    clip = np.random.default_rng(0).integers(0, 256, (9, *size, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", clip, 24)
    opened = open_media(tmp_path / "a.mp4", reader)
    np.testing.assert_array_equal(opened.read(range(9)), clip)
    assert opened.info.pixels == "gbrp"


@pytest.mark.parametrize(("size", "pixels"), [((64, 80), "yuv420p"), ((33, 41), "yuv444p")])
def test_h264_looks_the_same_and_says_its_colour_matrix(tmp_path, size, pixels):
    clip = tiny.frames(5, *size)
    clip = np.repeat(clip.mean(-1, keepdims=True).astype(np.uint8), 3, -1)  # grey: 4:2:0 costs nothing
    write_video(tmp_path / "a.mp4", clip, 24, "h264")
    read = open_media(tmp_path / "a.mp4").read(range(5))
    assert np.abs(read.astype(float) - clip).mean() < 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.format.name == pixels
        assert frame.colorspace == 6


def test_equal_videos_are_equal_bytes(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (28, 32, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    clip = np.stack([coarse[2 * t :, 3 * t % 131 :][:64, :96] for t in range(60)])
    larger = clip.repeat(2, 1).repeat(2, 2)
    for name in "abcd":
        write_video(tmp_path / f"{name}.mp4", clip, 24, "h264")
        write_video(tmp_path / "larger.mp4", larger, 24, "h264")  # leaves other values in freed memory
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in "abcd"}) == 1


@pytest.mark.parametrize("fps", [24.0, 29.97002997002997, 12.5, 7.992, 0.0015, 1 / 3600])
def test_frame_rate_is_kept(tmp_path, fps):
    write_video(tmp_path / "a.mp4", tiny.frames(20), fps)
    assert open_media(tmp_path / "a.mp4").info.fps == pytest.approx(fps, rel=1e-4)
    assert open_media(tmp_path / "a.mp4").info.num_frames == 20


def test_a_broken_off_video_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), VideoWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(tiny.frames(3))
        assert not (tmp_path / "a.mp4").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.0039, 0.0040, 1.0, 3.0]).reshape(1, 1, 1, 7).expand(3, -1, -1, -1)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 128, 255, 255]
    every = torch.arange(256).float().div(127.5).sub(1).reshape(1, 1, 16, 16).expand(3, -1, -1, -1)
    assert to_uint8(every)[0, ..., 0].flatten().tolist() == list(range(256))


def test_images_are_png(tmp_path):
    picture = tiny.frames(1)[0]
    write_image(tmp_path / "sub/a.png", picture)
    np.testing.assert_array_equal(open_media(tmp_path / "sub/a.png").read([0])[0], picture)


def test_unknown_codec_is_refused(tmp_path):
    with pytest.raises(ValueError, match="codec is 'av1'; use one of lossless, h264"):
        VideoWriter(tmp_path / "a.mp4", 24, "av1")

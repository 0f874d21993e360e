"""Pictures and plots are inline and reproducible, grids keep the order of their pictures."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from vae3d.inference.pictures import grid
from vae3d.report import score_names
from vae3d.report.html import img, resize_to_width, subplots, svg
from vae3d.text import byte_text, plural, significant


def test_pictures_are_inline_and_keep_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    tag = img(Image.fromarray(pixels))
    data = re.fullmatch(r'<img src="data:image/png;base64,([^"]+)">', tag)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]))
    assert np.array_equal(shown, pixels)


def test_plots_are_the_same_every_time():
    def plot():
        figure, axes = subplots(4, columns=3, width=2, height=2)
        assert len(axes) == 4
        axes[3].plot([1, 2, 3])
        return svg(figure)

    assert plot() == plot()
    assert plot().startswith("<svg")


def test_grids_go_row_by_row():
    frames = np.stack([np.full((2, 3, 7, 3), value, np.uint8) for value in (1, 2, 3)])
    picture = grid(frames)
    assert picture.shape == (2, 8, 16, 3)
    assert grid(frames[:1]).shape == (2, 4, 8, 3)
    assert [picture[0, 0, 0, 0], picture[0, 0, 9, 0], picture[1, 5, 0, 0], picture[1, 5, 9, 0]] == [1, 2, 3, 0]


def test_enlarged_pixels_stay_sharp():
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8))
    assert set(np.asarray(resize_to_width(image, 8)).ravel()) == {0, 255}
    assert resize_to_width(Image.new("RGB", (100, 50)), 10).size == (10, 5)


def test_psnr_video_is_shown_unless_every_validation_has_the_same_value_for_psnr():
    """Values that only round alike are not the same."""
    same, close = {"step": 1, "val/psnr": 20.0, "val/psnr_video": 20.0}, {"val/psnr": 20.0, "val/psnr_video": 20.0001}
    assert score_names([same, same]) == ["val/psnr"]
    assert score_names([same, close]) == ["val/psnr", "val/psnr_video"]
    assert score_names([{"val/loss": 1.0}, same]) == ["val/loss", "val/psnr"]


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [(1, "frame", "1 frame"), (0, "frame", "0 frames"), (2, "entry", "2 entries"), (3, "class", "3 classes"),
     (2, "micro-batch", "2 micro-batches"), (2, "array", "2 arrays"), ("0.5", "epoch", "0.5 epochs"), ("1", "epoch", "1 epoch"), (1, "entry", "1 entry")],
)  # fmt: skip
def test_plural(count, noun, expected):
    assert plural(count, noun) == expected


def test_large_numbers_have_no_exponent():
    assert [significant(value) for value in (0.36363, 9.999, 20.46, 1234.5)] == ["0.364", "10", "20.5", "1230"]
    assert significant(16384, 4) == "16380"
    assert [byte_text(count) for count in (512, 999_700, 2 * 10**15)] == ["512 B", "1000 kB", "2000 TB"]

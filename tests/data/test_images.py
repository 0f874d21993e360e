"""Numbered images as a video, and resizing across the seam."""

from __future__ import annotations

import os
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests import tiny
from vae3d.commands.check_data import main as check
from vae3d.commands.check_data import parse
from vae3d.data.decoding.images import resize_circular
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.table import Table
from vae3d.data.table import probe
from vae3d.data.table.parts import parts_of


def write(folder, numbers, height=16, width=32, name="panorama_{}.png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    pictures = tiny.frames(len(numbers), height, width, seed)
    for number, picture in zip(numbers, pictures, strict=True):
        Image.fromarray(picture).save(folder / name.format(number))
    return pictures


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    pictures = write(tmp_path, [0, 1, 2, 9, 10, 100])  # as text, 10 and 100 come before 2
    with closing(open_media(tmp_path / "panorama_*.png")) as opened:
        assert (opened.info.num_frames, opened.info.height, opened.info.width) == (6, 16, 32)
        assert (opened.info.codec, opened.info.pixels, opened.info.bits) == ("png", "RGB", 8)
        np.testing.assert_array_equal(opened.read(range(6)), pictures)
        np.testing.assert_array_equal(opened.read([4, 0, 4]), pictures[[4, 0, 4]])


def test_a_sequence_has_a_rate_so_that_it_is_no_image(tmp_path):
    write(tmp_path, [0])
    assert open_media(tmp_path / "panorama_*.png").info.fps == 24.0
    assert open_media(tmp_path / "panorama_0.png").info.fps == 0.0


def test_masks_depth_and_partial_renders_are_not_of_the_sequence(tmp_path):
    pictures = write(tmp_path, ["0000", "0001"])
    others = (
        "panorama_0000_mask",
        "mask_panorama_0001",
        "depth_0000",
        "panorama_",
        "panorama_0002.partial",
        "Xpanorama_1",
    )
    for i, other in enumerate(others):
        write(tmp_path, [other], name="{}.png", seed=9 + i)
    (tmp_path / "panorama_0003.jpg").write_bytes(b"")
    np.testing.assert_array_equal(open_media(tmp_path / "panorama_*.png").read([0, 1]), pictures)
    assert open_media(tmp_path / "panorama_*.png").info.num_frames == 2


def test_only_wanted_files_are_read(tmp_path):
    pictures = write(tmp_path, range(4))
    (tmp_path / "panorama_2.png").write_bytes(b"junk")
    opened = open_media(tmp_path / "panorama_*.png")
    np.testing.assert_array_equal(opened.read([0, 3]), pictures[[0, 3]])
    with pytest.raises(MediaError, match=r"panorama_2\.png: is not an image"):
        opened.read([2])


def test_resizing_is_that_of_single_images(tmp_path):
    write(tmp_path, range(3), 40, 64)
    small = open_media(tmp_path / "panorama_*.png").read([1], (10, 16))
    np.testing.assert_array_equal(small, open_media(tmp_path / "panorama_1.png").read([0], (10, 16)))


def test_a_file_of_another_size_is_named(tmp_path):
    write(tmp_path, range(4))
    write(tmp_path, [2], 16, 40)
    opened = open_media(tmp_path / "panorama_*.png")
    with pytest.raises(MediaError, match=r"panorama_2\.png: is 16x40, .* 16x32"):
        opened.read([1, 2])


def test_turned_photographs_have_their_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(tiny.frames(1, 20, 30)[0]).save(tmp_path / "a_0.jpg", exif=exif)
    opened = open_media(tmp_path / "a_*.jpg")
    assert (opened.info.height, opened.info.width) == (30, 20) == opened.read([0]).shape[1:3]


FAULTY = {
    "nowhere/panorama_*.png": "no such folder",
    "scene_*.png": r"no file matches, .* scene_0\.png",
    "pan*rama_*.png": r"pan\*rama_\*\.png must have one \*",
    "clip_*.mp4": r"is no sequence of images; known: \.png",
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_is_no_sequence_is_refused(tmp_path, name):
    write(tmp_path, range(2))
    with pytest.raises(MediaError, match=FAULTY[name]):
        open_media(tmp_path / name)


def test_two_files_of_one_number_are_refused(tmp_path):
    write(tmp_path, ["1", "01", "2"])
    with pytest.raises(MediaError, match=r"panorama_01\.png and panorama_1\.png have the same number; keep one"):
        open_media(tmp_path / "panorama_*.png")


def test_brackets_in_names_are_only_brackets(tmp_path):
    write(tmp_path / "room [1]", range(2), name="pano[a]_{}.png")
    assert open_media(tmp_path / "room [1]/pano[a]_*.png").info.num_frames == 2
    assert len(Folder(tmp_path / "room [1]/pano[a]_*.png").table()) == 1
    assert len(Folder(tmp_path / "*/pano[a]_*.png").table()) == 1


# --- in tables


def test_a_sequence_is_probed_from_a_header_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "a", range(5))
    for number in range(1, 5):
        (tmp_path / f"a/panorama_{number}.png").write_bytes(b"not read")
    pd.DataFrame({"path": ["a/panorama_*.png"]}).to_csv(tmp_path / "t.csv", index=False)
    facts = lambda: probe.fill_metadata(Table(tmp_path / "t.csv").table())[0].iloc[0]  # noqa: E731
    assert facts()[["num_frames", "height", "width", "fps"]].tolist() == [5, 16, 32, 24.0]
    monkeypatch.setattr(probe, "read_metadata", lambda path: pytest.fail("probed again"))
    assert facts()["num_frames"] == 5
    monkeypatch.undo()
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "a", [7])
    assert facts()["num_frames"] == 6
    write(tmp_path / "a", [0], 32, 64)
    assert facts()["height"] == 32
    (cache,) = (tmp_path / "cache/probe").iterdir()
    assert parts_of(cache, probe.KIND)


def test_check_reads_sequences_and_names_their_bad_files(tmp_path, capsys):
    write(tmp_path / "a", range(3))
    write(tmp_path / "b", range(3))
    write(tmp_path / "b", [1], 16, 40)
    assert check(parse([str(tmp_path / "*/panorama_*.png"), "--workers", "1"])) == 1
    out = capsys.readouterr().out
    assert f"row 2: {tmp_path}/b/panorama_*.png: " in out
    assert "panorama_1.png is 16x40" in out
    assert "1 of 2 rows are good" in out


def test_a_path_with_stars_lists_every_folder_that_fits(tmp_path):
    for name in ("x/r1", "x/r2", "y/r1"):
        write(tmp_path / name / "output", range(2))
    write(tmp_path / "y/empty/output", ["mask"], name="{}.png")
    table = Folder(tmp_path / "*/*/output/panorama_*.png").table()
    assert table["name"].tolist() == [f"{room}/output/panorama_*.png" for room in ("x/r1", "x/r2", "y/r1")]
    assert Folder(tmp_path / "x/*/output/panorama_*.png").table()["name"].tolist()[0] == "r1/output/panorama_*.png"
    assert os.path.isabs(table["path"][0])
    with pytest.raises(DataError, match=r"no file matches, with a number for the \*"):
        Folder(tmp_path / "*/*/output/depth_*.png").table()
    with pytest.raises(DataError, match=r"must have one \*"):
        Folder(tmp_path / "*/*/output/*_*.png").table()


# --- resizing across the seam


def test_resizing_around_commutes_with_rolling():
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    small = resize_circular(picture, (8, 16))
    assert small.shape == (8, 16, 3)
    for columns in (4, 20, 32):
        rolled = resize_circular(np.roll(picture, columns, axis=1), (8, 16))
        np.testing.assert_array_equal(rolled, np.roll(small, columns // 4, axis=1))


def test_resizing_around_is_the_usual_one_away_from_the_seam():
    picture = tiny.frames(1, 32, 64)[0]
    usual = np.asarray(Image.fromarray(picture).resize((16, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_circular(picture, (8, 16))[:, 3:-3], usual[:, 3:-3])
    np.testing.assert_array_equal(resize_circular(picture, (64, 128)).shape, (64, 128, 3))

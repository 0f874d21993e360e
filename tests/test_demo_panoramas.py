"""The rendered rooms: their geometry is known, so what is in the files is, too."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import tiny

HEIGHT = 64


@pytest.fixture(scope="module")
def demo():
    return tiny.load_script("make_demo_panoramas")


def room(demo, seed: int = 0):
    return demo.furnish(np.random.default_rng(seed))


def test_rays_look_up_down_ahead_and_to_the_right(demo):
    rays = demo.directions(HEIGHT)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=-1), 1)
    assert (rays[0, :, 2] > 0.999).all()
    assert (rays[-1, :, 2] < -0.999).all()
    np.testing.assert_allclose(rays[HEIGHT // 2, HEIGHT], [1, 0, 0], atol=0.03)
    np.testing.assert_allclose(rays[HEIGHT // 2, HEIGHT + HEIGHT // 2], [0, -1, 0], atol=0.03)  # z is up: right is -y
    np.testing.assert_allclose(rays[HEIGHT // 2, 0], [-1, 0, 0], atol=0.03)


def test_depth_is_the_distance_to_walls_floor_and_ceiling(demo):
    there, eye = room(demo), np.array([2.0, 1.8, 1.5])
    there = demo.Room(**{**vars(there), "high": there.low, "window": -1})  # neither cupboard nor window
    depth = demo.depth(there, eye, 512) / 1000
    up, ahead, behind, right = depth[0, 0], depth[256, 512], depth[256, 0], depth[256, 768]
    assert [up, ahead, behind, right] == pytest.approx([there.size[2] - 1.5, there.size[0] - 2.0, 2.0, 1.8], abs=0.002)
    assert depth[-1].max() == pytest.approx(1.5, abs=0.002)
    assert depth.max() <= np.linalg.norm(there.size)


def test_windows_have_no_depth_and_cupboards_stand_in_front(demo):
    there = room(demo)
    eye = there.size * [0.5, 0.5, 0] + [0, 0, 1.5]
    depth = demo.depth(there, eye, HEIGHT)
    assert 0 < (depth == 0).mean() < 0.1
    bare = demo.depth(demo.Room(**{**vars(there), "high": there.low}), eye, HEIGHT)
    assert (depth <= bare).all()
    assert (depth < bare).mean() > 0.005


def test_lamps_are_bright_squares_on_the_ceiling(demo):
    there = room(demo)
    there = demo.Room(**{**vars(there), "lamps": np.array([[2.0, 1.5]]), "lamp_side": 0.6})
    eye = np.array([2.0, 1.5, 1.5])
    picture = demo.render(there, eye, 256).astype(int)
    lit = (picture == [255, 255, 250]).all(-1)
    reach = np.where(lit, 1, 0).sum(0)  # rows from the pole that the lamp above covers, by column
    angle = (
        np.arctan(0.3 / (there.size[2] - 1.5)) / np.pi * 256
    )  # rows to the middle of a side; to a corner sqrt(2) tan
    corner = np.arctan(0.3 * 2**0.5 / (there.size[2] - 1.5)) / np.pi * 256
    assert reach.min() == pytest.approx(angle, abs=1)
    assert reach.max() == pytest.approx(corner, abs=1)
    assert reach[256] == pytest.approx(angle, abs=1)  # straight ahead
    assert reach[256 + 64] == pytest.approx(corner, abs=1)  # 45 degrees to the right
    assert not lit[128:].any()


def test_pictures_go_on_across_the_seam_and_are_smooth_at_the_poles(demo):
    there = room(demo)
    picture = demo.render(there, there.size * [0.5, 0.4, 0] + [0, 0, 1.5], 256).astype(float)
    steps = np.abs(np.diff(picture, axis=1)).mean((0, 2))
    seam = np.abs(picture[:, 0] - picture[:, -1]).mean()
    assert seam < np.percentile(steps, 95)
    for row in (0, -1):
        assert picture[row].std(0).max() < 12  # all of it is nearly one point


def test_the_script_writes_the_layout_and_the_same_files_again(tmp_path):
    command = [
        *tiny.script("scripts/demo/make_demo_panoramas.py"),
        "--areas=2",
        "--rooms=1",
        "--frames=2",
        "--height=16",
    ]
    for name in ("a", "b"):
        done = tiny.run(*command, str(tmp_path / name), "--depth", cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 8
    assert str(files[0]) == "area0/room0/output/depth_0000.png"
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with Image.open(tmp_path / "a" / files[2]) as image:
        assert (image.size, image.mode) == ((32, 16), "RGB")

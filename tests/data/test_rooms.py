from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vae3d.arguments import ArgumentError
from vae3d.commands.summary import data_summary
from vae3d.commands.training_data import build_training_data
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError
from vae3d.data.sources.rooms import ErpRooms

SETTINGS = ClipSettings(16, 32, sampling="first_last_random", panorama=True)


def room(root: Path, name: str, frames: int, prefix: str = "panorama") -> None:
    """Files that are not opened."""
    output = root / name / "output"
    output.mkdir(parents=True, exist_ok=True)
    for i in range(frames):
        (output / f"{prefix}_{i:04d}.png").touch()
        (output / f"{prefix}_{i:04d}_mask.png").touch()


@pytest.fixture
def root(tmp_path):
    for area in range(12):
        for number in range(2):
            room(tmp_path / "rooms", f"area{area}/room{number}", 5 + number)
    return tmp_path / "rooms"


def test_a_room_is_a_sequence_named_by_area_and_room(root):
    (root / "area3/notes.txt").touch()
    (root / ".cache/room/output").mkdir(parents=True)
    (root / "area3/roomless").mkdir()
    table = ErpRooms(root).table()
    assert len(table) == 24
    row = table.set_index("name").loc["area3/room1"]
    assert row["path"] == f"{root}/area3/room1/output/panorama_*.png"
    assert (row["num_frames"], row["fps"]) == (6, 24.0)  # so that nothing needs probing
    assert table["name"].is_monotonic_increasing
    assert table["row"].tolist() == list(range(1, 25))


def test_areas_are_held_out_as_wholes_and_stay_held_out(root):
    tables = read_tables(ErpRooms(root), SETTINGS, num_val_files=16, max_broken=0)
    areas = {name.split("/")[0] for name in tables.val["name"]}
    assert len(areas) == 1  # a tenth of twelve
    assert len(tables.val) == 2
    assert not areas & {name.split("/")[0] for name in tables.train["name"]}
    moved = root.rename(root.parent / "moved")
    room(moved, "zzz/room", 5)
    assert areas == {n.split("/")[0] for n in read_tables(ErpRooms(moved), SETTINGS, 16, 0).val["name"]}


def test_two_areas_hold_one_out_and_one_area_none(tmp_path):
    room(tmp_path, "a/r1", 5)
    room(tmp_path, "b/r1", 5)
    source = ErpRooms(tmp_path)
    assert sorted(source.table()["split"]) == ["train", "val"]
    (tmp_path / "b").rename(tmp_path / ".b")
    for number in range(2, 5):
        room(tmp_path, f"a/r{number}", 5)
    assert source.table()["split"].isna().all()
    tables = read_tables(source, SETTINGS, num_val_files=16, max_broken=0)
    assert (len(tables.train), len(tables.val)) == (3, 1)
    assert tables.notes[1].startswith("there is only one area;")


def test_named_areas_are_held_out(root):
    source = ErpRooms(root, val_areas=["area4", "area11"])
    table = source.table()
    assert {name.split("/")[0] for name in table["name"][table["split"] == "val"]} == {"area4", "area11"}
    assert source.notes[1] == "areas held out for validation: area4, area11"
    with pytest.raises(DataError, match=r"val_areas: area40, hall is no area of .*; there are area0, area1, area10"):
        ErpRooms(root, val_areas=["hall", "area40", "area4"]).table()


def test_short_rooms_are_left_out_and_counted(root):
    room(root, "area0/tiny", 4)
    room(root, "attic/tiny", 4)
    (root / "area1/unfinished/output").mkdir(parents=True)
    tables = read_tables(ErpRooms(root), SETTINGS, num_val_files=0, max_broken=0)
    assert not tables.train["name"].str.endswith("tiny").any()
    assert tables.notes[0] == f"24 rooms of 12 areas in {root}; skipped: 3 with fewer than 5 frames"
    assert len(ErpRooms(root, min_frames=6).table()) == 12
    assert len(ErpRooms(root, min_frames=4).table()) == 26


def test_empty_roots_are_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no such folder; data\.source\.root takes the folder that holds the areas"):
        ErpRooms(tmp_path / "x").table()
    with pytest.raises(DataError, match=r"AREA/ROOM/output/panorama_\*\.png: no such files"):
        ErpRooms(tmp_path).table()
    room(tmp_path, "a/b", 4)
    with pytest.raises(DataError, match=r"depth_\*\.png: no such files"):
        ErpRooms(tmp_path, "depth_*.png").table()
    with pytest.raises(DataError, match=r"no room has 5 files \(data.source.min_frames\); the largest has 4"):
        ErpRooms(tmp_path).table()
    with pytest.raises(DataError, match=r"data.source.pattern: panorama.png must have one \*"):
        ErpRooms(tmp_path, "panorama.png").table()


# --- a run on rendered rooms


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    sizes = ["--areas=3", "--rooms=1", "--frames=9", "--height=16", "--depth"]
    done = tiny.run(*tiny.script("scripts/demo/make_demo_panoramas.py"), str(folder), *sizes, cwd=folder)
    assert done.returncode == 0, done.stdout
    for number in range(4, 9):  # one room has 4 frames
        (folder / f"area0/room0/output/panorama_{number:04d}.png").unlink()
    return folder


def data_of(rendered, name: str, *overrides: str):
    small = [
        "data.height=8",
        "data.width=16",
        "validation.every=1",
        "validation.frames=5",
        "validation.metrics=[psnr]",
        "stage=finetune",
    ]
    source = [f"data={name}", f"data.source.root={rendered}", "stage.init_from=random", "loss=recon_kl"]
    return build_training_data(tiny.training("temporal_vae", rendered, *small, *source, *overrides), 0, 1)


@pytest.mark.parametrize("wrong", ["val_areas=5", "val_areas=area0", "min_frames=x"])
def test_a_source_of_a_wrong_type_names_the_key(rendered, wrong):
    key, value = wrong.split("=")
    with pytest.raises(ArgumentError, match=rf"data\.source\.{key} is '?{value}"):
        data_of(rendered, "erp_rooms", f"data.source.{wrong}")


def test_the_start_of_a_run_tells_of_rooms_and_areas(rendered):
    config = tiny.training(
        "temporal_vae", rendered, "data=erp_rooms", f"data.source.root={rendered}", "data.width=32", "loss=recon_kl"
    )  # fmt: skip
    lines = data_summary(config, build_training_data(config, 0, 1))
    assert lines[0].startswith("1 training file, ")
    assert lines[1].startswith("  2 rooms of 2 areas in ")
    assert lines[1].endswith("; skipped: 1 with fewer than 5 frames")
    assert lines[2].startswith("  areas held out for validation: area")


def test_clips_fit_the_rooms_and_begin_and_end_with_them(rendered):
    data = data_of(rendered, "erp_rooms", "data.frames.max=81", "data.height=16", "data.width=32")
    (clip,) = data.clips(0, 1)
    assert clip.video.shape == (2, 3, 9, 16, 32)  # 9 = the largest 4n+1 <= 9
    data = data_of(rendered, "erp_rooms", "data.height=16", "data.width=32")
    (clip,) = data.clips(0, 1)
    assert clip.video.shape == (2, 3, 5, 16, 32)
    output = Path(clip.paths[0]).parent
    pictures = [np.asarray(Image.open(output / f"panorama_{i:04d}.png")) for i in range(9)]
    frames = clip.video[0].permute(1, 2, 3, 0).numpy()
    numbers = [[np.array_equal(frame, picture) for picture in pictures].index(True) for frame in frames]
    assert (numbers[0], numbers[-1]) == (0, 8)
    assert numbers == sorted(set(numbers))
    (held_out,) = data.held_out
    assert held_out.paths[0] not in clip.paths


def test_depth_of_the_same_rooms(rendered):
    data = data_of(rendered, "erp_depth")
    (clip,) = data.clips(0, 1)
    assert clip.video.shape == (2, 3, 5, 8, 16)
    assert clip.valid.shape == (2, 1, 5, 8, 16)
    assert clip.depth_bounds.tolist() == [pytest.approx([0.1, 20.0])] * 2
    assert (data.held_out[0].valid.shape, data.held_out[0].depth_bounds.shape) == ((1, 1, 5, 8, 16), (1, 2))


def test_the_same_clips_from_a_table_of_panorama_videos(rendered, tmp_path):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(12, 16, 32))
    (tmp_path / "t.csv").write_text(f"path\na.mp4\n{rendered}/area1/room0/output/panorama_*.png\n")
    config = tiny.training(
        "temporal_vae", tmp_path, "data=erp_videos", f"data.source.path={tmp_path}/t.csv", "data.width=32",
        "stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.max=17",
    )  # fmt: skip
    data = build_training_data(config, 0, 1)
    (clip,) = data.clips(0, 1)
    assert {Path(path).name for path in clip.paths} == {"a.mp4", "panorama_*.png"}
    assert clip.video.shape == (2, 3, 9, 16, 32)

"""Folders and tables of images; files that are too small."""

from __future__ import annotations

import json
import os
import shutil

import pandas as pd
import pytest
from PIL import Image

from tests import tiny
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.commands import train
from vae3d.config.issues import ConfigError
from vae3d.data.batches import selection
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError
from vae3d.data.sources.folder import Folder, files_under
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.sources.table import Table
from vae3d.data.table import probe

SETTINGS = ClipSettings(16, 16)


def save(path, height=20, width=24, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiny.frames(1, height, width, seed)[0]).save(path, **options)
    return path


def test_folders_called_after_splits_are_splits_and_classes_are_not(images):
    source = ImageFolder(images)
    table = source.table()
    assert table["split"].value_counts().to_dict() == {"train": 16, "val": 4}
    assert table["name"][0] == "train/cat/0.JPEG"
    assert set(table["num_frames"]) == {1}
    assert source.notes == [f"{images}: 20 images: train 16, val 4"]
    assert ImageFolder(images / "train").table()["split"].isna().all()  # a class is called train, none val or test


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_other_names_of_validation(tmp_path, name):
    save(tmp_path / "train/a.png")
    save(tmp_path / name / "a.png")
    assert ImageFolder(tmp_path).table()["split"].tolist() in (["train", "val"], ["val", "train"])


def test_test_serves_for_validation_only_if_there_is_nothing_else(tmp_path):
    save(tmp_path / "train/a.png")
    save(tmp_path / "test/a.png")
    source = ImageFolder(tmp_path)
    assert source.table()["split"].tolist() == ["val", "train"]
    assert "there is no folder val; test is used for validation" in source.notes
    save(tmp_path / "val/a.png")
    assert ImageFolder(tmp_path).table()["split"].tolist() == ["test", "train", "val"]


def test_what_is_skipped_is_reported(tmp_path):
    for name in ("train/a.png", "val/b.jpg", "cover.webp"):
        save(tmp_path / name)
    tiny.write_video(tmp_path / "train/clip.mp4", tiny.frames(3))
    (tmp_path / "labels.txt").write_text("x")
    (tmp_path / "LICENSE").write_text("x")
    save(tmp_path / ".cache/hidden.png")
    source = ImageFolder(tmp_path)
    assert source.table()["name"].tolist() == ["train/a.png", "val/b.jpg"]
    assert source.notes == [
        f"{tmp_path}: 2 images: train 1, val 1",
        "skipped, because they are no images: 1 without extension, 1 .txt, 1 .mp4",
        "skipped, because they are in no folder of a split: 1 image",
    ]


def test_without_images_there_is_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(\.png .*\)$"):
        ImageFolder(tmp_path).table()
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(3))
    (tmp_path / "videos.csv").write_text("path\na.mp4\n")
    for path, data in ((tmp_path, "folder"), (tmp_path / "videos.csv", "video_csv")):
        with pytest.raises(DataError, match=rf"holds no images .*, but .*1 \.mp4.*; data={data} takes videos"):
            ImageFolder(path).table()


def test_links_are_followed_and_never_in_circles(tmp_path):
    save(tmp_path / "elsewhere/cat/a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/cat/up").symlink_to(tmp_path / "elsewhere")
    assert files_under(tmp_path / "set") == ["train/cat/a.png"]
    assert len(Folder(tmp_path / "set").table()) == 1
    (tmp_path / "set/back").symlink_to(tmp_path / "other")
    save(tmp_path / "other/b.png")
    (tmp_path / "other/there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/cat/other").symlink_to(tmp_path / "other")  # in a circle of two links
    once = ["back/b.png", "back/there/cat/a.png", "train/cat/a.png", "train/cat/other/b.png"]
    assert files_under(tmp_path / "set") == once


def test_a_table_may_name_them(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.jpg")
    tiny.write_video(tmp_path / "c.mp4", tiny.frames(3))
    rows = {"path": ["a.png", "b.jpg", "c.mp4", "gone.png", None], "split": ["train", "val", "train", "train", "train"]}
    for name in ("t.csv", "t.parquet"):
        table = pd.DataFrame(rows)
        table.to_csv(tmp_path / name, index=False) if name == "t.csv" else table.to_parquet(tmp_path / name)
        source = ImageFolder(tmp_path / name)
        found = source.table()
        assert found["row"].tolist() == [1, 2, 4, 5]
        assert found["error"].tolist() == [None, None, "no such file", "has no `path`"]
        assert source.notes == [
            f"{tmp_path / name}: 2 images: train 1, val 1",
            "skipped, because they are no images: 1 .mp4",
        ]
    tables = read_tables(ImageFolder(tmp_path / "t.csv"), SETTINGS, num_val_files=4, max_broken=0.5)
    assert [len(tables.train), len(tables.val), len(tables.errors)] == [1, 1, 2]
    with pytest.raises(DataError, match=r"2 of 4 files cannot be read(.|\n)*gone\.png\): no such file"):
        read_tables(ImageFolder(tmp_path / "t.csv"), SETTINGS, num_val_files=4, max_broken=0.2)


def test_images_are_listed_without_being_opened(tmp_path, monkeypatch):
    for i in range(20):
        save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"junk")
    monkeypatch.setattr(selection, "PROBED_IMAGES", 5)
    probed = []
    found = {"num_frames": 1.0, "height": 12.0, "width": 24.0, "fps": 0.0}
    monkeypatch.setattr(probe, "read_metadata", lambda path: probed.append(path) or found)
    tables = read_tables(ImageFolder(tmp_path), SETTINGS, num_val_files=2, max_broken=0)
    assert len(probed) == 5
    assert (len(tables.train), len(tables.val), tables.errors) == (19, 2, [])
    assert tables.notes[-1].startswith("5 of 5 files (of 21) are smaller than 16x16 and are enlarged")


# --- too small


def test_files_that_are_enlarged_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    for i, (height, width) in enumerate([(30, 20), (20, 30), (40, 40), (32, 32)]):
        save(tmp_path / f"set/{i}.png", height, width)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    save(tmp_path / "set/4.jpg", 64, 16, exif=exif)
    tell = lambda settings: read_tables(ImageFolder(tmp_path / "set"), settings, 0, 0).notes[1:]  # noqa: E731
    assert tell(ClipSettings(16, 16)) == []
    (message,) = tell(ClipSettings(32, 32))
    assert message == "3 of 5 files are smaller than 32x32 and are enlarged; data.min_side skips such files"
    assert tell(ClipSettings(16, 32))[0].startswith("2 of 5 files are smaller than 16x32")  # 4.jpg is 16x64
    assert tell(ClipSettings(16, 16, short_side=40))[0].startswith("4 of 5 files are smaller than 16x16 or data.sh")
    assert tell(ClipSettings(16, 32, short_side=18))[0].startswith("3 of 5 files are smaller than 16x32 or data.sh")


def test_videos_are_counted_where_their_size_is_known(videos, tmp_path):
    message = read_tables(Folder(videos.parent), ClipSettings(32, 64), 0, 0).notes
    assert message == ["12 of 12 files are smaller than 32x64 and are enlarged; data.min_side skips such files"]
    pd.DataFrame({"path": ["absent.mp4"], "num_frames": [5]}).to_csv(tmp_path / "t.csv", index=False)
    assert read_tables(Table(tmp_path / "t.csv"), ClipSettings(99, 99), 0, 0).notes == []


def test_small_files_are_left_out_as_no_error(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", 16 + 2 * i, 40)
    tables = read_tables(ImageFolder(tmp_path), ClipSettings(16, 16, min_side=22), num_val_files=1, max_broken=0)
    assert sorted([*tables.train["name"], *tables.val["name"]]) == ["3.png", "4.png", "5.png"]
    assert tables.errors == []
    assert tables.skipped_files[0] == (str(tmp_path / "0.png"), "is 16x40: skipped, because data.min_side=22")
    assert tables.notes[-1] == "skipped: 3 files smaller than data.min_side=22"
    with pytest.raises(DataError, match=r"no file has a shorter side of data\.min_side=99 pixels; the largest has 26"):
        read_tables(ImageFolder(tmp_path), ClipSettings(16, 16, min_side=99), num_val_files=1, max_broken=0)


def test_min_side_must_be_positive(images):
    with pytest.raises(ConfigError, match=r"data\.min_side=0: must be .*at least 1, or null"):
        tiny.training("spatial", images, *ALONE, f"data.source.path={images}", "data.min_side=0")


# --- training

ALONE = ["data=image_folder", "stage=finetune", "stage.init_from=random", "loss=recon_kl"]


@pytest.mark.parametrize("model", ["spatial", "temporal_vae", "wan"])
def test_a_folder_alone_trains_and_validates(images, tmp_path, model):
    shutil.copytree(images, tmp_path / "set")
    whole = (images / "train/cat/0.JPEG").read_bytes()
    (tmp_path / "set/train/cat/0.JPEG").write_bytes(whole[: len(whole) // 2])
    config = tiny.training(
        model, tmp_path, *ALONE, f"data.source.path={tmp_path / 'set'}", "validation.every=2", "data.batch_size=8",
        "trainer.max_steps=4", "data.min_side=41", "validation.metrics=[psnr]",
    )  # fmt: skip
    trainer = train.build_trainer(config, tmp_path / "run")
    trainer.fit()
    assert trainer.step == 4
    listed = [json.loads(line) for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    skipped_files = [entry["path"] for entry in listed if "skipped" in entry["reason"]]
    assert sorted(os.path.basename(path) for path in skipped_files) == ["0.JPEG"] * 4
    scores = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["val_clips"] for entry in scores if "val_clips" in entry] == [2, 2, 2]  # at steps 0, 2 and 4


def test_a_cut_off_image_is_a_error_with_its_name(images, tmp_path):
    shutil.copytree(images, tmp_path / "set")
    cut = tmp_path / "set/train/cat/0.JPEG"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    config = tiny.training(
        "spatial", tmp_path, *ALONE, f"data.source.path={tmp_path / 'set'}", "data.batch_size=8", "trainer.max_steps=3"
    )
    train.build_trainer(config, tmp_path / "run").fit()
    (error,) = [json.loads(line) for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    assert error["path"] == str(cut)
    assert error["reason"].startswith("cannot be decoded: image file is truncated")


def test_check_lists_bad_images(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "set")
    (tmp_path / "set/val/cat/0.JPEG").write_bytes(b"")
    assert tiny.status("check-data", tmp_path / "set", "--workers", 1, "--clean", tmp_path / "clean.csv") == 1
    assert "0.JPEG: is empty (0 bytes)" in capsys.readouterr().out
    assert len(ImageFolder(tmp_path / "clean.csv").table()) == 19

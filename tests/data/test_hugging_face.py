"""Datasets of Hugging Face, where the package is installed: saved ones and downloaded repositories, without network."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.commands import train
from vae3d.commands.check_data import main as check
from vae3d.commands.check_data import parse
from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
from vae3d.data.batches.clips import ClipSettings, Stream
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.decoding.readers import open_media
from vae3d.data.loader import TrainingData, read_tables
from vae3d.data.media import DataError
from vae3d.data.sources import dataset_rows, hugging_face
from vae3d.data.sources.hugging_face import HuggingFace
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.storage.paths import name_of
from vae3d.data.table import probe

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # before the package is imported
hf = pytest.importorskip("datasets")

SETTINGS = ClipSettings(16, 16)


def picture(i: int) -> np.ndarray:
    return tiny.frames(1, 20 + i, 32, seed=i)[0]


def encoded(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "PNG")
    return file.getvalue()


def rows(count: int, first: int = 0, **broken: bytes | None):
    """Images of the numbers from `first` on; broken: _3=b"junk" for row 3."""
    images = [{"bytes": encoded(first + i), "path": f"{i}.png"} for i in range(count)]
    for place, content in broken.items():
        images[int(place[1:])] = content and {"bytes": content, "path": None}
    kinds = hf.Features({"image": hf.Image(), "label": hf.Value("int64")})
    return hf.Dataset.from_dict({"image": images, "label": list(range(count))}, features=kinds)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, no cache of the user's, no dataset of another test."""

    def refuse(*args, **kwargs):
        pytest.fail("went online")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget():
    rows = dataset_rows
    for cached in (rows.open_splits, rows.open_stream, hugging_face._shards):
        cached.cache_clear()


@pytest.fixture
def snapshot(tmp_path):
    """A repository as the hub's cache keeps it: links to files of other names."""
    blobs, data = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc/data"
    blobs.mkdir(parents=True)
    data.mkdir(parents=True)
    for name, split in (("train", rows(8)), ("validation", rows(2, 20)), ("test", rows(3, 30))):
        split.to_parquet(blobs / name)
        (data / f"{name}-00000-of-00001.parquet").symlink_to(blobs / name)
    (data.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "validation", "test"))
        + "---\n# See https://example.org\n"
    )
    return data.parent


def test_a_snapshot_of_a_repository_is_read_row_by_row(snapshot):
    source = HuggingFace(snapshot)
    table = source.table()
    assert table["split"].tolist() == ["train"] * 8 + ["val"] * 2 + ["test"] * 3
    assert name_of(table["path"][9]) == "validation/image/1.hfimage"
    assert source.notes == [
        f"images in the column image of {snapshot}: 8 of train (train), 2 of validation (val), 3 of test (test)"
    ]
    for row, number in ((0, 0), (7, 7), (9, 21), (12, 32)):
        opened = open_media(table["path"][row])
        assert (opened.info.num_frames, opened.info.height, opened.info.width) == (1, 20 + number, 32)
        np.testing.assert_array_equal(opened.read([0])[0], picture(number))


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_a_saved_dataset_is_read(tmp_path, kind):
    saved = rows(6) if kind == "Dataset" else hf.DatasetDict({"train": rows(6), "test": rows(2, 9)})
    saved.save_to_disk(tmp_path / "saved")
    table = HuggingFace(tmp_path / "saved").table()
    assert table["split"].tolist() == ([None] * 6 if kind == "Dataset" else ["train"] * 6 + ["val"] * 2)
    np.testing.assert_array_equal(open_media(table["path"][5]).read([0])[0], picture(5))
    assert table["label"].tolist() == ([*range(6)] if kind == "Dataset" else [*range(6), 0, 1])
    again = ImageFolder(tmp_path / "saved").table()  # which takes datasets too
    assert again["path"].tolist() == table["path"].tolist()


def test_rows_that_were_filtered_keep_their_order(tmp_path):
    rows(6).filter(lambda row: row["label"] % 2 == 1).shuffle(seed=0).save_to_disk(tmp_path / "saved")
    heights = [open_media(path).info.height for path in HuggingFace(tmp_path / "saved").table()["path"]]
    assert sorted(heights) == [21, 23, 25]
    assert heights == [row["image"].height for row in hf.load_from_disk(tmp_path / "saved")]


def test_labels_that_are_kept_secret_are_none(tmp_path):
    rows(3).map(lambda row: {"label": -1 if row["label"] == 1 else row["label"]}).save_to_disk(tmp_path / "saved")
    assert HuggingFace(tmp_path / "saved").table()["label"].isna().tolist() == [False, True, False]


def test_image_files_stay_files(tmp_path):
    for i in range(3):
        (tmp_path / "set/train/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/train/cat/{i}.png").write_bytes(encoded(i))
    assert HuggingFace(tmp_path / "set").table()["path"].tolist() == [
        str(tmp_path / f"set/train/cat/{i}.png") for i in range(3)
    ]


def test_a_parquet_file_that_was_not_written_by_the_library(tmp_path):
    (tmp_path / "set").mkdir()
    pd.DataFrame({"image": [{"bytes": encoded(i), "path": None} for i in range(3)]}).to_parquet(
        tmp_path / "set/train.parquet"
    )
    table = HuggingFace(tmp_path / "set").table()
    np.testing.assert_array_equal(open_media(table["path"][2]).read([0])[0], picture(2))


def test_splits_and_columns_are_chosen(tmp_path):
    both = rows(3).add_column("other", [None] * 3).cast_column("other", hf.Image())
    hf.DatasetDict({"train": both, "holdout": both}).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError, match=r"holds images in image, other of its columns \(image, label, other\); set"):
        HuggingFace(tmp_path / "a").table()
    with pytest.raises(DataError, match=r"data\.source\.column=label: .* holds images in image, other of"):
        HuggingFace(tmp_path / "a", column="label").table()
    table = HuggingFace(tmp_path / "a", column="image", val_split="holdout").table()
    assert table["split"].tolist() == ["train"] * 3 + ["val"] * 3
    with pytest.raises(DataError, match=r"data\.source\.split=training: .* has only the splits train, holdout"):
        HuggingFace(tmp_path / "a", split="training", column="image").table()
    with pytest.raises(DataError, match=r"data\.source\.val_split=x: "):
        HuggingFace(tmp_path / "a", val_split="x", column="image").table()
    hf.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match=r"holds images or videos in none of its columns \(text\)$"):
        HuggingFace(tmp_path / "b").table()


def test_what_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot be opened as a dataset: .* doesn't contain any data files"):
        HuggingFace(tmp_path / "empty").table()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.parquet").write_bytes(b"junk" * 99)
    with pytest.raises(DataError, match="cannot be opened as a dataset: Parquet"):
        HuggingFace(tmp_path / "bad").table()


def test_broken_rows_are_reported_by_row(tmp_path, capsys):
    rows(8, _3=b"junk", _5=None, _6=encoded(6)[:200]).save_to_disk(tmp_path / "saved")
    assert check(parse([str(tmp_path / "saved"), "--workers", "1", "--clean", str(tmp_path / "clean.csv")])) == 1
    out = capsys.readouterr().out
    paths = HuggingFace(tmp_path / "saved").table()["path"]
    assert f"row 4: {paths[3]}: is not an image" in out
    assert f"row 6: {paths[5]}: has no image" in out
    assert f"row 7: {paths[6]}: cannot be decoded" in out
    assert "5 of 8 rows are good, 3 bad" in out
    tables = read_tables(ImageFolder(tmp_path / "clean.csv"), SETTINGS, num_val_files=0, max_broken=0)
    assert len(tables.train) == 5
    tables = read_tables(HuggingFace(tmp_path / "saved"), SETTINGS, num_val_files=0, max_broken=0.5)
    assert tables.errors == [(f"row 6 ({paths[5]})", "has no image")]


def test_sizes_are_looked_up_once_and_again_when_the_dataset_changes(tmp_path, monkeypatch):
    small = ClipSettings(16, 16, min_side=23)
    probed = []
    original = probe.read_metadata
    monkeypatch.setattr(probe, "read_metadata", lambda path: probed.append(path) or original(path))
    rows(6).save_to_disk(tmp_path / "saved")
    for _ in range(2):
        tables = read_tables(HuggingFace(tmp_path / "saved"), small, num_val_files=0, max_broken=0)
        path, reason = tables.skipped_files[0]
        assert (name_of(path), reason) == ("train/image/0.hfimage", "is 20x32: skipped, because data.min_side=23")
        assert (len(tables.train), len(tables.skipped_files), len(probed)) == (3, 3, 6)
    notes = read_tables(HuggingFace(tmp_path / "saved"), ClipSettings(40, 16), num_val_files=0, max_broken=0).notes
    assert notes[-1].startswith("6 of 6 files are smaller than 40x16")  # from their headers: their names have no suffix
    shutil.rmtree(tmp_path / "saved")
    forget()
    rows(6, 10).save_to_disk(tmp_path / "saved")
    assert len(read_tables(HuggingFace(tmp_path / "saved"), small, num_val_files=0, max_broken=0).train) == 6


def test_workers_read_the_same_as_one_process_with_the_dataset_opened_before_or_not(snapshot):
    tables = read_tables(HuggingFace(snapshot), SETTINGS, num_val_files=0, max_broken=0)
    schedule = BatchSchedule(clip_lengths(tables.train, SETTINGS), FrameCounts(1, 1), seed=3, batch_size=4)
    clips = {}
    for workers in (0, 2):
        data = TrainingData([Stream(tables.train, schedule, SETTINGS)], schedule, workers, 2, [], [])
        clips[workers] = list(data.clips(0, 4))
    forget()  # what a worker that is not a fork finds
    clips["again"] = list(TrainingData([Stream(tables.train, schedule, SETTINGS)], schedule, 2, 2, [], []).clips(0, 4))
    for one, two, again in zip(*clips.values(), strict=True):
        assert one.paths == two.paths == again.paths
        assert torch.equal(one.video, two.video)
        assert torch.equal(one.video, again.video)


def test_a_run_trains_and_validates_on_it(tmp_path):
    hf.DatasetDict({"train": rows(8, _3=b"junk"), "validation": rows(2, 20)}).save_to_disk(tmp_path / "saved")
    config = tiny.training(
        "spatial", tmp_path, "data=hf_images", f"data.source.path={tmp_path / 'saved'}", "stage=finetune", "loss=recon_kl",
        "stage.init_from=random", "validation.every=2", "data.batch_size=8", "validation.metrics=[psnr]",
    )  # fmt: skip
    trainer = train.build_trainer(config, tmp_path / "run")
    trainer.fit()
    errors = [json.loads(line) for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    assert [(name_of(error["path"]), error["reason"]) for error in errors] == [
        ("train/image/3.hfimage", "is not an image, whatever its extension says")
    ]
    scores = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert scores[-1]["val_clips"] == 2


@pytest.mark.parametrize("column", ["image", "text"])
@pytest.mark.parametrize("offsets", [(0, -5, 3), (0, 2**31 - 1, 2**31 - 1), (7, 3, 1)])
def test_offsets_outside_of_a_file_are_an_error(column, offsets, tmp_path):
    """Of a file that a stranger may have written; they would end the process, or give bytes of another place."""
    contents = [encoded(0), encoded(1)]
    texts = ["a" * 1001, "b" * 1003]
    kinds = hf.Features({"image": hf.Image(), "text": hf.Value("string")})
    images = [{"bytes": content, "path": None} for content in contents]
    hf.Dataset.from_dict({"image": images, "text": texts}, features=kinds).save_to_disk(tmp_path / "set")
    sizes = [len(value) for value in (contents if column == "image" else texts)]
    (file,) = (tmp_path / "set").glob("*.arrow")
    sound, wrong = (np.array(values, "<i4").tobytes() for values in ([0, sizes[0], sum(sizes)], offsets))
    assert file.read_bytes().count(sound) == 1
    file.write_bytes(file.read_bytes().replace(sound, wrong))
    with pytest.raises(DataError, match="offset"):
        HuggingFace(tmp_path / "set").table()


def test_rows_that_point_to_the_network_are_errors_of_a_local_stream(tmp_path, monkeypatch):
    monkeypatch.delenv("VAE3D_ONLINE", raising=False)
    paths = ["https://example.org/a.png", "zip://a.png::https://example.org/a.zip", "simplecache::s3://data/a.png"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    pq.write_table(pa.table({"image": images}), tmp_path / "train.parquet")
    items = list(HuggingFace(tmp_path, streaming=True).stream("train").read(0))
    assert [item.content for item in items] == [None] * 3
    assert all("VAE3D_ONLINE=1" in item.error for item in items)

"""Videos in datasets of Hugging Face: tables of rows, and streams. Without network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.data.test_hugging_face import alone, encoded, forget, picture  # noqa: F401
from tests.data.test_hugging_face import rows as images
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.commands import train
from vae3d.commands.training_data import build_training_data
from vae3d.config.issues import ConfigError
from vae3d.data.batches import streaming
from vae3d.data.batches.batch_schedule import FrameCounts
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.stream_order import Position, ShuffledItems
from vae3d.data.batches.streaming import StreamingData, StreamingSchedule, opened, stream_notes
from vae3d.data.decoding.readers import is_image, media_info, open_media
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.hugging_face import HuggingFace
from vae3d.data.sources.open_source import open_source
from vae3d.data.storage.paths import name_of, split_member
from vae3d.latents.scale import longest_clips

hf = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("alone", "fresh_accelerate")
SETTINGS = ClipSettings(16, 16, crop="random", flip=True)
COUNT = 7


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Small videos of 4, 5, ... frames."""
    folder = tmp_path_factory.mktemp("clips")
    return [tiny.write_video(folder / f"{i}.mp4", tiny.frames(4 + i, 16, 24, seed=i)) for i in range(COUNT)]


def rows(clips, *, embedded: bool = True, **columns):
    values = [{"bytes": clip.read_bytes() if embedded else None, "path": str(clip)} for clip in clips]
    kinds = hf.Features({"video": hf.Video(), **{name: kind for name, (kind, _) in columns.items()}})
    names = {name: values for name, (_, values) in columns.items()}
    if embedded:  # or the library would store the path of a file that is there
        values = [{**value, "path": f"{i}.mp4"} for i, value in enumerate(values)]
    return hf.Dataset.from_dict({"video": values, **names}, features=kinds)


@pytest.fixture
def saved(clips, tmp_path):
    hf.DatasetDict({"train": rows(clips), "validation": rows(clips[-2:])}).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def repository(clips, tmp_path):
    """Three parquet files for training, of 3, 2 and 2 rows, and one for validation."""
    data = tmp_path / "repository/data"
    data.mkdir(parents=True)
    for number, part in enumerate((clips[:3], clips[3:5], clips[5:])):
        rows(part).to_parquet(data / f"train-{number:05}-of-00003.parquet")
    rows(clips[-2:]).to_parquet(data / "validation-00000-of-00001.parquet")
    return data.parent


def pixels(path) -> np.ndarray:
    reader = open_media(path)
    frames = reader.read(range(reader.info.num_frames))
    reader.close()
    return frames


# --- tables


@pytest.mark.parametrize("kind", ["saved", "repository"])
def test_videos_are_read_as_from_their_files(kind, clips, request):
    folder = request.getfixturevalue(kind)
    source = open_source(folder)
    table = source.table()
    assert name_of(table["path"][COUNT]) == "validation/video/0.hfvideo"
    assert table["split"].tolist() == ["train"] * COUNT + ["val"] * 2
    assert table["num_frames"].isna().all()
    assert source.notes == [f"videos in the column video of {folder}: {COUNT} of train (train), 2 of validation (val)"]
    for path, clip in zip(table["path"], [*clips, *clips[-2:]], strict=True):
        np.testing.assert_array_equal(pixels(path), pixels(clip))
        assert media_info(path) == media_info(clip)
        assert not is_image(path)
    train = read_tables(source, SETTINGS, num_val_files=0, max_broken=0).train
    assert train["num_frames"].tolist() == [4 + i for i in range(COUNT)]


def test_a_row_is_a_range_of_the_arrow_file_that_is_read_without_the_package(saved, clips, monkeypatch):
    path = HuggingFace(saved).table()["path"][3]
    file, offset, size, name = split_member(path)
    assert (file, name) == (f"{saved}/train/data-00000-of-00001.arrow", "train/video/3.hfvideo")
    with open(file, "rb") as stream:
        stream.seek(offset)
        assert stream.read(size) == clips[3].read_bytes()
    monkeypatch.setitem(sys.modules, "datasets", None)
    forget()
    np.testing.assert_array_equal(pixels(path), pixels(clips[3]))


def test_several_record_batches_and_files(clips, tmp_path):
    rows(clips).save_to_disk(tmp_path / "set", num_shards=2)
    forget()
    table = HuggingFace(tmp_path / "set").table()
    files = {Path(split_member(path)[0]).name for path in table["path"]}
    assert files == {"data-00000-of-00002.arrow", "data-00001-of-00002.arrow"}
    np.testing.assert_array_equal(pixels(table["path"][COUNT - 1]), pixels(clips[-1]))


def test_external_files_are_files_and_empty_rows_errors(clips, tmp_path):
    folder = tmp_path / "set"  # not written by the library, which embeds files
    folder.mkdir()
    nothing = {"bytes": None, "path": None}
    embedded = {"bytes": clips[2].read_bytes(), "path": None}
    values = [{**nothing, "path": str(clips[0])}, nothing, embedded, {**nothing, "path": "missing.mp4"}]
    pd.DataFrame({"video": values}).to_parquet(folder / "train.parquet")
    table = HuggingFace(folder).table()
    assert table["path"].tolist() == [
        str(clips[0]), *table["path"][1:3], f"{folder}/missing.mp4"
    ]  # fmt: skip
    assert table["error"].tolist() == [None, "has no video", None, None]
    np.testing.assert_array_equal(pixels(table["path"][2]), pixels(clips[2]))
    with pytest.raises(MediaError, match=r"1\.hfvideo: is empty"):
        open_media(table["path"][1])


def test_a_damaged_row_is_named(clips, tmp_path):
    values = [{"bytes": content, "path": None} for content in (b"junk" * 99, clips[0].read_bytes()[:900])]
    hf.Dataset.from_dict({"video": values}, features=hf.Features({"video": hf.Video()})).save_to_disk(tmp_path / "set")
    for path in HuggingFace(tmp_path / "set").table()["path"]:
        with pytest.raises(MediaError) as raised:
            open_media(path)
        assert raised.value.path == path


def test_captions_and_labels(clips, tmp_path):
    names = {"caption": (hf.Value("string"), list("abcdefg")), "label": (hf.ClassLabel(names=["x", "y"]), [1] * COUNT)}
    rows(clips, title=(hf.Value("string"), list("tuvwxyz")), **names).save_to_disk(tmp_path / "set")
    table = HuggingFace(tmp_path / "set").table()
    assert (table["text"].tolist(), table["label"].tolist()) == (list("abcdefg"), [1] * COUNT)
    assert HuggingFace(tmp_path / "set", text_column="title").table()["text"][0] == "t"
    with pytest.raises(DataError, match=r"data\.source\.text_column=label: .* holds text in title, caption of"):
        HuggingFace(tmp_path / "set", text_column="label").table()


def test_a_column_is_chosen_among_images_and_videos(clips, tmp_path):
    images = [{"bytes": encoded(0), "path": None}] * COUNT
    rows(clips, image=(hf.Image(), images)).save_to_disk(tmp_path / "set")
    with pytest.raises(
        DataError, match=r"holds images in image and videos in video of its columns .*data\.source\.col"
    ):
        HuggingFace(tmp_path / "set").table()
    assert HuggingFace(tmp_path / "set", column="video").table()["path"][0].endswith("/train/video/0.hfvideo")
    assert HuggingFace(tmp_path / "set", column="image").table()["path"][0].endswith("/train/image/0.hfimage")
    kinds = hf.Features({"frames": hf.List(hf.Image())})
    hf.Dataset.from_dict({"frames": [images[:2]]}, features=kinds).save_to_disk(tmp_path / "lists")
    with pytest.raises(DataError, match=r"in none of its columns \(frames\); frames has several in each row"):
        HuggingFace(tmp_path / "lists").table()


def test_a_parquet_file_that_was_not_written_by_the_library(clips, tmp_path):
    (tmp_path / "set").mkdir()
    stored = [{"bytes": clip.read_bytes(), "path": None} for clip in clips[:2]]
    pd.DataFrame({"clip": stored}).to_parquet(tmp_path / "set/train.parquet")
    table = HuggingFace(tmp_path / "set").table()
    assert table["path"][1].endswith("/train/clip/1.hfvideo")
    np.testing.assert_array_equal(pixels(table["path"][1]), pixels(clips[1]))


# --- streams


def items(source: HuggingFace, shuffle: int = 2, reader: int = 0, readers: int = 1) -> ShuffledItems:
    return ShuffledItems(source.stream("train"), 3, reader, readers, shuffle, Position())


@pytest.mark.parametrize("kind", ["saved", "repository"])
def test_a_stream_gives_the_frames_of_the_files(kind, clips, request):
    stream = HuggingFace(request.getfixturevalue(kind), streaming=True).stream("train")
    assert stream.shards == (3 if kind == "repository" else COUNT)
    found = {item.content: item for shard in range(stream.shards) for item in stream.read(shard)}
    assert len(found) == COUNT
    for clip in clips:
        item = found[clip.read_bytes()]
        assert item.path.endswith(".hfvideo")
        with opened(item, SETTINGS) as reader:
            np.testing.assert_array_equal(reader.read(range(reader.info.num_frames)), pixels(clip))
    if kind == "repository":
        assert [item.path for item in stream.read(0, 1)] == [item.path for item in stream.read(0)][1:]


def test_streamed_files_are_files(clips, tmp_path):
    folder = tmp_path / "set/train"
    folder.mkdir(parents=True)
    for clip in clips[:2]:
        (folder / clip.name).write_bytes(clip.read_bytes())
    stream = HuggingFace(tmp_path / "set", streaming=True).stream("train")
    found = [item for shard in range(stream.shards) for item in stream.read(shard)]
    assert [(item.path, item.content) for item in found] == [(str(folder / clip.name), None) for clip in clips[:2]]


def test_images_are_streamed_too(tmp_path):
    images(5).to_parquet(tmp_path / "train.parquet")
    data = data_of(HuggingFace(tmp_path, streaming=True), 0)
    data.schedule = StreamingSchedule(FrameCounts(1, 1), 3, 6)  # three blocks of two: all five images
    data.settings = ClipSettings(24, 32)
    (batch,) = data.clips(0, 1)
    row = next(number for number, path in enumerate(batch.paths) if path.endswith("/train/image/0-4.hfimage"))
    np.testing.assert_array_equal(batch.video[row, :, 0].permute(1, 2, 0), picture(4))  # of 24 x 32


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_readers_share_each_pass(repository, readers):
    """With three shards: whole ones for up to three readers, every so many-th row for more."""
    source, seen = HuggingFace(repository, streaming=True), []
    rows = {}
    for reader in range(readers):
        order = items(source, shuffle=1, reader=reader, readers=readers)._in_order((0, 0, 0, 0))
        for position, item in order:
            if position.epoch:
                break
            seen.append(item.path)
            rows.setdefault(reader, []).append(item.path)
    assert len(seen) == len(set(seen)) == COUNT
    assert len(rows) == readers


def test_blocks_are_shuffled_and_the_order_goes_on_from_every_position(repository):
    source = HuggingFace(repository, streaming=True)
    reader = items(source, shuffle=3)
    paths, positions = [], []
    for _ in range(3 * COUNT):
        positions.append(reader.position)
        paths.append(next(reader).path)
    assert {path: paths.count(path) for path in paths} == dict.fromkeys(set(paths), 3)  # three passes, seven blocks
    assert len(set(paths)) == COUNT
    assert paths[:COUNT] != paths[COUNT : 2 * COUNT]
    for number, position in enumerate(positions):
        again = ShuffledItems(source.stream("train"), 3, 0, 1, 3, position)
        assert [next(again).path for _ in range(4)][: len(paths) - number] == paths[number : number + 4]


def data_of(source: HuggingFace, workers: int, positions=None, **schedule) -> StreamingData:
    stream = source.stream("train")
    frames = FrameCounts(1, 4)
    data = StreamingData(
        stream, StreamingSchedule(frames, 3, 4, accumulate=2, **schedule), SETTINGS, 2, workers, 2, [], []
    )
    data.positions = positions or data.positions
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_the_same_clips(repository, workers):
    source = HuggingFace(repository, streaming=True)
    data = data_of(source, workers)
    batches = data.clips(0, 5)
    whole, positions = [], {}
    for step in range(5):
        whole.append([next(batches) for _ in range(2)])
        positions[step] = data.positions_at(step)  # with a step read ahead, as the trainer does
    for step in (1, 2, 4):
        again = data_of(source, workers, positions[step])
        for one, two in zip([b for s in whole[step:] for b in s], again.clips(step, 5), strict=True):
            assert one.paths == two.paths
            assert one.positions.tolist() == two.positions.tolist()
            assert torch.equal(one.video, two.video)
    frames = {step: batch[0].video.shape[2] for step, batch in enumerate(whole)}
    assert all(batch[1].video.shape[2] == frames[step] for step, batch in enumerate(whole))
    assert len(set(frames.values())) > 1


def test_short_and_damaged_rows_of_a_stream(clips, tmp_path, monkeypatch):
    stored = [clip.read_bytes() for clip in clips[:3]] + [b"junk" * 99]
    values = [*({"bytes": content, "path": None} for content in stored), None]
    hf.Dataset.from_dict({"video": values}, features=hf.Features({"video": hf.Video()})).save_to_disk(tmp_path / "set")
    data = data_of(HuggingFace(tmp_path / "set", streaming=True), 0)
    data.schedule = StreamingSchedule(FrameCounts(5, 5), 3, 4)
    batches = list(data.clips(0, 3))
    names = [path.rpartition("/")[2] for batch in batches for path in batch.paths]
    assert set(names) == {"1-0.hfvideo", "2-0.hfvideo"}  # the first is too short
    errors = {path.rpartition("/")[2]: reason for batch in batches for path, reason in batch.errors}
    assert errors["4-0.hfvideo"] == "has no video"
    assert errors.keys() == {"3-0.hfvideo", "4-0.hfvideo"}
    monkeypatch.setattr(streaming, "MAX_UNUSABLE", 20)
    monkeypatch.setattr(streaming, "ATTEMPTS", 20)
    data.schedule = StreamingSchedule(FrameCounts(9, 9), 3, 4)
    with pytest.raises(DataError, match=r"20 in a row have fewer frames than their step needs \(now 9\)"):
        next(data.clips(0, 1))


CONFIG = [
    "data=hf_videos",
    "data.source.streaming=true",
    "data.frames={min:1,max:4}",
    "data.source.shuffle=2",
    "data.batch_size=2",
]


def config_of(folder, *overrides):
    return tiny.training(
        "spatial", folder, f"data.source.path={folder}", "stage=finetune", "loss=recon_kl", "stage.init_from=random",
        "validation.frames=4", "validation.metrics=[psnr]", *CONFIG, *overrides,
    )  # fmt: skip


def losses(folder) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_on_a_stream_validates_and_resumes_bit_for_bit(repository, tmp_path):
    whole = train.build_trainer(config_of(repository, "trainer.max_steps=4", "validation.every=2"), tmp_path / "whole")
    whole.fit()
    assert len(whole.data.held_out) == 2
    assert not (tmp_path / "whole/held_out.csv").exists()  # its rows are in the repository's split
    for steps in (2, 4):
        part = train.build_trainer(
            config_of(repository, f"trainer.max_steps={steps}", "validation.every=2"), tmp_path / "part"
        )
        part.fit()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    for one, two in zip(part.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(one, two)


def test_another_layout_begins_a_new_pass_and_says_so(repository, tmp_path, capsys):
    train.build_trainer(config_of(repository), tmp_path / "run").fit()
    capsys.readouterr()
    trainer = train.build_trainer(
        config_of(repository, "data.source.shuffle=3", "trainer.max_steps=3"), tmp_path / "run"
    )
    assert trainer.data.positions[0].epoch == 1
    assert "data.source.shuffle 2, now 3" in " ".join(trainer.data_changes.lines)
    trainer.fit()


def test_the_longest_clips_of_a_stream_are_its_first_ones(repository):
    """By which a scale is measured, a shortcut fitted and a model pruned."""
    data, errors = data_of(HuggingFace(repository, streaming=True), 0), []
    data.schedule = StreamingSchedule(FrameCounts(1, 6), 3, 4)
    found = list(longest_clips(data, 3, errors))
    assert [clip.video.shape for clip in found] == [(1, 3, 6, 16, 16)] * 3
    assert [clip.paths[0].rpartition("/")[2] for clip in found] == ["0-2.hfvideo", "1-0.hfvideo", "1-1.hfvideo"]
    assert errors == []
    data.schedule = StreamingSchedule(FrameCounts(1, 99), 3, 4)
    with pytest.raises(DataError, match="none of the first 7 has 99 frames"):
        list(longest_clips(data, 3, errors))


def test_what_a_stream_cannot_do_is_an_error(clips, repository, tmp_path):
    with pytest.raises(DataError, match=r"data\.source\.streaming=true is for training an autoencoder"):
        HuggingFace(repository, streaming=True).table()
    with pytest.raises(DataError, match=r"data\.source\.shuffle=0"):
        HuggingFace(repository, streaming=True, shuffle=0)
    with pytest.raises(DataError, match=r"data\.frames\.fit"):
        StreamingSchedule(FrameCounts(1, 4, fit=True), 3, 4)
    with pytest.raises(DataError, match=r"data\.overfit"):
        build_training_data(config_of(repository, "data.overfit=true"), 0, 1)
    (tmp_path / "alone").mkdir()
    rows(clips).to_parquet(tmp_path / "alone/train.parquet")
    with pytest.raises(DataError, match=r"data\.source\.val_split.*validation\.every=0"):
        build_training_data(config_of(tmp_path / "alone", "validation.every=2"), 0, 1)
    stream = HuggingFace(tmp_path / "alone", streaming=True).stream("train")
    assert any("9 readers" in note and "uses one row of 9" in note for note in stream_notes(stream, 2, 9))
    with pytest.raises(DataError, match="reader 9 of 9 found no rows"):
        ShuffledItems(stream, 0, 8, 9, 1, Position())


def test_the_hub_is_streamed_only_if_the_environment_allows_it(clips, tmp_path, monkeypatch):
    monkeypatch.delenv("VAE3D_ONLINE", raising=False)
    source = HuggingFace("owner/videos", streaming=True)
    with pytest.raises(DataError, match=r"owner/videos: no such folder; VAE3D_ONLINE=1 .*hf download owner/videos"):
        source.stream("train")
    with pytest.raises(ConfigError, match=r"data\.source\.path=owner/videos.*VAE3D_ONLINE=1"):
        config_of("owner/videos")
    monkeypatch.setenv("VAE3D_ONLINE", "1")
    assert config_of("owner/videos").data.source["path"] == "owner/videos"
    opened = []
    rows_of_hub = {"train": rows(clips).to_iterable_dataset(num_shards=2)}
    monkeypatch.setattr(hf, "load_dataset", lambda path, **options: opened.append((path, options)) or rows_of_hub)
    assert len({item.content for shard in range(2) for item in source.stream("train").read(shard)}) == COUNT
    assert opened == [("owner/videos", {"streaming": True})]

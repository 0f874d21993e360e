"""Clips of a JSON list: which entries are taken, which frames they stand for, and on which side they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState, PartialState

from tests import tiny
from vae3d.commands import infer as infer_command
from vae3d.commands import train
from vae3d.commands.check_data import main as check
from vae3d.commands.check_data import parse
from vae3d.config.validate import check_inference
from vae3d.data.batches.batch_schedule import BatchSchedule, ClipIndex, FrameCounts
from vae3d.data.batches.clips import ClipDataset, ClipSettings, open_frames
from vae3d.data.batches.held_out import validation_clips
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.decoding.readers import open_media
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.json_clips import JsonClips
from vae3d.data.sources.table import Table
from vae3d.data.table.probe import fill_metadata
from vae3d.data.table.segments import SEGMENT_ERROR, count_frames, frame_range

SETTINGS = ClipSettings(32, 40)  # as the files are
NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos of 24 frames, a second each, whose frames tell their numbers."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        tiny.write_video(folder / f"{i}.mp4", tiny.frames(24, seed=i), crf="0", g="6", bf="2")
    return folder


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def tables(source, **changes):
    return read_tables(source, SETTINGS, **{"num_val_files": 0, "max_broken": 0.99, **changes})


def numbers(frames: np.ndarray) -> list[int]:
    """What tiny.frames wrote into the corners of [T, H, W, 3]."""
    return np.rint(frames[:, 1:7, 1:7].mean((1, 2, 3)) / 5).astype(int).tolist()


# ---- formats


def test_a_list_and_an_object_with_a_list_are_the_same(folder, tmp_path):
    entries = [{"path": "0.mp4", "start": 0.25, "fps": 24, "frames": 24, "text": "a cat"}, {"path": "sub/../1.mp4"}]
    plain = JsonClips(write(tmp_path / "plain.json", entries), root=folder, val_share=None)
    nested = JsonClips(write(tmp_path / "nested.json", {"total": 2, "list": entries}), root=folder, val_share=None)
    pd.testing.assert_frame_equal(plain.table(), nested.table())
    table = plain.table()
    assert table["path"].tolist() == [str(folder / "0.mp4"), str(folder / "1.mp4")]
    assert table.loc[0, ["start", "fps", "num_frames", "text", "row"]].tolist() == [0.25, 24.0, 24.0, "a cat", 1]
    assert table.loc[1, ["start", "end", "num_frames", "fps"]].isna().all()
    assert table["error"].isna().all()
    assert nested.notes == [f"{tmp_path}/nested.json lists 2 clips of 2 videos"]


def test_paths_are_relative_to_the_file_by_default_and_may_be_absolute(folder):
    source = JsonClips(write(folder / "here.json", [{"path": "0.mp4"}, {"path": str(folder / "1.mp4")}]))
    assert tables(source).errors == []


def test_what_is_odd_but_harmless_is_noted(folder):
    entries = [{"path": "0.mp4", "duration": 1.0}, {"path": "1.mp4", "duration": 1.0, "end": None, "id": 7}]
    source = JsonClips(write(folder / "odd.json", {"total": 3, "list": entries}))
    notes = tables(source).notes
    assert notes[0] == f"`total` of {folder}/odd.json is 3, but its list has 2 clips"
    assert notes[1] == "ignored keys of clips: duration (2), id (1)"
    assert notes[2] == f"{folder}/odd.json lists 2 clips of 2 videos"
    assert notes[3] == "train 1 clip of 1 video, val 1 clip of 1 video, by the hash of the path, val_share=0.02"


BROKEN = {
    '[{"path": "a.mp4"},\n {"path" "b.mp4"}]': r"c\.json, line 2, column 10: is not JSON: Expecting ':' delimiter",
    "[]": r"c\.json lists no clips",
    '{"clips": []}': r'must be a list of clips, or an object \{"list": \[...\]\}; it is an object with the keys clips',
    "3": "it is 3",
    '["a.mp4"]': r"no clip has the key `path`; they must be \{'path': ...\}, not 'a.mp4'",
    '[{"full_path": "a.mp4", "frames": 9}]': "no clip has the key `path`; their keys are full_path, frames; "
    "call their `full_path` `path`",
}


@pytest.mark.parametrize("content", BROKEN)
def test_what_is_no_list_of_clips_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DataError, match=BROKEN[content]):
        JsonClips(tmp_path / "c.json").table()


def test_a_missing_file_and_a_share_that_is_none_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no\.json: no such file; data.source.path takes a JSON file"):
        JsonClips(tmp_path / "no.json").table()
    for share in (0, 1.5):
        with pytest.raises(DataError, match=f"val_share is {share:g}; use a share above 0 and below 1, or null"):
            JsonClips(tmp_path / "no.json", val_share=share)


FAULTS = [
    ("a.mp4", 'is "a.mp4", no object with the key `path`'),
    ({"text": "x"}, "has no `path`"),
    ({"full_path": "0.mp4"}, "has no `path`; call its `full_path` so"),
    ({"path": 3}, "`path` is 3, which is not a text"),
    ({"path": "  "}, "has no `path`"),
    ({"path": "gone.mp4"}, "no such file"),
    ({"path": "gone.mp4", "frames": 24, "fps": 24}, "no such file"),  # though nothing else needs the file
    ({"path": "0.mp4", "frames": "24"}, '`frames` is "24", which is not a number'),
    ({"path": "0.mp4", "frames": 0}, "`num_frames` is no positive whole number"),
    ({"path": "0.mp4", "fps": True}, "`fps` is true, which is not a number"),
    ({"path": "0.mp4", "start": "0"}, SEGMENT_ERROR),
    ({"path": "0.mp4", "start": NAN}, SEGMENT_ERROR),
    ({"path": "0.mp4", "end": float("inf")}, SEGMENT_ERROR),
    ({"path": "0.mp4", "start": -0.5}, SEGMENT_ERROR),
    ({"path": "0.mp4", "start": 0.5, "end": 0.5}, SEGMENT_ERROR),
    ({"path": "0.mp4", "end": 0}, SEGMENT_ERROR),
    ({"path": "0.mp4", "end": 1.5}, "is 1 s long; end=1.5 is beyond its end"),
    ({"path": "0.mp4", "start": 1.0}, "is 1 s long; start=1 is beyond its end"),
    ({"path": "0.mp4", "start": 0.51, "end": 0.52}, "has no frame between start=0.51 and end=0.52, at 24 frames per"),
]


def test_invalid_clips_are_counted_and_reported_by_row(folder, capsys):
    path = write(folder / "faulty.json", [{"path": "1.mp4"}, *(entry for entry, _ in FAULTS), {"path": "2.mp4"}])
    found = tables(JsonClips(path, val_share=None))
    assert found.train["name"].tolist() == ["1.mp4", "2.mp4"]
    reasons = {what.split(" (")[0]: reason for what, reason in found.errors}
    assert len(found.errors) == len(FAULTS)
    for row, (_, expected) in enumerate(FAULTS, start=2):
        assert reasons[f"row {row}"].startswith(expected)
    with pytest.raises(DataError, match=f"{len(FAULTS)} of {len(FAULTS) + 2} files cannot be read"):
        tables(JsonClips(path), max_broken=0.5)

    assert check(parse([str(path), "--workers", "1"])) == 1
    out = capsys.readouterr().out
    for row, (_, expected) in enumerate(FAULTS, start=2):
        assert any(line.startswith(f"row {row}: ") and expected in line for line in out.splitlines()), row
    assert f"2 of {len(FAULTS) + 2} rows are good" in out


def test_every_clip_of_a_broken_file_counts(folder):
    (folder / "empty.mp4").write_bytes(b"")
    entries = [{"path": "0.mp4"}, *({"path": "empty.mp4", "start": i, "end": i + 1} for i in range(3))]
    with pytest.raises(DataError, match="3 of 4 files cannot be read"):
        tables(JsonClips(write(folder / "many.json", entries)), max_broken=0.5)


# ---- segments


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((NAN, NAN), range(24)),
        ((0.25, NAN), range(6, 24)),
        ((NAN, 0.25), range(6)),
        ((0.25, 0.5), range(6, 12)),
        ((0.333, 0.667), range(8, 16)),  # a third and two of a second, as they are written down
        ((0.0, 1.0), range(24)),
        ((0.0, 1.02), range(24)),  # less than half a frame too long
    ],
)
def test_a_segment_is_its_frames_to_the_number(folder, bounds, expected):
    assert frame_range(bounds, np.arange(24) / 24, 24.0) == expected
    reader = open_frames(str(folder / "0.mp4"), SETTINGS, bounds)
    assert reader.info.num_frames == len(expected)
    assert numbers(reader.read(range(len(expected)))) == list(expected)
    with pytest.raises(MediaError, match=f"has {len(expected)} frames; frames {len(expected)}"):
        reader.read([len(expected)])


def test_an_image_has_no_segment(videos):
    with pytest.raises(MediaError, match="is an image; `start` and `end`"):
        open_frames(str(videos.parent / "image0.png"), SETTINGS, (0.0, 1.0))


@pytest.mark.parametrize("annotated", [{}, {"frames": 24, "fps": 24}])
def test_training_and_validation_read_nothing_outside_a_segment(folder, annotated):
    entries = [{"path": f"{i}.mp4", "start": 0.25, "end": 0.75, **annotated} for i in range(3)]
    found = tables(JsonClips(write(folder / "parts.json", entries), val_share=None), num_val_files=1)
    assert (len(found.train), len(found.val)) == (2, 1)
    assert found.train["num_frames"].tolist() == [12, 12]

    schedule = BatchSchedule(clip_lengths(found.train, SETTINGS), FrameCounts(5, 5), seed=0, batch_size=1)
    seen = set()
    dataset = ClipDataset(found.train, schedule, SETTINGS)
    for position in range(30):
        sample = dataset[ClipIndex(position, position % 2, 5)]
        clip = numbers(sample.video.permute(1, 2, 3, 0).numpy())
        assert np.diff(clip).tolist() == [1] * 4
        assert sample.errors == []
        seen |= set(clip)
    assert seen == set(range(6, 18))
    with pytest.raises(DataError, match="no held-out video has 13 frames"):
        validation_clips(found.val, SETTINGS, 13, 1)
    (clip,), errors = validation_clips(found.val, SETTINGS, 12, 1)
    assert (numbers(clip.video[0].permute(1, 2, 3, 0).numpy()), errors) == (list(range(6, 18)), [])


def test_a_csv_gives_segments_too(folder, capsys):
    (folder / "t.csv").write_text("path,start,end\n0.mp4,0.5,\n0.mp4,0,0.25\n1.mp4,,\n1.mp4,x,1\n2.mp4,0,2\n")
    table, errors = fill_metadata(Table(folder / "t.csv").table())
    assert table["num_frames"].tolist() == [24] * 4  # of the file
    assert [reason for _, reason in errors] == [SEGMENT_ERROR]
    table, errors = count_frames(table)
    assert table["num_frames"].tolist() == [12, 6, 24]
    assert errors == [(f"row 5 ({folder}/2.mp4)", "is 1 s long; end=2 is beyond its end")]

    assert check(parse([str(folder / "t.csv"), "--clean", str(folder / "clean.csv"), "--workers", "1"])) == 1
    assert "3 of 5 rows are good" in capsys.readouterr().out
    clean = Table(folder / "clean.csv").table()
    assert clean["start"].tolist()[:2] == [0.5, 0.0]
    assert check(parse([str(folder / "clean.csv"), "--full", "--workers", "1"])) == 0


def test_inference_reconstructs_the_segment(folder, spatial_export, tmp_path):
    part = {"path": "0.mp4", "start": 0.25, "end": 0.5, "frames": "24"}  # wrong, and not used here
    path = write(folder / "infer.json", [part, {"path": "1.mp4", "start": "x"}])

    def infer(*more: str) -> None:
        words = [f"checkpoint={spatial_export}", f"source={path}", f"save_dir={tmp_path}/out", "overwrite=true"]
        infer_command.run(check_inference(tiny.compose(*words, *more, config="infer")))

    infer("num_samples=1", "start=2")
    (row,) = pd.read_csv(tmp_path / "out_rec/index.csv").itertuples()
    assert (row.start, row.frames) == (8, 4)
    original = open_media(tmp_path / "out_ori/000001_0.mp4")
    assert numbers(original.read(range(4))) == [8, 9, 10, 11]
    with pytest.raises(MediaError, match=rf"row 2 \(.*1\.mp4\): {SEGMENT_ERROR}"):  # not the whole file instead
        infer()


# ---- split


def test_a_split_is_taken_as_it_is_and_must_be_whole(folder):
    entries = [{"path": f"{i}.mp4", "split": split} for i, split in enumerate(("train", "val", "test"))]
    source = JsonClips(write(folder / "split.json", entries))
    found = tables(source)
    assert (found.train["name"].tolist(), found.val["name"].tolist()) == (["0.mp4"], ["1.mp4"])
    message = (f"{split} 1 clip of 1 video" for split in ("train", "val", "test"))
    assert found.notes[-1] == f"{', '.join(message)}, by their `split`"
    del entries[1]["split"]
    entries[2]["split"] = "valid"
    found = tables(JsonClips(write(folder / "split.json", entries)))
    assert [reason for _, reason in found.errors] == ["`split` is none of train, val, test"] * 2


def sides(path: Path, names: list[str], clips: int = 1, share: float = 0.25) -> dict[str, str]:
    """The side of every video, none of which has clips on both."""
    entries = [{"path": name, "start": i, "end": i + 1} for name in names for i in range(clips)]
    table = JsonClips(write(path, entries), val_share=share).table()
    assert (table.groupby("path")["split"].nunique() == 1).all()
    return dict(zip(table["name"], table["split"], strict=True))


def test_videos_keep_their_sides_when_the_list_grows_or_moves(tmp_path):
    names = [f"{i}.mp4" for i in range(400)]
    for name in names:
        (tmp_path / name).touch()
    few = sides(tmp_path / "few.json", names[100:200], clips=3)
    many = sides(tmp_path / "many.json", names[::-1], clips=2)
    assert {name: many[name] for name in few} == few
    assert 60 < sum(side == "val" for side in many.values()) < 140  # of 400, a quarter
    (tmp_path / "moved").mkdir()
    for name in names[:100]:
        (tmp_path / "moved" / name).touch()
    moved = sides(tmp_path / "moved/few.json", names[:100])
    assert {name: many[name] for name in moved} == moved


def test_at_least_one_video_is_held_out_if_there_are_two(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    assert sorted(sides(tmp_path / "c.json", ["a.mp4", "b.mp4"], 3, share=1e-9).values()) == ["train", "val"]
    assert set(sides(tmp_path / "c.json", ["a.mp4"], 3, share=0.999).values()) == {"train"}


def test_held_out_files_of_any_source_keeps_the_clips_of_a_file_together(folder, tmp_path):
    for i in range(20):
        shutil.copy(folder / "0.mp4", tmp_path / f"{i}.mp4")
    rows = [(f"{i}.mp4", 24, 24.0, j / 4, (j + 1) / 4) for i in range(20) for j in range(4)]
    pd.DataFrame(rows, columns=["path", "num_frames", "fps", "start", "end"]).to_csv(tmp_path / "t.csv", index=False)
    found = tables(Table(tmp_path / "t.csv"), num_val_files=5)
    assert (found.val["path"].nunique(), len(found.val)) == (2, 8)  # a tenth
    assert not set(found.val["path"]) & set(found.train["path"])


# ---- training


def test_two_steps_of_training(folder, tmp_path):
    entries = [{"path": f"{i}.mp4", "start": 0.25, "end": 0.75} for i in range(3)]
    path = write(folder / "train.json", [*entries, {"path": "gone.mp4"}])
    config = tiny.training(
        "spatial", path, "data=json_clips", f"data.source.path={path}", "data.max_broken=0.3", "data.frames.min=3",
        "data.frames.max=3", "stage=finetune", "stage.init_from=random", "loss=recon_kl", "validation.every=2",
        "validation.frames=3", "validation.clips=1",
    )  # fmt: skip
    try:
        trained = train.build_trainer(config, tmp_path)
        trained.fit()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    assert (tmp_path / "checkpoints/step-0000002/run.json").is_file()
    assert "row 4" in (tmp_path / "data_errors.jsonl").read_text()

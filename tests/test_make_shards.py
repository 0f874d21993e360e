"""Shards that `vae3d make-shards` writes: from any source, the same bytes each time, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests import http_server, tiny
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.open_source import open_source
from vae3d.data.sources.webdataset import WebDataset
from vae3d.data.tars import writer as shard_writer
from vae3d.data.tars.writer import entries_of, plan_shards, read_file


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of three videos and four images, and a table of them."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(3):
        tiny.write_video(folder / f"{number}.mp4", tiny.frames(4 + number, seed=number))
    (folder / "photos").mkdir()
    for number in range(4):
        Image.fromarray(tiny.frames(1, seed=number)[0]).save(folder / f"photos/p{number}.png")
    rows = [{"path": f"{number}.mp4", "text": "ä", "split": "train", "label": str(number)} for number in range(3)]
    rows += [{"path": f"photos/p{number}.png", "split": "val", "num_frames": 1} for number in range(4)]
    rows += [{"path": "2.mp4", "start": 0.05, "end": 0.2, "split": "train"}]
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


def test_a_sample_has_the_file_as_it_is_and_its_row(files, tmp_path):
    assert tiny.status("make-shards", files / "table.csv", tmp_path / "out", "--samples", 3, "--probe") == 0
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert [tar.name for tar in tars] == ["000000.tar", "000001.tar", "000002.tar"]
    members = {}
    for tar in tars:
        with tarfile.open(tar) as opened:
            infos = opened.getmembers()
            assert all((info.mtime, info.uid, info.uname, info.mode) == (0, 0, "", 0o644) for info in infos)
            members |= {info.name: opened.extractfile(info).read() for info in infos}
    assert members["000000001.mp4"] == (files / "1.mp4").read_bytes()
    assert members["000000004.png"] == (files / "photos/p1.png").read_bytes()
    assert members["000000007.mp4"] == (files / "2.mp4").read_bytes()
    assert json.loads(members["000000001.json"]) == {
        "__name__": "1.mp4", "text": "ä", "split": "train", "label": "1",
        "num_frames": 5, "height": 32, "width": 40, "fps": 24,
    }  # fmt: skip
    assert json.loads(members["000000007.json"])["start"] == 0.05
    ours, theirs = WebDataset(tmp_path / "out").table(), open_source(files / "table.csv").table()
    for column in ("name", "text", "label", "split", "start", "end"):
        assert [None if pd.isna(x) else x for x in ours[column]] == [None if pd.isna(x) else x for x in theirs[column]]
    assert ours[["num_frames", "height", "width", "fps"]].notna().all(axis=None)


def test_labels_and_texts_that_are_no_text_are_written_as_one(files, tmp_path):
    values = [True, 0.5, 2.0, 7, np.nan, pd.NaT, date(2026, 1, 2), 2**63]
    table = open_source(files / "table.csv").table().assign(label=pd.Series(values, dtype=object), text=range(8))
    spans = plan_shards(entries := entries_of(table)[0], None, None)
    (tmp_path / "out").mkdir()
    shard_writer.write_shards(entries, spans, tmp_path / "out")
    found = WebDataset(tmp_path / "out").table()
    assert found["error"].isna().all()
    assert found["label"].tolist() == ["True", "0.5", "2", "7", None, None, "2026-01-02", str(2**63)]
    assert found["text"].tolist() == [str(number) for number in range(8)]


@pytest.mark.parametrize("options", [["--size", "15KB"], ["--samples", 2, "--shuffle", 3]])
def test_the_same_source_gives_the_same_bytes(files, tmp_path, options):
    for name in ("a", "b"):
        assert tiny.status("make-shards", files / "table.csv", tmp_path / name, *options, "--workers", len(name)) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 2
    assert max(map(len, contents(tmp_path / "a").values())) <= (15_000 + 20 * 512 if options[0] == "--size" else 10**9)


def test_a_shuffle_is_a_permutation_of_all_rows(files):
    table = open_source(files / "table.csv").table()
    orders = [[entry.json["__name__"] for entry in entries_of(table, shuffle=seed)[0]] for seed in (None, 1, 1, 2)]
    assert orders[1] == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_a_killed_run_goes_on_to_the_same_bytes(files, tmp_path):
    words = ["make-shards", str(files / "table.csv"), str(tmp_path / "out"), "--samples", "2", "--workers", "1"]
    seen = []

    def die_at_the_sixth(path: str) -> tuple[bytes, str]:
        seen.append(path)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_file(path)

    if (child := os.fork()) == 0:
        shard_writer.read_file = die_at_the_sixth
        tiny.status(*words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = contents(tmp_path / "out")
    assert list(done) == ["000000.tar", "000001.tar"]
    stamps = [os.stat(tmp_path / "out" / name).st_mtime_ns for name in done]
    assert tiny.status(*words) == 0
    assert [os.stat(tmp_path / "out" / name).st_mtime_ns for name in done] == stamps
    assert tiny.status("make-shards", files / "table.csv", tmp_path / "whole", "--samples", 2) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


def test_other_settings_and_other_files_are_refused(files, tmp_path, capsys):
    shutil.copytree(files, tmp_path / "in")
    words = ["make-shards", tmp_path / "in/table.csv", tmp_path / "out"]
    assert tiny.status(*words, "--samples", 3) == 0
    assert tiny.status(*words, "--samples", 4) == 2
    assert "other files or settings" in capsys.readouterr().err
    shutil.copy(tmp_path / "in/0.mp4", tmp_path / "in/1.mp4")
    assert tiny.status(*words, "--samples", 3) == 2
    assert tiny.status("make-shards", tmp_path / "in", tmp_path / "in") == 2
    assert "not empty" in capsys.readouterr().err


def test_unreadable_files_are_named_and_counted(files, tmp_path, capsys):
    shutil.copytree(files, tmp_path / "in")
    (tmp_path / "in/0.mp4").write_bytes(b"no video")
    (tmp_path / "in/1.mp4").unlink()
    (tmp_path / "in/photos/p0.png").write_bytes(b"")
    words = ["make-shards", tmp_path / "in/table.csv", tmp_path / "out", "--samples", 3, "--probe"]
    assert tiny.status(*words) == 2
    error = capsys.readouterr().err
    assert "3 of 8 rows" in error
    assert all(str(tmp_path / "in" / name) in error for name in ("0.mp4", "1.mp4", "photos/p0.png"))
    assert not (tmp_path / "out").exists()
    assert tiny.status(*words, "--max_broken", 0.4) == 0
    printed = capsys.readouterr()
    assert "3 of 8 rows" in printed.err
    assert "5 samples" in printed.out
    assert len(WebDataset(tmp_path / "out").table()) == 5


def test_shards_folders_and_urls_are_sources_too(files, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    assert tiny.status("make-shards", files, tmp_path / "whole", "--samples", 100) == 0
    assert tiny.status("make-shards", tmp_path / "whole", tmp_path / "again", "--samples", 100) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "again")
    with http_server.serve(tmp_path) as store:
        assert tiny.status("make-shards", f"{store.url}/whole/000000.tar", tmp_path / "third", "--samples", 100) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "third")
    assert tiny.status("make-shards", files / "photos", tmp_path / "photos") == 0
    assert len(open_source(tmp_path / "photos").table()) == 4


def test_images_of_a_dataset_keep_their_encoding(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "raw").mkdir()
    for number, kind in enumerate(("jpg", "png", "jpg")):
        Image.fromarray(tiny.frames(1, seed=number)[0]).save(tmp_path / f"raw/{number}.{kind}")
    encoded = [{"path": None, "bytes": file.read_bytes()} for file in sorted((tmp_path / "raw").iterdir())]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": encoded, "label": [0, 1, 1]}, features).save_to_disk(tmp_path / "set")
    assert tiny.status("make-shards", tmp_path / "set", tmp_path / "out", "--size", "6KB") == 0
    table = WebDataset(tmp_path / "out").table()
    assert [path.rpartition(".")[2] for path in table["path"]] == ["jpg", "png", "jpg"]
    assert table["label"].tolist() == [0, 1, 1]
    assert [read_file(path)[0] for path in table["path"]] == [file["bytes"] for file in encoded]


def test_the_extension_of_a_video_in_a_dataset_is_that_of_its_container(files, tmp_path):
    for name, content in (
        ("mp4", (files / "0.mp4").read_bytes()),
        ("webm", b"\x1aE\xdf\xa3\x42\x82webm"),
        ("mov", b"\0\0\0\x08wide\0\0\0\x08mdat"),  # QuickTime of old cameras
        ("mpg", b"\0\0\x01\xb3\x04\x000\x13"),
        ("m2ts", b'\x0e\xbfF"G' + bytes(191) + b"G"),
        (None, b"junk"),
    ):
        (tmp_path / "rows.arrow").write_bytes(content)
        path = f"{tmp_path}/rows.arrow@0+{len(content)}/train/video/0.hfvideo"
        if name is None:
            with pytest.raises(MediaError, match="begins with b'junk'"):
                read_file(path)
        else:
            assert read_file(path) == (content, name)


def test_numbered_images_are_refused(tmp_path):
    for number in range(2):
        Image.fromarray(tiny.frames(1)[0]).save(tmp_path / f"frame_{number}.png")
    entries, errors = entries_of(open_source(tmp_path / "frame_*.png").table())
    assert entries == []
    assert "numbered images" in errors[0][1]


def test_the_plan_of_shards(files):
    entries, _ = entries_of(open_source(files / "table.csv").table())
    assert [len(span) for span in plan_shards(entries, None, 3)] == [3, 3, 2]
    assert [len(span) for span in plan_shards(entries, 1, None)] == [1] * 8  # each is larger
    assert list(np.concatenate(plan_shards(entries, 9000, 2))) == list(range(8))


def test_a_file_that_changes_while_shards_are_written_is_an_error(files, tmp_path, monkeypatch):
    entries, _ = entries_of(open_source(files / "table.csv").table())
    monkeypatch.setattr(shard_writer, "read_file", lambda path: (b"short", "mp4"))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"0\.mp4 changed while it was read"):
        shard_writer.write_shards(entries, [range(3)], tmp_path / "out")
    assert not contents(tmp_path / "out")

from __future__ import annotations

import csv
import errno
import hashlib
import logging
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from tests import tiny
from vae3d.commands import dry_run
from vae3d.commands.check_data import main as check
from vae3d.commands.check_data import parse
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.decoding import readers
from vae3d.data.decoding.readers import media_info
from vae3d.data.loader import check_files_exist, read_tables
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources import folder
from vae3d.data.sources.folder import Folder, files_under
from vae3d.data.sources.rooms import ErpRooms
from vae3d.data.sources.table import Table
from vae3d.data.sources.webdataset import WebDataset
from vae3d.data.table import parts, probe
from vae3d.data.table.parts import PartFolders
from vae3d.data.table.rows import why_missing
from vae3d.errors import UserError
from vae3d.inference.files import select_rows

SETTINGS = ClipSettings(16, 16)


def test_paths_are_relative_to_the_table_or_to_root(tmp_path):
    (tmp_path / "a").mkdir()
    pd.DataFrame({"path": ["x.mp4", "/abs/y.mp4"]}).to_csv(tmp_path / "a/t.csv", index=False)
    assert Table(tmp_path / "a/t.csv").table()["path"].tolist() == [str(tmp_path / "a/x.mp4"), "/abs/y.mp4"]
    assert Table(tmp_path / "a/t.csv", root="/data").table()["path"].tolist() == ["/data/x.mp4", "/abs/y.mp4"]


def test_only_path_is_required_and_parquet_serves_too(tmp_path):
    frame = pd.DataFrame({"path": ["x.mp4"], "text": ["a cat"], "fps": [25], "split": ["val"], "extra": [1]})
    frame.to_parquet(tmp_path / "t.parquet")
    row = Table(tmp_path / "t.parquet").table().iloc[0]
    assert (row["text"], row["fps"], row["split"], row["row"]) == ("a cat", 25.0, "val", 1)
    assert np.isnan(row["num_frames"])


FAULTS = {
    "": r"is empty",
    "path\n": r"has no rows",
    "video,text\na.mp4,x\n": r"has no column `path`; .* video, text",
    'path,a\nx,1\ny,"1\n': r"is not a readable table",
}


@pytest.mark.parametrize("content", FAULTS)
def test_invalid_tables_are_refused_with_the_rows(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=FAULTS[content]) as error:
        Table(tmp_path / "t.csv").table()
    assert str(tmp_path / "t.csv") in str(error.value)


def test_invalid_rows_are_reported_and_removed(tmp_path, capsys):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(6))
    (tmp_path / "t.csv").write_text(
        "path,num_frames,split\na.mp4,6,train\n,6,train\na.mp4,many,train\na.mp4,-3,train\na.mp4,6,testing\nb.mp4,,val\n"
    )
    assert check(parse([str(tmp_path / "t.csv"), "--workers", "1"])) == 1
    out = capsys.readouterr().out
    for row, reason in {
        2: "has no `path`",
        3: "`num_frames` is no positive whole number",
        4: "`num_frames` is no positive whole number",
        5: "`split` is none of train, val, test",
        6: "no such file",
    }.items():
        assert re.search(rf"row {row}: .*{reason}", out)
    assert "1 of 6 rows are good, 5 bad" in out
    tables = read_tables(Table(tmp_path / "t.csv"), SETTINGS, num_val_files=0, max_broken=0.9)
    assert tables.train["row"].tolist() == [1]
    assert [reason for _, reason in tables.errors][:2] == ["has no `path`", "`num_frames` is no positive whole number"]
    assert len(tables.errors) == 5


def test_a_parquet_file_keeps_its_rows_together_whatever_its_index(tmp_path):
    frame = pd.DataFrame({"path": list("abcd"), "num_frames": [1, 2, 3, 4], "split": ["train"] * 3 + ["val"]})
    for i, shuffled in enumerate(
        (frame.sample(frac=1, random_state=1), frame[frame.num_frames > 2], frame.set_index("split", drop=False))
    ):
        shuffled.to_parquet(tmp_path / f"{i}.parquet")
        table = Table(tmp_path / f"{i}.parquet").table()
        assert table["name"].tolist() == shuffled["path"].tolist()
        assert table["num_frames"].tolist() == shuffled["num_frames"].tolist()
        assert table["split"].tolist() == shuffled["split"].tolist()


def test_relative_and_absolute_paths_mix(videos, monkeypatch):
    monkeypatch.chdir(videos.parent)
    pd.DataFrame({"path": ["clip0.mp4", str(videos.parent / "clip1.mp4")]}).to_csv("mixed.csv", index=False)
    table, errors = probe.fill_metadata(Table("mixed.csv").table())
    assert table["num_frames"].tolist() == [12, 13]
    assert errors == []


def test_the_held_out_videos_stay_when_the_data_moves(videos, tmp_path):
    chosen = read_tables(Table(videos), SETTINGS, num_val_files=5, max_broken=0).val["name"].tolist()
    shutil.copytree(videos.parent, tmp_path / "moved")
    moved = read_tables(Table(tmp_path / "moved/videos.csv"), SETTINGS, num_val_files=5, max_broken=0)
    assert moved.val["name"].tolist() == chosen


def test_an_error_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(5))
    pd.DataFrame({"path": ["a.mp4"]}).to_csv(tmp_path / "t.csv", index=False)
    with monkeypatch.context() as patch:
        patch.setattr(probe, "read_metadata", lambda path: {"error": "the disk is away"})
        assert len(probe.fill_metadata(Table(tmp_path / "t.csv").table())[1]) == 1
    assert probe.fill_metadata(Table(tmp_path / "t.csv").table())[1] == []


def test_training_probes_only_what_it_needs(tmp_path):
    pd.DataFrame({"path": ["absent.mp4"], "num_frames": [5]}).to_csv(tmp_path / "t.csv", index=False)
    assert read_tables(Table(tmp_path / "t.csv"), SETTINGS, num_val_files=0, max_broken=0).errors == []
    with pytest.raises(DataError, match="no such file"):
        read_tables(Table(tmp_path / "t.csv"), replace(SETTINGS, fps=8.0), num_val_files=0, max_broken=0)


def test_missing_table_and_binary_table_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file; give a CSV, TSV or parquet file"):
        Table(tmp_path / "nowhere.csv").table()
    (tmp_path / "t.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        Table(tmp_path / "t.csv").table()


def test_folder_lists_videos_and_images_by_name(videos):
    names = [path.rsplit("/", 1)[1] for path in Folder(videos.parent).table()["path"]]
    assert names == sorted(names)
    assert "clip0.mp4" in names
    assert "image1.png" in names
    assert "videos.csv" not in names


def test_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no video or image"):
        Folder(tmp_path).table()
    with pytest.raises(DataError, match="no such file or folder"):
        Folder(tmp_path / "x").table()


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    """As lost+found of a disk, and after an error of a network disk."""
    room = tmp_path / "disk/area/room/output"
    room.mkdir(parents=True)
    (tmp_path / "disk/lost+found").mkdir()
    Image.fromarray(tiny.frames(1)[0]).save(room / "panorama_0000.png")
    number, names_of = errno.EACCES, {name: getattr(os, name) for name in ("scandir", "listdir")}

    def failing(name: str):
        def call(path="."):
            if Path(path).name == "lost+found":
                raise OSError(number, os.strerror(number), str(path))
            return names_of[name](path)

        return call

    for name in names_of:
        monkeypatch.setattr(os, name, failing(name))
    listed = Folder(tmp_path / "disk"), Folder(tmp_path / "disk/*/room/output/panorama_*.png")
    sources = [*listed, Folder(tmp_path / "disk/*/panorama_*.png"), ErpRooms(tmp_path / "disk", min_frames=1)]
    for source in (sources[0], sources[3]):
        with pytest.warns(UserWarning, match=r"lost\+found"):
            assert len(source.table()) == 1
    assert len(sources[1].table()) == 1
    with pytest.warns(UserWarning, match=r"lost\+found"), pytest.raises(DataError, match="no file matches"):
        sources[2].table()
    with pytest.raises(DataError, match=r"lost\+found"):  # the folder that was asked for
        Folder(tmp_path / "disk/lost+found").table()
    number = errno.EIO
    (tmp_path / "disk/0.tar").touch()
    for source in (sources[0], sources[2], sources[3], WebDataset(tmp_path / "disk")):
        with pytest.raises(DataError, match=r"lost\+found cannot be listed"):
            source.table()


def test_a_folder_tells_of_images_and_videos_that_cannot_be_read(monkeypatch, tmp_path, videos, caplog):
    shutil.copy(videos.parent / "clip0.mp4", tmp_path / "a.mp4")
    source = Folder(tmp_path)
    for name in ("a.txt", "b.HEIC", "c.heic", "d.mxf", ".e.heic"):
        (tmp_path / name).touch()
    for _ in range(2):
        assert list(source.table()["path"]) == [str(tmp_path / "a.mp4")]
        [note] = source.notes
        assert ": 2 .heic, 1 .mxf; " in note
    caplog.set_level(logging.INFO, "vae3d")
    select_rows(str(tmp_path), None, None, None)
    assert caplog.messages == [note]
    for name in ("b.HEIC", "c.heic", "d.mxf"):
        (tmp_path / name).unlink()
    source.table()
    assert source.notes == []
    stored = ["s3://bucket/clips/a.mp4", "s3://bucket/clips/b.avif", "s3://bucket/clips/.c.avif"]
    monkeypatch.setattr(folder, "find_objects", lambda url: stored)
    source = Folder("s3://bucket/clips")
    assert len(source.table()) == 1
    assert ": 1 .avif; " in source.notes[0]


def test_missing_facts_are_probed_once_and_kept(videos, monkeypatch, tmp_path):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    probed = []
    original = probe.read_metadata
    monkeypatch.setattr(probe, "read_metadata", lambda path: probed.append(path) or original(path))
    table, errors = probe.fill_metadata(Table(videos).table())
    assert errors == []
    assert table["num_frames"].tolist() == [12 + i for i in range(10)] + [1, 1]
    assert set(table["height"]) == {32}
    assert len(probed) == 12
    again, _ = probe.fill_metadata(Table(videos).table())
    pd.testing.assert_frame_equal(again, table)
    assert len(probed) == 12


def test_a_changed_file_is_probed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    pd.DataFrame({"path": ["a.mp4"]}).to_csv(tmp_path / "t.csv", index=False)
    for count in (5, 9):
        tiny.write_video(tmp_path / "a.mp4", tiny.frames(count))
        table, _ = probe.fill_metadata(Table(tmp_path / "t.csv").table())
        assert table["num_frames"].tolist() == [count]


@pytest.mark.parametrize("damage", ["cut off", "flipped"])
def test_damaged_answers_of_a_probe_are_probed_again(videos, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    table, _ = probe.fill_metadata(Table(videos).table())
    (part,) = (tmp_path / "probe").rglob("*.arrow")
    content, probed = part.read_bytes(), []
    places = range(5, len(content), 1500)
    changed = [content[:-20], b""] if damage == "cut off" else [_flipped(content, place) for place in places]
    original = probe.read_metadata
    monkeypatch.setattr(probe, "read_metadata", lambda path: probed.append(path) or original(path))
    for wrong in changed:
        for other in part.parent.iterdir():
            other.unlink()
        part.write_bytes(wrong)
        for opened in (12, 0):  # the second time, from what the first has added
            probed.clear()
            again, errors = probe.fill_metadata(Table(videos).table())
            pd.testing.assert_frame_equal(again, table)
            assert errors == []
            assert len(probed) == opened


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_complete_rows_are_not_opened(tmp_path):
    facts = {"num_frames": [5], "height": [4], "width": [6], "fps": [24.0]}
    pd.DataFrame({"path": ["absent.mp4"], **facts}).to_csv(tmp_path / "t.csv", index=False)
    table, errors = probe.fill_metadata(Table(tmp_path / "t.csv").table())
    assert errors == []
    assert table["num_frames"].tolist() == [5]


def broken_table(folder, videos, broken: int):
    table = pd.read_csv(videos)
    table["path"] = [str(videos.parent / path) for path in table["path"]]
    for i in range(broken - 1):  # the last one is missing
        (folder / f"broken{i}.mp4").write_bytes(b"junk" * i)
    extra = pd.DataFrame({"path": [str(folder / f"broken{i}.mp4") for i in range(broken)]})
    pd.concat([table, extra]).to_csv(folder / "t.csv", index=False)
    return Table(folder / "t.csv")


def test_files_that_do_not_open_are_skipped_and_reported(videos, tmp_path):
    tables = read_tables(broken_table(tmp_path, videos, 2), SETTINGS, num_val_files=0, max_broken=0.2)
    assert len(tables.train) == 12
    assert [(path.rsplit("/", 1)[1], reason) for path, reason in tables.errors] == [
        ("broken0.mp4", "is empty (0 bytes)"),
        ("broken1.mp4", "no such file"),
    ]


def test_too_many_broken_files_stop_the_run(videos, tmp_path):
    with pytest.raises(DataError, match=r"(?s)8 of 20 files cannot be read, more than data.max_broken=0.2.*is empty"):
        read_tables(broken_table(tmp_path, videos, 8), SETTINGS, num_val_files=0, max_broken=0.2)


def test_validation_rows_are_the_split_columns_or_a_stable_choice(videos, tmp_path):
    table = pd.read_csv(videos)
    table["path"] = [str(videos.parent / path) for path in table["path"]]
    table.assign(split=["train"] * 8 + ["val"] * 3 + ["test"]).to_csv(tmp_path / "split.csv", index=False)
    tables = read_tables(Table(tmp_path / "split.csv"), SETTINGS, num_val_files=5, max_broken=0)
    assert (len(tables.train), len(tables.val)) == (8, 3)

    chosen = read_tables(Table(videos), SETTINGS, num_val_files=5, max_broken=0).val["path"].tolist()
    assert len(chosen) == 1  # at most a tenth
    pd.read_csv(videos).sample(frac=1, random_state=3).to_csv(tmp_path / "shuffled.csv", index=False)
    shuffled = Table(tmp_path / "shuffled.csv", root=videos.parent)
    assert read_tables(shuffled, SETTINGS, num_val_files=5, max_broken=0).val["path"].tolist() == chosen


def test_a_table_without_training_rows_is_refused(videos, tmp_path):
    table = pd.read_csv(videos).assign(split="test")
    table["path"] = [str(videos.parent / path) for path in table["path"]]
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="no rows are left to train on"):
        read_tables(Table(tmp_path / "t.csv"), SETTINGS, num_val_files=0, max_broken=0)


def test_check_lists_every_bad_row_and_writes_the_good_ones(videos, tmp_path, capsys):
    source = broken_table(tmp_path, videos, 3)
    table = pd.read_csv(source.path)
    table["num_frames"] = [12, 99] + [None] * (len(table) - 2)
    table["text"] = "a\rb"
    table.to_csv(source.path, index=False, quoting=csv.QUOTE_NONNUMERIC)
    assert check(parse([str(source.path), "--clean", str(tmp_path / "good.csv"), "--workers", "1"])) == 1
    out = capsys.readouterr().out
    assert f"row 2: {videos.parent}/clip1.mp4: num_frames is 99 in the table, 13 in the file" in out
    assert f"row 13: {tmp_path}/broken0.mp4: is empty (0 bytes)" in out
    assert "row 14:" in out
    assert "11 of 15 rows are good, 4 bad" in out
    good = pd.read_csv(tmp_path / "good.csv")
    assert good["num_frames"].tolist() == [12, *range(14, 22), 1, 1]
    assert set(Table(tmp_path / "good.csv").table()["text"]) == {"a\rb"}
    assert check(parse([str(tmp_path / "good.csv"), "--full", "--workers", "1"])) == 0
    with pytest.raises(UserError, match="table itself"):
        check(parse([str(source.path), "--clean", str(source.path)]))


def test_a_folder_in_place_of_a_table_is_named(tmp_path):
    with pytest.raises(DataError, match="is a folder, not a table; use data=folder"):
        Table(tmp_path).table()


def test_check_of_a_missing_table_is_one_line(tmp_path, capsys):
    assert tiny.status("check-data", tmp_path / "x.csv") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {tmp_path}/x.csv: no such file; give a CSV, TSV or parquet file"


def test_looking_for_files_opens_none_and_refuses_what_no_run_could_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"never opened")
    (tmp_path / "t.csv").write_text("path,num_frames\na.mp4,9\na.mp4,\nb.mp4,9\n")
    assert "1 of 2 files exist" in check_files_exist(Table(tmp_path / "t.csv"), 0.4)[0]
    with pytest.raises(DataError, match=r"1 of 3 files cannot be read(.|\n)*b\.mp4\): no such file"):
        check_files_exist(Table(tmp_path / "t.csv"), 0.3)
    (tmp_path / "clips.tar").touch()
    with pytest.raises(DataError, match=r"clips\.tar: \.tar is not"):
        check_files_exist(Folder(tmp_path / "clips.tar"), 0.9)


def test_a_dry_run_looks_for_the_files_of_its_table(tmp_path):
    pd.DataFrame({"path": ["x.mp4", "y.mp4"], "num_frames": 99}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="2 of 2 files cannot be read"):
        dry_run.describe(tiny.training("temporal_vae", tmp_path / "t.csv", "loss=recon_kl"))


def test_check_names_a_file_that_crashes_the_decoder_and_goes_on(tmp_path, monkeypatch, capsys):
    for name in ("a", "bad", "c"):
        Image.fromarray(tiny.frames(1)[0]).save(tmp_path / f"{name}.png")
    opened = readers.open_media
    crash = lambda path, **given: os._exit(11) if "bad" in str(path) else opened(path, **given)  # noqa: E731
    monkeypatch.setattr(readers, "open_media", crash)
    assert check(parse([str(tmp_path), "--workers", "1"])) == 1
    out = capsys.readouterr().out
    assert f"row 2: {tmp_path}/bad.png: crashes the decoder" in out
    assert "2 of 3 rows are good" in out


def test_a_file_name_that_is_not_utf8_is_one_error(tmp_path):
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(2))
    os.rename(tmp_path / "a.mp4", os.fsencode(tmp_path) + b"/\xff.mp4")
    with pytest.raises(DataError, match=r"\\xff\.mp4.* is not UTF-8"):
        Folder(tmp_path).table()
    os.mkdir(folder := os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"))
    tiny.write_video(Path(folder, "a.mp4"), tiny.frames(2))
    Path(folder, "t.csv").write_text("path\na.mp4\n")
    for source in (Folder(folder), Table(Path(folder, "t.csv"))):
        with pytest.raises(DataError, match=r"\\xfe.* is not UTF-8"):
            source.table()


def test_parts_that_no_probe_wrote_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    video = str(tiny.write_video(tmp_path / "a.mp4", tiny.frames(3)))
    first = probe.probe([video])
    (part,) = (tmp_path / "cache/probe").rglob("*.arrow")
    entry = pa.ipc.open_file(part).read_all()
    unknown = entry.set_column(2, "num_frames", pa.array([None], pa.float64()))
    others = [b"", b"ARROW1", b"junk" * 1000]
    for table in (entry.drop_columns(["fps"]), pa.table({"x": [1]}), unknown):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        others.append(sink.getvalue().to_pybytes())
    part.unlink()
    for number, content in enumerate(others):
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        part.with_name(f"probed-{number:020d}-{digest}.arrow").write_bytes(content)
    assert not probe.results_for_paths([video]).knows([video])[0]
    assert probe.probe([video]) == first
    assert first[video]["num_frames"] == 3


@pytest.mark.parametrize(("name", "reason"), [("pipe.mp4", "pipe"), ("x" * 5000 + ".mp4", "no such file")])
def test_a_pipe_or_a_name_that_is_too_long_is_a_data_error(tmp_path, name, reason):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match=reason):
        media_info(str(tmp_path / name))


def test_a_file_that_must_not_be_looked_at_is_not_called_missing(tmp_path, monkeypatch):
    stat = os.stat

    def denied(path, *args, **options):
        if str(path).endswith("a.mp4"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(MediaError, match="cannot be read: Permission denied"):
        media_info(str(tmp_path / "a.mp4"))
    assert "Permission denied" in why_missing(str(tmp_path / "a.mp4"))


# --- results of a probe: beside the table, shared by ranks, kept when a probe is killed


def pictures(folder, count: int = 9) -> Table:
    for i in range(count):
        Image.new("RGB", (8 + i, 8)).save(folder / f"{i}.png")
    pd.DataFrame({"path": [f"{i}.png" for i in range(count)]}).to_csv(folder / "t.csv", index=False)
    return Table(folder / "t.csv")


def counted(monkeypatch) -> list[str]:
    read, original, lock = [], probe.read_metadata, threading.Lock()

    def read_metadata(path):
        with lock:
            read.append(os.path.basename(path))
        return original(path)

    monkeypatch.setattr(probe, "read_metadata", read_metadata)
    return read


def test_results_of_a_probe_lie_beside_the_table_and_move_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    source = pictures(tmp_path / "set")
    read = counted(monkeypatch)
    tables = read_tables(source, SETTINGS, num_val_files=0, max_broken=0)
    (part,) = (tmp_path / "set/t.csv.probe").glob("probed-*.arrow")
    entries = pa.ipc.open_file(part).read_all().to_pandas()
    assert sorted(map(bytes.decode, entries["path"])) == [f"{i}.png" for i in range(9)]
    assert sorted(entries["width"]) == list(range(8, 17))
    assert len(read) == 9
    (tmp_path / "set").rename(tmp_path / "moved")
    again = read_tables(Table(tmp_path / "moved/t.csv"), SETTINGS, num_val_files=0, max_broken=0)
    assert len(read) == 9
    assert again.train["width"].tolist() == tables.train["width"].tolist()


def test_results_go_to_the_cache_where_the_folder_of_the_table_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    source, read = pictures(tmp_path), counted(monkeypatch)
    (tmp_path / "t.csv.probe").write_bytes(b"")  # a file in the place of the folder
    with pytest.warns(UserWarning, match=r"t\.csv\.probe cannot be written"):
        read_tables(source, SETTINGS, num_val_files=0, max_broken=0)
    read_tables(source, SETTINGS, num_val_files=0, max_broken=0)  # and says it once
    assert len(read) == 9
    assert list((tmp_path / "cache/probe").rglob("probed-*.arrow"))


def test_ranks_share_the_files_to_probe(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    source, read = pictures(tmp_path, 30), counted(monkeypatch)
    barrier, results = threading.Barrier(3), {}

    def exchange(value):
        barrier.wait(timeout=60)
        return [value] * 3

    def run(rank):
        ranks = probe.Ranks(rank, 3, exchange)
        found = probe.results_for_table(source.path)
        results[rank] = probe.fill_metadata(source.table(), results=found, ranks=ranks)[0]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(f"{i}.png" for i in range(30))  # each once
    assert len(list((tmp_path / "t.csv.probe").glob("probed-*.arrow"))) == 3
    for rank in range(3):
        assert results[rank]["width"].tolist() == [8.0 + i for i in range(30)]


def test_a_rank_probes_what_it_does_not_see_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    source, read = pictures(tmp_path, 30), counted(monkeypatch)
    alone = probe.Ranks(1, 3, lambda value: [value] * 3)  # the others write to disks of other machines
    table, errors = probe.fill_metadata(source.table(), ranks=alone)
    assert (len(table), errors, len(read)) == (30, [], 30)


def test_a_killed_probe_loses_one_part(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "PART", 4)
    monkeypatch.setattr(parts, "MAX_PARTS", 2)
    source, original = pictures(tmp_path, 14), probe.read_metadata

    def killed(path):
        if path.endswith("/9.png"):
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(probe, "read_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        read_tables(source, SETTINGS, num_val_files=0, max_broken=0)
    monkeypatch.setattr(probe, "read_metadata", original)
    read = counted(monkeypatch)
    tables = read_tables(source, SETTINGS, num_val_files=0, max_broken=0)
    assert sorted(read) == ["10.png", "11.png", "12.png", "13.png", "8.png", "9.png"]
    assert tables.train["width"].tolist() == [8.0 + i for i in range(14)]
    assert len(list((tmp_path / "t.csv.probe").glob("probed-*.arrow"))) == 1  # many parts were merged


def test_merged_parts_keep_the_last_result_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MAX_PARTS", 1)
    results = probe.ProbeResults(PartFolders([tmp_path / "t.csv.probe"]))
    for count in (3, 4, 5):
        results.add({"/a.png": {"num_frames": count, "height": 1, "width": 1, "fps": 0}}, {"/a.png": [count, 7]})
    results.load()
    assert results.find(["/a.png"], {"/a.png": [3, 7]})["/a.png"]["num_frames"] == 3  # by its stamp
    with monkeypatch.context() as full:
        full.setattr(parts, "write_part", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        results.merge()  # nothing is lost, and the run goes on
    assert len(results.table) == 3
    results.merge()
    assert len(results.table) == 1
    assert results.find(["/a.png", "/b.png"], {})["/a.png"]["num_frames"] == 5
    assert results.find(["/a.png"], {"/a.png": [3, 7]}) == {}
    assert results.stamps(["/b.png", "/a.png"]).tolist() == [[-1, -1], [5, 7]]


def test_what_a_probe_wrote_is_no_file_of_a_folder(tmp_path):
    source = pictures(tmp_path, 3)
    read_tables(source, SETTINGS, num_val_files=0, max_broken=0)
    assert (tmp_path / "t.csv.probe").is_dir()
    assert files_under(tmp_path) == ["0.png", "1.png", "2.png", "t.csv"]

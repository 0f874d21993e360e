from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests import tiny
from vae3d.data import probe
from vae3d.data.check import main as check
from vae3d.data.loader import read_tables
from vae3d.data.sources import DataError, Folder, Table


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
    "video,text\na.mp4,x\n": r"has no column `path`; its columns are video, text",
    'path\na.mp4\n""\nb.mp4\n': r"`path` is empty in rows 2; fill or drop them",
    "path,num_frames\na.mp4,12\nb.mp4,many\nc.mp4,-3\n": r"`num_frames` is no positive number in rows 2, 3",
    "path,split\na.mp4,train\nb.mp4,testing\n": r"`split` must be one of train, val, test; it is not in rows 2",
    "path,a\nx,1\ny,1,2,3\n": r"is not a readable table",
}


@pytest.mark.parametrize("content", FAULTS)
def test_faulty_tables_are_refused_with_the_rows(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=FAULTS[content]) as error:
        Table(tmp_path / "t.csv").table()
    assert str(tmp_path / "t.csv") in str(error.value)


def test_missing_table_and_binary_table_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file; data.source.path takes a CSV or parquet file"):
        Table(tmp_path / "nowhere.csv").table()
    (tmp_path / "t.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="is not a readable table"):
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


def test_missing_facts_are_probed_once_and_kept(videos, monkeypatch, tmp_path):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    looked = []
    original = probe.look
    monkeypatch.setattr(probe, "look", lambda path: looked.append(path) or original(path))
    table, faults = probe.complete(Table(videos).table())
    assert faults == []
    assert table["num_frames"].tolist() == [12 + i for i in range(10)] + [1, 1]
    assert set(table["height"]) == {32}
    assert len(looked) == 12
    again, _ = probe.complete(Table(videos).table())
    pd.testing.assert_frame_equal(again, table)
    assert len(looked) == 12


def test_a_changed_file_is_probed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    pd.DataFrame({"path": ["a.mp4"]}).to_csv(tmp_path / "t.csv", index=False)
    for count in (5, 9):
        tiny.write_video(tmp_path / "a.mp4", tiny.frames(count))
        table, _ = probe.complete(Table(tmp_path / "t.csv").table())
        assert table["num_frames"].tolist() == [count]


def test_a_probe_cut_off_in_the_middle_of_a_line_goes_on(videos, monkeypatch, tmp_path):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    probe.complete(Table(videos).table())
    (cache,) = (tmp_path / "probe").iterdir()
    cache.write_text(cache.read_text()[:-20])
    table, faults = probe.complete(Table(videos).table())
    assert len(table) == 12
    assert faults == []
    table, _ = probe.complete(Table(videos).table())
    assert len(table) == 12


def test_complete_rows_are_not_opened(tmp_path):
    facts = {"num_frames": [5], "height": [4], "width": [6], "fps": [24.0]}
    pd.DataFrame({"path": ["absent.mp4"], **facts}).to_csv(tmp_path / "t.csv", index=False)
    table, faults = probe.complete(Table(tmp_path / "t.csv").table())
    assert faults == []
    assert table["num_frames"].tolist() == [5]


def broken_table(folder, videos, broken: int):
    table = pd.read_csv(videos)
    table["path"] = [str(videos.parent / path) for path in table["path"]]
    for i in range(broken - 1):  # the last one is missing
        (folder / f"broken{i}.mp4").write_bytes(b"junk" * i)
    extra = pd.DataFrame({"path": [str(folder / f"broken{i}.mp4") for i in range(broken)]})
    pd.concat([table, extra]).to_csv(folder / "t.csv", index=False)
    return Table(folder / "t.csv")


def test_files_that_do_not_open_are_left_out_and_told(videos, tmp_path):
    tables = read_tables(broken_table(tmp_path, videos, 2), holdout=0, max_broken=0.2)
    assert len(tables.train) == 12
    assert [(path.rsplit("/", 1)[1], reason) for path, reason in tables.faults] == [
        ("broken0.mp4", "is empty (0 bytes)"),
        ("broken1.mp4", "no such file"),
    ]


def test_too_many_broken_files_stop_the_run(videos, tmp_path):
    with pytest.raises(DataError, match=r"(?s)8 of 20 files cannot be read, more than data.max_broken=0.2.*is empty"):
        read_tables(broken_table(tmp_path, videos, 8), holdout=0, max_broken=0.2)


def test_validation_rows_are_the_split_columns_or_a_stable_choice(videos, tmp_path):
    table = pd.read_csv(videos)
    table["path"] = [str(videos.parent / path) for path in table["path"]]
    table.assign(split=["train"] * 8 + ["val"] * 3 + ["test"]).to_csv(tmp_path / "split.csv", index=False)
    tables = read_tables(Table(tmp_path / "split.csv"), holdout=5, max_broken=0)
    assert (len(tables.train), len(tables.val)) == (8, 3)

    chosen = read_tables(Table(videos), holdout=5, max_broken=0).val["path"].tolist()
    assert len(chosen) == 1  # at most a tenth
    shuffled = table.sample(frac=1, random_state=3)
    shuffled.to_csv(tmp_path / "shuffled.csv", index=False)
    assert read_tables(Table(tmp_path / "shuffled.csv"), holdout=5, max_broken=0).val["path"].tolist() == chosen


def test_a_table_without_training_rows_is_refused(videos, tmp_path):
    table = pd.read_csv(videos).assign(split="test")
    table["path"] = [str(videos.parent / path) for path in table["path"]]
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="no rows are left to train on"):
        read_tables(Table(tmp_path / "t.csv"), holdout=0, max_broken=0)


def test_check_lists_every_bad_row_and_writes_the_good_ones(videos, tmp_path, capsys):
    source = broken_table(tmp_path, videos, 3)
    table = pd.read_csv(source.path)
    table["num_frames"] = [12, 99] + [None] * (len(table) - 2)
    table.to_csv(source.path, index=False)
    assert check([str(source.path), "--clean", str(tmp_path / "good.csv"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert f"row 2: {videos.parent}/clip1.mp4: num_frames is 99 in the table, 13 in the file" in out
    assert f"row 13: {tmp_path}/broken0.mp4: is empty (0 bytes)" in out
    assert "row 14:" in out
    assert "11 of 15 rows are good, 4 bad" in out
    good = pd.read_csv(tmp_path / "good.csv")
    assert good["num_frames"].tolist() == [12, *range(14, 22), 1, 1]
    assert check([str(tmp_path / "good.csv"), "--full", "--workers", "1"]) == 0


def test_check_of_a_missing_table_is_one_line(tmp_path, capsys):
    assert check([str(tmp_path / "x.csv")]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/x.csv: no such file; data.source.path takes a CSV or parquet file\n"
    )

"""Large tables, prepared once, give what a small table of the same rows gives."""

from __future__ import annotations

import fcntl
import gzip
import os
import pickle
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests import tiny
from vae3d.data.batches import selection
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError
from vae3d.data.prepared import rows as prepared_rows
from vae3d.data.prepared import selection as prepared_selection
from vae3d.data.prepared import table as prepared
from vae3d.data.sources import table_files as tables
from vae3d.data.sources.table import Table
from vae3d.data.storage import cache
from vae3d.data.table import fingerprint, probe
from vae3d.io import FileError

SETTINGS = ClipSettings(16, 16)
COLUMNS = ["path", "name", "row", "num_frames", "height", "width", "fps", "start", "end", "text", "label"]


@pytest.fixture
def large(monkeypatch, tmp_path):
    """Treat every table as large, in pieces of a few rows."""
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))

    def use(on: bool = True, processes: bool = False) -> None:
        monkeypatch.setattr(prepared_rows, "SMALL_FILE", 0 if on else 2**60)
        monkeypatch.setattr(prepared, "LARGE", 0 if on else 2**60)
        monkeypatch.setattr(prepared_rows, "CHUNK", 23)
        monkeypatch.setattr(selection, "CHUNK", 23)
        monkeypatch.setattr(prepared_rows, "WORKERS", 2 if processes else 1)
        monkeypatch.setattr(tables, "CHUNK", 19)
        monkeypatch.setattr(tables, "BLOCK", 900)
        monkeypatch.setattr(fingerprint, "PER_ROW", 13)

    use()
    return use


def rows(count: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "path": [f"videos/{i % 7}/{i:03d}.mp4" for i in range(count)],
        "num_frames": rng.integers(5, 300, count), "height": rng.integers(20, 900, count),
        "width": rng.integers(20, 900, count), "fps": rng.choice([24, 29.97, 30], count),
        "label": rng.choice(["cat", "dog"], count), "text": [f"clip {i}" for i in range(count)],
    })  # fmt: skip


def both(source: Table, large, settings=SETTINGS, **changes):
    """read_tables of a table as a large one and as a small one."""
    chosen = {"num_val_files": 3, "max_broken": 0.5, **changes}
    found = []
    for on in (True, False):
        large(on, processes=source.path.name == "t.tsv")
        found.append(read_tables(source, settings, **chosen))
    large()
    return found


def assert_same(one, other, settings=SETTINGS):
    for a, b in ((one.train, other.train), (one.val, other.val)):
        pd.testing.assert_frame_equal(a.to_pandas()[COLUMNS], b.to_pandas()[COLUMNS], check_dtype=False)
        assert np.array_equal(clip_lengths(a, settings), clip_lengths(b, settings))
        assert [a.path(i) for i in range(len(a))] == b["path"].tolist()
        assert str([a.bounds(i) for i in range(len(a))]) == str([b.bounds(i) for i in range(len(b))])
    assert sorted(one.errors) == sorted(other.errors)
    assert one.skipped_files == other.skipped_files
    assert one.notes == other.notes
    assert one.fingerprint.digests() == other.fingerprint.digests()
    lengths, order = clip_lengths(one.train, settings), one.train.stored("by_length")
    assert np.array_equal(order, np.argsort(lengths, kind="stable"))


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet", "commas", "quotes", "split", "odd"])
def test_a_large_table_gives_what_a_small_one_gives(tmp_path, large, kind):
    table, file = rows(), tmp_path / "t.csv"
    if kind == "commas":
        table["text"] = [f'the "clip", {i}' for i in range(len(table))]
        table["num_frames"] = table["num_frames"].map(lambda count: f"{count} ")  # accepted as a number
    if kind == "quotes":
        table["text"] = [f"clip {i}" + ', with "marks"\nand lines' * (i > 40) for i in range(len(table))]
        table[" "], table["  "] = "note", None  # columns without a name, as spreadsheets write
    if kind == "split":
        table["split"] = ["val", "train", "train", "test"] * 15
    if kind == "odd":  # rows without a path, with wrong numbers and other names of one file
        table = table.astype(object)
        table.loc[3, "path"], table.loc[9, "num_frames"], table.loc[50, "height"] = None, "many", -1
        table.loc[20, "path"], table.loc[21, "path"] = f"{tmp_path}/videos/0/000.mp4", "./videos/1/001.mp4"
        table.loc[30, "num_frames"], table.loc[31, "width"], table["error"] = 3e22, 200.5, "a column of the user"
        table.loc[22, ["path", "fps"]] = [table.loc[40, "path"], None]  # of a missing file; row 40 is complete
    if kind == "parquet":
        table.set_index("label", drop=False).to_parquet(tmp_path / "t.parquet", row_group_size=9)
        file = tmp_path / "t.parquet"
    elif kind == "tsv":
        file = tmp_path / "t.tsv"
        table.to_csv(file, sep="\t", index=False)
    elif kind == "csv.gz":
        file = tmp_path / "t.csv.gz"
        file.write_bytes(gzip.compress(table.to_csv(index=False).encode()))
    else:
        table.to_csv(file, index=False, lineterminator="\r\n" if kind == "commas" else "\n")
    settings = replace(SETTINGS, fps=12.0, min_side=100, short_side=300)
    one, other = both(Table(file), large, settings, num_val_files=6)
    assert len(one.val)
    assert len(one.skipped_files)
    assert len(one.notes) == 2
    assert len(one.errors) == (6 if kind == "odd" else 0)
    assert_same(one, other, settings)


@pytest.mark.parametrize(
    ("line", "text"),
    [(60, "videos/x.mp4,1,2"), (41, '"a"b,9,50,50,30,cat,x'), (30, "\0,9,50,50,30,cat,x"), (5, '"never closed')],
)
def test_errors_of_a_large_table_name_the_line(tmp_path, large, line, text):
    lines = rows().to_csv(index=False).splitlines()
    lines[line - 1] = text
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    messages = []
    for on in (True, False):
        large(on)
        try:
            messages.append(read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.5).errors)
        except DataError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert f"line {line}" in str(messages[0]) or "end of data" in messages[0]


def test_labels_and_columns_of_parquet_are_those_of_the_file(tmp_path, large):
    table = rows()
    table["label"] = pd.array([None, *range(1, len(table))], dtype="Int64")  # 3 does not become 3.0
    table.to_parquet(tmp_path / "t.parquet")
    one, other = both(Table(tmp_path / "t.parquet"), large)
    assert_same(one, other)
    assert set(filter(None, one.train["label"])) <= set(map(str, range(1, len(table))))
    categories = table.assign(path=table["path"].where(table.index != 3)).astype("category")  # as Arrow dictionaries
    categories.to_parquet(tmp_path / "t.parquet")
    one, other = both(Table(tmp_path / "t.parquet"), large)
    assert_same(one, other)
    assert len(one.errors) == 1
    table.assign(text=[["a", "b"]] * len(table)).to_parquet(tmp_path / "t.parquet")
    for on in (True, False):
        large(on)
        with pytest.raises(DataError, match=r"t\.parquet: its column `text` is of list"):
            read_tables(Table(tmp_path / "t.parquet"), SETTINGS, 3, 0.5)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_a_usable_row_is_one_error(tmp_path, large, kind):
    table = rows().assign(num_frames=-1, error=0)  # a column `error` of the user says nothing
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    for on in (True, False):
        large(on)
        with pytest.raises(DataError, match="60 of 60 files cannot be read"):
            read_tables(Table(tmp_path / f"t.{kind}"), SETTINGS, 3, max_broken=1.0)


def test_sizes_of_clips_of_buckets_enlarge_nothing(tmp_path, large):
    rows().to_csv(tmp_path / "t.csv", index=False)
    one, other = both(Table(tmp_path / "t.csv"), large, replace(SETTINGS, short_side=900), sizes=True)
    assert one.notes == other.notes == []


def test_a_prepared_table_is_opened_and_not_read_again(tmp_path, large, monkeypatch):
    rows().to_csv(tmp_path / "t.csv", index=False)
    source = Table(tmp_path / "t.csv")
    first = read_tables(source, SETTINGS, 3, 0.0)
    for name in ("table_pieces", "count_rows"):
        monkeypatch.setattr(prepared_rows, name, None)
    monkeypatch.setattr(prepared_selection, "_write", None)
    again = read_tables(source, SETTINGS, 3, 0.0)
    assert_same(again, first)
    copy = pickle.loads(pickle.dumps(again.train))
    assert copy.to_pandas().equals(again.train.to_pandas())
    assert len(pickle.dumps(again.train)) < 1000  # names of files only
    assert not clip_lengths(again.train, SETTINGS).flags.owndata  # mapped


def test_a_changed_table_or_setting_is_prepared_anew(tmp_path, large):
    rows().to_csv(tmp_path / "t.csv", index=False)
    source = Table(tmp_path / "t.csv")
    assert len(read_tables(source, SETTINGS, 3, 0.0).val) == 3
    assert len(read_tables(source, SETTINGS, 5, 0.0).val) == 5
    strided = replace(SETTINGS, stride=3)
    assert_same(*both(source, large, strided), strided)
    rows(80).to_csv(tmp_path / "t.csv", index=False)
    assert len(read_tables(source, SETTINGS, 3, 0.0).train) == 77


def test_tables_that_were_not_used_for_long_are_deleted(tmp_path, large, monkeypatch):
    folders = []
    for name in "abc":
        rows().to_csv(tmp_path / f"{name}.csv", index=False)
        read_tables(Table(tmp_path / f"{name}.csv"), SETTINGS, 3, 0.0)
        folders.append(prepared.folder_of(prepared_rows.TableRows(Table(tmp_path / f"{name}.csv"))))
    old = time.time() - 31 * 86400
    os.utime(folders[0], (old, old))
    os.utime(folders[1], (old, old))
    read_tables(Table(tmp_path / "b.csv"), SETTINGS, 3, 0.0)  # used again
    rows().to_csv(tmp_path / "d.csv", index=False)
    read_tables(Table(tmp_path / "d.csv"), SETTINGS, 3, 0.0)
    assert [folder.is_dir() for folder in folders] == [False, True, True]
    os.utime(folders[1], (time.time() - 60, time.time() - 60))
    size = sum(file.stat().st_size for file in folders[2].rglob("*"))
    monkeypatch.setattr(prepared, "KEPT_BYTES", int(2.5 * size))  # two tables of this size
    prepared.delete_unused(tmp_path / "cache/tables")
    assert [folder.is_dir() for folder in folders] == [False, False, True]


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "SILENT", 0.01)
    caplog.set_level("INFO", "vae3d")
    held = (tmp_path / "table.lock").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.1, held.close).start()
    with cache.alone(tmp_path / "table", "tables"):
        assert [str(tmp_path / "table.lock") in message for message in caplog.messages] == [True]


def killed(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_while_it_prepares_is_an_error_with_the_usual_reason(tmp_path, large, monkeypatch):
    rows().to_csv(tmp_path / "t.csv", index=False)
    large(processes=True)
    monkeypatch.setattr(prepared_rows, "_converted", killed)
    with pytest.raises(DataError, match="memory"):
        read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.0)


def test_unfinished_tables_of_other_processes_are_left_for_a_day(tmp_path, large):
    folders = [tmp_path / "cache/tables" / name for name in (".a.12345678.tmp", ".b.12345678.tmp")]
    for folder in folders:
        folder.mkdir(parents=True)
    os.utime(folders[1], (time.time() - 2 * 86400,) * 2)
    rows().to_csv(tmp_path / "t.csv", index=False)
    read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.0)
    assert [folder.is_dir() for folder in folders] == [True, False]


def test_tables_are_deleted_while_others_write_them_and_hold_their_locks(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        (folder / "selection").mkdir(parents=True)
        (tmp_path / f"{folder.name}.lock").touch()
        (folder / "selection/train.arrow").symlink_to("renamed")  # listed, but not there when it is looked at
    os.utime(old, (1, 1))
    prepared.delete_unused(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.lock", "old.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, large, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "file/cache"))
    rows().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(FileError, match=r"file/cache/tables cannot be written.*VAE3D_CACHE"):
        read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.0)


def test_files_and_parts_of_a_large_table_are_probed_once(tmp_path, large, monkeypatch):
    paths = [f"{i}.mp4" for i in range(10)]
    for i, path in enumerate(paths):
        tiny.write_video(tmp_path / path, tiny.frames(10 + i))
    (tmp_path / "broken.mp4").write_bytes(b"junk")
    table = pd.DataFrame({"path": ["not read.mp4", *paths[1:], *paths, "broken.mp4", "absent.mp4"]})
    table["start"] = [np.nan] * 10 + [0.2] * 10 + [np.nan] * 2
    table["end"] = [np.nan] * 10 + [0.4] * 9 + [99] + [np.nan] * 2
    table["num_frames"] = [10.0, *[np.nan] * 21]
    table.to_csv(tmp_path / "t.csv", index=False)
    source = Table(tmp_path / "t.csv")
    one, other = both(source, large)
    assert_same(one, other)
    assert len(one.errors) == 3
    probed = []
    original = probe.read_metadata
    for module in (probe, prepared_selection):
        monkeypatch.setattr(module, "read_metadata", lambda path: probed.append(path) or original(path))
    read_tables(source, SETTINGS, 3, 0.5)
    assert sorted(os.path.basename(path) for path in probed) == ["absent.mp4", "broken.mp4"]
    tiny.write_video(tmp_path / "absent.mp4", tiny.frames(4))  # a file that comes back is used
    assert len(read_tables(source, SETTINGS, 3, 0.5).errors) == 2


def test_too_many_broken_rows_of_a_large_table_are_an_error(tmp_path, large):
    table = rows().astype(object)
    table.loc[:30, "num_frames"] = "x"
    table.to_csv(tmp_path / "t.csv", index=False)
    for on in (True, False):
        large(on)
        with pytest.raises(DataError, match=r"31 of 60 files .* data.max_broken=0.5"):
            read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.5)
    large()
    assert len(read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.6).errors) == 31
    with pytest.raises(DataError, match="31 of 60 files"):  # of the selection that now exists
        read_tables(Table(tmp_path / "t.csv"), SETTINGS, 3, 0.5)

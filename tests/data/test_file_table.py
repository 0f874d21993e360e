"""The table of files in Arrow: what it gives, and that workers share it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from vae3d.data.table import file_table
from vae3d.data.table.file_table import ArrowFile, FileTable, as_file_table, compact, take, write_arrow
from vae3d.data.table.rows import TEXTS, normalise_rows


@pytest.fixture
def rows(tmp_path):
    raw = pd.DataFrame({
        "path": ["b/1.mp4", "a.mp4", "/abs/c.mp4", None, "./d.mp4"], "num_frames": [5, 6, "x", 8, 9],
        "start": [None, 0.5, None, None, 1], "label": ["7", None, "9", None, "é"], "split": ["train", "val"] * 2 + ["no"],
    }).astype(object)  # fmt: skip
    table = normalise_rows(raw, tmp_path)
    texts = table[[*TEXTS]].astype(object)
    return table.assign(**texts.where(texts.notna(), None))


def mapped(rows: pd.DataFrame, folder) -> FileTable:
    """As prepare writes it: names, and a root in place of paths."""
    named = as_file_table(rows.drop(columns=["path", "row"])).base.table
    table = named.replace_schema_metadata({b"root": os.fsencode(folder)})
    write_arrow(folder / "t.arrow", table)
    return FileTable(ArrowFile(folder / "t.arrow"))


@pytest.mark.parametrize("kind", ["memory", "mapped"])
def test_it_has_what_the_table_in_pandas_has(rows, tmp_path, kind):
    rows = rows.drop(index=3).reset_index(drop=True) if kind == "memory" else rows.fillna({"name": ""})
    table = as_file_table(rows) if kind == "memory" else mapped(rows, tmp_path)
    pd.testing.assert_frame_equal(table.to_pandas()[rows.columns], rows, check_dtype=False)
    assert [table.path(row) for row in range(len(table))] == rows["path"].tolist()
    assert table.bounds(1) == pytest.approx((0.5, np.nan), nan_ok=True)
    assert np.array_equal(table.numbers("num_frames"), rows["num_frames"], equal_nan=True)
    assert np.isnan(table.numbers("fps")).all()
    assert table["split"].tolist() == rows["split"].tolist()
    assert table.equals("split", "val").tolist() == (rows["split"] == "val").tolist()
    assert table.missing("label").tolist() == rows["label"].isna().tolist()
    with pytest.raises(IndexError):
        table.path(len(rows))


def test_rows_are_chosen_in_any_order_and_more_than_once(rows, tmp_path):
    table, chosen = mapped(rows, tmp_path), np.array([4, 0, 1, 1])
    for one, expected in (
        (table.select(chosen), rows.iloc[chosen]),
        (table.select(chosen).select(np.array([2, 0])), rows.iloc[[1, 4]]),
        (table.select(rows["error"].isna().to_numpy()), rows[rows["error"].isna()]),
    ):
        expected = expected.reset_index(drop=True)
        pd.testing.assert_frame_equal(one.to_pandas()[rows.columns], expected, check_dtype=False)
        assert one.paths(np.arange(len(one))) == [one.path(row) for row in range(len(one))] == expected["path"].tolist()
    assert len(table.select(np.empty(0, int)).to_pandas()) == 0


def test_names_that_are_not_utf8_are_kept(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    table = pickle.loads(
        pickle.dumps(as_file_table(pd.DataFrame({"path": pd.Series([path], dtype=object), "label": [3]})))
    )
    assert table.path(0) == path
    assert table["label"].tolist() == ["3"]
    assert np.isnan(table.bounds(0)).all()


def test_a_large_table_is_taken_piece_by_piece():
    column = pa.chunked_array([["a", "b"], [], ["c", None, "d"]], pa.large_string())
    values = ["a", "b", "c", None, "d"]
    for chosen in ([0, 4], [3, 1, 1, 4, 0], [1, 2, 3], []):
        assert take(column, np.array(chosen, int)).to_pylist() == [values[i] for i in chosen]


def test_numbers_are_small_where_that_loses_nothing():
    assert compact(np.array([24, 30, np.nan])).dtype == np.float32
    assert compact(np.array([29.97])).dtype == np.float64


def large_table(folder, count: int = 300_000) -> FileTable:
    names = pa.array([b"videos/%08d.mp4" % i for i in range(count)], file_table.NAMES)
    write_arrow(folder / "t.arrow", pa.table({"name": names}, metadata={"root": "/data"}))
    write_arrow(folder / "v.arrow", pa.table({"row": np.arange(count, dtype=np.int32)[::-1]}))
    return FileTable(ArrowFile(folder / "t.arrow"), ArrowFile(folder / "v.arrow"))


def private_bytes() -> int:
    """Of this process, without the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _draw(table: FileTable, result) -> None:
    table.path(0)
    before = private_bytes()
    rows = np.random.default_rng(0).integers(len(table), size=5000).tolist()
    paths = [table.path(row) for row in rows]
    assert paths[0] == f"/data/videos/{len(table) - 1 - rows[0]:08}.mp4"
    del paths
    result.put(private_bytes() - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory of a process is read from /proc")
def test_a_worker_that_draws_from_a_large_table_grows_by_nothing(tmp_path):
    table = large_table(tmp_path)
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    worker = context.Process(target=_draw, args=(table, result))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert result.get() < 2**21
    assert len(pickle.dumps(table)) < 500  # the names of its files


def test_pages_are_given_back(tmp_path, monkeypatch):
    table, released = large_table(tmp_path, 100), []
    monkeypatch.setattr(file_table, "RELEASE_EVERY", 10)
    monkeypatch.setattr(ArrowFile, "release", lambda file: released.append(file.path))
    for row in range(100):
        table.path(row)
    assert len(released) == 2 * 10

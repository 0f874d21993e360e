"""The fingerprint of the data in a checkpoint, and the changes that a resume reports."""

from __future__ import annotations

import os

import pandas as pd
import pytest

from vae3d.data.fingerprint import fingerprint_of
from vae3d.data.sources import Table


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(b"1234")
        os.utime(tmp_path / f"{name}.mp4", (1000, 1000))
    return tmp_path


def fingerprint(folder, names, **columns):
    pd.DataFrame({"path": [f"{name}.mp4" for name in names], "num_frames": 9, **columns}).to_csv(
        folder / "t.csv", index=False
    )
    return fingerprint_of(Table(folder / "t.csv").table())


def test_the_same_data_are_the_same(folder):
    saved = fingerprint(folder, "abc").state_dict()
    assert fingerprint(folder, "abc").changes_since(saved) == []
    assert fingerprint(folder, "abc").changes_since(None) == []  # a checkpoint without a fingerprint


def changed(folder, before, names, **columns):
    return " | ".join(fingerprint(folder, names, **columns).changes_since(before.state_dict()))


def test_rows_that_come_go_move_or_say_something_else_are_counted(folder):
    before = fingerprint(folder, "abc")
    assert changed(folder, before, "abcd") == "1 new row, such as d.mp4"
    assert changed(folder, before, "ab") == "1 row removed"
    assert "order of the rows changed: 2 of 3" in changed(folder, before, "bac")
    assert "order of the rows changed: 2 of 2" in changed(folder, before, "cda")
    assert "occurred 3 times occur 4 times" in changed(folder, before, "abca")
    assert "1 row with other numbers, split, label or text, such as b.mp4" in changed(
        folder, before, "abc", num_frames=[9, 8, 9]
    )
    assert "3 rows with other" in changed(folder, before, "abc", split="train")


def test_files_replaced_under_their_names_are_counted(folder):
    before = fingerprint(folder, "abc")
    (folder / "b.mp4").write_bytes(b"12345")
    os.utime(folder / "c.mp4", (2000, 2000))
    message = changed(folder, before, "abc")
    assert "1 row whose file has another size, such as b.mp4" in message
    assert "1 row whose file has another modification time, and the same size, such as c.mp4" in message


def test_ranks_compare_names_and_not_where_the_folder_lies(folder, tmp_path_factory):
    here, numbers = fingerprint(folder, "abc", num_frames=[1, 2, 3]), fingerprint(folder, "abc", num_frames=[1, 2, 4])
    order = fingerprint(folder, "acb", num_frames=[1, 3, 2])
    elsewhere = tmp_path_factory.mktemp("copy")
    assert fingerprint(elsewhere, "abc", num_frames=[1, 2, 3]).digests() == here.digests()
    assert _differing(order, here) == {"data: order of the rows"}
    assert _differing(numbers, here) == {"data: numbers, splits and labels of the rows"}


def _differing(one, other):
    return {key for key, value in one.digests().items() if value != other.digests()[key]}

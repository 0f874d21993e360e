"""The fingerprint of the data in a checkpoint, and the changes that a resume reports."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest

from vae3d.arguments import ArgumentError
from vae3d.data.sources.table import Table
from vae3d.data.table import fingerprint as fingerprint_module
from vae3d.data.table.row_arrays import table_in_memory
from vae3d.data.table.rows import rows_from_paths


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(b"1234")
        os.utime(tmp_path / f"{name}.mp4", (1000, 1000))
    return tmp_path


def fingerprint_of(table, **options):
    rows = table_in_memory(table)
    return fingerprint_module.fingerprint_of(rows, np.array(rows.numbers("facts")), **options)


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


# --- of many rows, by group


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(fingerprint_module, "PER_ROW", 100)


def table_of(names, **columns) -> pd.DataFrame:
    return rows_from_paths([f"/x/{name}" for name in names], list(names)).assign(**columns)


NAMES = [f"{i}.mp4" for i in range(3000)]


def grouped_changes(names, **columns) -> str:
    saved = fingerprint_of(table_of(NAMES, num_frames=9), stat_files=False).state_dict()
    assert sum(value.numel() for value in saved.values()) < 25_000  # for any number of rows
    return " | ".join(fingerprint_of(table_of(names, **{"num_frames": 9, **columns})).changes_since(saved))


def test_changes_of_many_rows_are_estimated(many):
    assert grouped_changes(NAMES) == ""
    assert grouped_changes(NAMES[::-1]) == "the order of the rows changed"
    assert grouped_changes([*NAMES, "new.mp4"]) == (
        "rows are new or removed, about 1 (1 of 4096 groups of rows differ); 1 row more than before"
    )
    assert "about 7 (1 of 4096 " in grouped_changes([*NAMES, *(["again.mp4"] * 7)])
    message = grouped_changes([*NAMES[:-500], *(f"new{i}" for i in range(500))])
    assert message.endswith("; as many rows as before")
    assert 850 < int(message.split("about ")[1].split()[0]) < 1150
    changed = [9] * 2990 + [8] * 10
    message = grouped_changes(NAMES, num_frames=changed)
    assert message.startswith("rows have other numbers, split, label or text, about")
    assert 9 <= int(message.split("about ")[1].split()[0]) <= 11
    assert grouped_changes([f"other{i}" for i in range(30_000)]).startswith("rows are new or removed, ")


def test_files_of_many_rows_are_compared_where_both_are_known(many):
    rows, facts = np.arange(3000) * 7919, np.arange(3000)
    files = np.stack([np.full(3000, 5), np.full(3000, 1000)], axis=1)
    touched = files.copy()
    touched[:3, 1] = 2000
    saved = fingerprint_module.grouped(rows, facts, files).state_dict()
    assert fingerprint_module.grouped(rows, facts, files).changes_since(saved) == []
    assert fingerprint_module.grouped(rows, facts, None).changes_since(saved) == []  # not known now
    (message,) = fingerprint_module.grouped(rows, facts, touched).changes_since(saved)
    assert message.startswith("rows have files of another size or modification time, about 3 ")


def test_a_table_that_grew_beyond_the_limit_is_compared_with_its_rows(many):
    small = fingerprint_of(table_of(NAMES[:90], num_frames=9), stat_files=False)
    large = fingerprint_of(table_of(NAMES[:101], num_frames=9), stat_files=False)
    assert isinstance(small, fingerprint_module.DataFingerprint)
    assert isinstance(large, fingerprint_module.GroupedFingerprint)
    for now, saved, more in ((large, small, "11 rows more"), (small, large, "11 rows fewer")):
        (message,) = now.changes_since(saved.state_dict())
        assert message.endswith(f"about 11 (11 of 4096 groups of rows differ); {more} than before")


def test_ranks_compare_the_groups(many):
    here = fingerprint_of(table_of(NAMES, num_frames=9))
    assert _differing(fingerprint_of(table_of(NAMES[::-1], num_frames=9)), here) == {"data: order of the rows"}
    other = fingerprint_of(table_of(NAMES, num_frames=8))
    assert _differing(other, here) == {"data: numbers, splits and labels of the rows"}


def test_a_state_of_another_form_is_refused(many):
    state = fingerprint_of(table_of(NAMES)).state_dict()
    with pytest.raises(ArgumentError, match=r"data\.groups"):
        fingerprint_of(table_of(NAMES)).changes_since({**state, "groups": state["groups"][:5]})

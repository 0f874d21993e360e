"""Reading untrusted files, atomic writing, locks."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tests import tiny
from vae3d import io
from vae3d.errors import UserError
from vae3d.io import (
    FileError,
    atomic_dir,
    atomic_files,
    atomic_path,
    atomic_write,
    hold_lock,
    naming,
    open_nofollow,
    parse_json,
    read_json,
    read_yaml,
    remove,
    remove_unfinished,
    save_tensors,
    yaml_text,
)


def assert_refused(read, file, text, word):
    file.write_text(text)
    with pytest.raises(FileError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: *x", "alias"),
        ("a: !!pairs [- x: 1]", "pairs"),
        ("a: !!python/object/apply:os.system [touch x]", "os.system"),
        ("a: !!set {b}", "set"),
        ("a: ${oc.env:HOME}", "${"),
        ("${a}: 1", "${"),
        ("a: 2026-01-01", "date"),
        ("a: 2026-99-99", "YAML"),
        ("a: .nan", "finite"),
        ("1: a", "text"),
        ("a: [", "YAML"),
        ("[" * 40 + "]" * 40, "nested"),
        ("a: \x00", "YAML"),
        ("a: 1\n---\nb: 1", "YAML"),
    ],
)
def test_yaml_of_a_stranger_is_refused(tmp_path, text, word):
    assert_refused(read_yaml, tmp_path / "model.yaml", text, word)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ('{"a": NaN}', "finite"),
        ("[" * 5000 + "]" * 5000, "nested"),
        ('["${x}"]', "${"),
        ("1" * 5000, "JSON"),
    ],
)
def test_json_of_a_stranger_is_refused(tmp_path, text, word):
    assert_refused(read_json, tmp_path / "config.json", text, word)


def test_missing_large_and_binary_files_are_refused(tmp_path):
    with pytest.raises(FileError):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileError):
        read_json(tmp_path)
    (tmp_path / "large.json").write_text(" " * 100)
    with pytest.raises(FileError, match="99"):
        read_json(tmp_path / "large.json", max_bytes=99)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(FileError, match="UTF-8"):
        read_json(tmp_path / "binary.json")


def test_plain_values_survive_yaml_with_shared_lists(tmp_path):
    shared = [1, 2.5, None, True, "text", {"a": []}]
    value = {"b": shared, "a": shared}
    file = tmp_path / "x.yaml"
    file.write_text(yaml_text(value))
    assert read_yaml(file) == value
    assert list(read_yaml(file)) == ["b", "a"]


def test_an_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(file) as stream:
        stream.write(b"half")
        raise OSError("full")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]
    with atomic_write(file) as stream:
        stream.write(b"new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_an_atomic_dir_replaces_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_dir(folder) as tmp:
        (tmp / "b").write_text("half")
        raise OSError("full")
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(folder) == ["a"]
    with atomic_dir(folder) as tmp:
        (tmp / "b").write_text("new")
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(folder) == ["b"]


def test_atomic_files_replace_their_names_only_the_target_last(tmp_path, monkeypatch):
    for name in ("a", "b", "target"):
        (tmp_path / name).write_text("old")
    with pytest.raises(OSError, match="full"), atomic_files(tmp_path / "target") as tmp:
        (tmp / "a").write_text("half")
        raise OSError("full")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "target"]
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, to: renamed.append(to.name) or replace(source, to))
    with atomic_files(tmp_path / "target") as tmp:
        for name in ("target", "z", "a"):
            (tmp / name).write_text("new")
    assert sorted(renamed[:2]) == ["a", "z"]
    assert renamed[2:] == ["target"]
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {
        "a": "new", "b": "old", "target": "new", "z": "new",
    }  # fmt: skip
    with atomic_files(tmp_path / "target") as tmp, atomic_files(tmp_path / "target") as of_another_rank:
        (tmp / "a").write_text("first")
        (of_another_rank / "a").write_text("second")
    assert (tmp_path / "a").read_text() == "first"


def test_tensors_have_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))
    users = [file.name for file in (tiny.ROOT / "vae3d").rglob("*.py") if "save_file" in file.read_text()]
    assert users == ["io.py"]


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    metadata = {"format": "pt", "name": 'größe "\n\x01\x7f', "b": "1", "a": "2", "c": "3"}
    for i in range(10):
        save_tensors({"z": torch.ones(2), "a": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / str(i), metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(10)}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("z"), torch.ones(2))


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".kept", "kept.tmp", ".tmpAyzEys"):  # the last as of safetensors
        (tmp_path / name).touch()
    io.tmp_path(tmp_path / "step-1").mkdir()
    with atomic_path(tmp_path / "file") as tmp:
        tmp.touch()
    tmp.touch()  # as if killed before the rename
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".kept", "file", "kept.tmp"]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), True),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), True),
        (SafetensorError("Error while serializing: invalid shape"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_errors_of_the_disk_name_the_file_and_others_pass(error, named):
    expected, message = (FileError, "^out: cannot be written") if named else (type(error), None)
    with pytest.raises(expected, match=message), naming("out"):
        raise error


def test_one_process_holds_a_lock(tmp_path):
    with (
        hold_lock(tmp_path / "lock", UserError("not here")),
        pytest.raises(UserError, match="in use"),
        hold_lock(tmp_path / "lock", UserError("in use")),
    ):
        pass
    with hold_lock(tmp_path / "lock", UserError("in use")):
        pass


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # as of NFS without lockd

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(FileError, match=f"{tmp_path}/lock: .*{os.strerror(errno.ENOLCK)}"):
        hold_lock(tmp_path / "lock", UserError("in use")).__enter__()


def test_links_are_never_followed_for_writing(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    run.mkdir()
    (run / "log").symlink_to(victim / "kept")
    with pytest.raises(FileError, match="log"):
        open_nofollow(run / "log")
    with atomic_write(run / "log") as stream:
        stream.write(b"new")
    assert not (run / "log").is_symlink()
    (run / ".x.tmp").symlink_to(victim)
    (run / "x").symlink_to(victim)
    with atomic_dir(run / "x") as tmp:
        (tmp / "new").write_text("new")
    (run / "again").symlink_to(victim)
    remove(run / "again")
    assert [p.name for p in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a: 1" + ":1" * 100_000, id="to base 60"),
        pytest.param("a: 0x" + "f" * 100_000, id="hexadecimal"),
        pytest.param("a: 0x1" + "0" * 100, id="of 401 bits"),
        pytest.param("a: [" + "1, " * 200_000 + "1]", id="many"),
    ],
)
def test_numbers_that_take_long_to_read_are_refused_fast(tmp_path, text):
    (tmp_path / "f").write_text(text)
    start = time.process_time()
    with pytest.raises(FileError, match=str(tmp_path / "f")):
        read_yaml(tmp_path / "f")
    assert time.process_time() - start < 1


def test_what_a_terminal_obeys_is_escaped_in_messages_and_long_lines_are_cut():
    message = str(UserError("a\x1b[2J\ud800\u202e ä\nb" + "x" * 10_000))
    assert message.splitlines()[0] == r"a\x1b[2J\ud800\u202e ä"
    assert len(message) < 2200
    with pytest.raises(FileError, match="cannot be printed"):
        parse_json('{"a\\nerror: b": 1}', "x.json")

"""Hashes change with the content, and with nothing else."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch

from vae3d.hashing import file_hash, json_hash, weights_hash
from vae3d.io import FileError


def test_hash_of_a_file(tmp_path):
    content = os.urandom(2**20 + 7)  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert file_hash(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert file_hash(tmp_path / "a", "sha1", b"blob") == hashlib.sha1(b"blob" + content).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: is not a regular file"):
        file_hash(tmp_path / "pipe")


def test_hash_of_json():
    assert json_hash({"a": 1, "b": [2, None]}) == json_hash({"b": [2, None], "a": 1})
    assert len({json_hash(value) for value in ([1, 2], [2, 1], "12", {"1": 2})}) == 4


def test_hash_of_weights():
    state = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3, dtype=torch.int64)}
    same = weights_hash(dict(reversed(state.items())))
    assert weights_hash(state) == same
    others = [
        {**state, "a": torch.tensor([[1.0, 2.5]])},
        {**state, "a": torch.tensor([1.0, 2.0])},
        {**state, "a": torch.tensor([[1.0, 2.0]], dtype=torch.float64)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({same, *map(weights_hash, others)}) == 6
    assert weights_hash({"a": torch.ones(2, 2, dtype=torch.bfloat16).T}) == weights_hash(
        {"a": torch.ones(2, 2, dtype=torch.bfloat16)}
    )

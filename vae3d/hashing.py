"""Hashes of files, of JSON-able values and of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vae3d.io import check_regular

if TYPE_CHECKING:  # scripts/fetch_weights.py hashes files where torch is not installed
    from torch import Tensor


def file_hash(path: str | Path, algorithm: str = "sha256", prefix: bytes = b"") -> str:
    """Hex digest of `prefix` and a file's content. Raises OSError, and FileError for a pipe or a device."""
    check_regular(path)
    with open(path, "rb") as stream:
        return stream_hash(stream, algorithm, prefix)


def stream_hash(stream: BinaryIO, algorithm: str = "sha256", prefix: bytes = b"") -> str:
    """Hex digest of `prefix` and the rest of a stream."""
    digest = hashlib.new(algorithm, prefix)
    while block := stream.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a JSON-able value; dict order does not matter, other types count as
    their str()."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, dtypes, shapes and values, independent of order, device and file format."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

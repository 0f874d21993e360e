"""Write some tensors of a .pth file as .safetensors, with the standard library only.

Reads a dict of fp32 tensors in both formats of torch.save: the zip archive, and the format before torch 1.6, several
pickles followed by the tensors' data. The unpickler builds such dicts only and runs no code.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vae3d.errors import UserError
from vae3d.io import atomic_write

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
FP32 = 4  # bytes
Locate = Callable[[str], tuple[BinaryIO, int]]  # storage -> (stream, offset of the storage in it)


class Tensor(NamedTuple):
    """A tensor's metadata in a pickle. offset, stride: in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return FP32 * math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def write_slim(source: Path, target: Path, prefix: str) -> None:
    """Copy the tensors whose names begin with `prefix`, one at a time.

    Raises UserError if there are none, if one is not contiguous fp32, or if the pickle contains other objects.
    """
    with source.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"
        stream.seek(0)
        state, locate = read_zip(stream) if is_zip else read_legacy(stream)
        tensors = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        if not tensors:
            raise UserError(f"{source} has no tensor called {prefix}*")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_contiguous:
                raise UserError(f"{source}: {name} is not a contiguous fp32 tensor")
        with atomic_write(target) as out:
            out.write(header(tensors))
            for name, tensor in tensors.items():
                data = read(tensor, locate)
                if len(data) != tensor.nbytes:
                    raise UserError(f"{source}: {name} is cut off")
                out.write(data)


def header(tensors: dict[str, Tensor]) -> bytes:
    """The header of a safetensors file: its length, and JSON padded to eight bytes."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read(tensor: Tensor, locate: Locate) -> bytes:
    stream, begin = locate(tensor.storage)
    stream.seek(begin + FP32 * tensor.offset)
    return stream.read(tensor.nbytes)


def read_zip(stream: BinaryIO) -> tuple[dict[str, Any], Locate]:
    """The state dict in <root>/data.pkl; its storages are <root>/data/<storage>."""
    archive = zipfile.ZipFile(stream)
    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = pickled.removesuffix(".pkl")
    return Unpickler(archive.open(pickled)).load(), lambda storage: (archive.open(f"{folder}/{storage}"), 0)


def read_legacy(stream: BinaryIO) -> tuple[dict[str, Any], Locate]:
    """The state dict of the old format: pickles of magic number, version, system info, object and storage names, then
    each storage's length (int64) and data."""
    magic, _, _, state, storages = (Unpickler(stream).load() for _ in range(5))
    if magic != LEGACY_MAGIC:
        raise UserError(f"{stream.name} was not written by torch.save")
    begins = {}
    for storage in storages:
        (length,) = struct.unpack("<q", stream.read(8))
        begins[storage] = stream.tell()
        stream.seek(FP32 * length, os.SEEK_CUR)
    return state, lambda storage: (stream, begins[storage])


class Unpickler(pickle.Unpickler):
    """Builds ordered dicts and fp32 tensors only. Raises UserError for any other object."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "FloatStorage"): "fp32",
        ("torch._utils", "_rebuild_tensor"): Tensor,  # used by vgg16-397923af.pth
        ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: Tensor(
            storage, offset, shape, stride
        ),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise UserError(f"refused to unpickle {module}.{name}: only a dict of fp32 tensors is read")
        return self.ALLOWED[module, name]

    def persistent_load(self, saved_id: tuple) -> str:
        kind, dtype, storage, _, _, *view = saved_id
        if (kind, dtype) != ("storage", "fp32") or view not in ([], [None]):
            raise UserError(f"refused to unpickle {saved_id}: only a dict of fp32 tensors is read")
        return storage

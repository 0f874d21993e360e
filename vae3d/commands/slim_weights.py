"""Write some tensors of a .pth file as .safetensors, with the standard library only."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from vae3d.errors import UserError
from vae3d.io import atomic_write
from vae3d.weight_files import SavedTensor, open_tree

FP32 = 4  # bytes


def write_slim(source: Path, target: Path, prefix: str) -> None:
    """Copy the tensors whose names begin with `prefix`, one at a time.

    Raises UserError if there are none, or if the file holds anything but a dict of contiguous fp32 tensors.
    """
    state = open_tree(source)
    if not isinstance(state, dict):
        raise UserError(f"{source} holds no dict of tensors")
    for name, tensor in state.items():
        if not (isinstance(tensor, SavedTensor) and tensor.dtype == "float32" and tensor.is_contiguous):
            raise UserError(f"{source}: {name} is not a contiguous fp32 tensor")
    tensors = {name: tensor for name, tensor in state.items() if str(name).startswith(prefix)}
    if not tensors:
        raise UserError(f"{source} has no tensor called {prefix}*")
    with atomic_write(target) as out:
        out.write(header({name: tensor.shape for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            begin = FP32 * tensor.offset
            out.write(tensor.storage()[begin : begin + FP32 * math.prod(tensor.shape)])


def header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The header of a safetensors file: its length, and JSON padded to eight bytes."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + FP32 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

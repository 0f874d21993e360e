"""Single tensors of a safetensors file in a store, by range reads."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vae3d.data.storage.files import open_range, size_and_version

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FIRST = 2**17  # bytes of the first read: the headers of most shards
MAX_HEADER = 2**28


class RemoteTensors:
    """What safetensors.safe_open is to a local file: reads the header now, and a tensor when it is asked for.

    Raises MediaError if the file is not there or shorter, SafetensorError if it is no such file or has no such tensor.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        size, _ = size_and_version(url)
        start = open_range(url, 0, min(size, FIRST))
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise SafetensorError(f"{url} is no safetensors file: its header would have {length} bytes")
        header = start[8 : 8 + length]
        header += open_range(url, 8 + len(header), length - len(header)) if len(header) < length else b""
        try:
            self._entries: dict[str, Any] = json.loads(header)
        except (ValueError, RecursionError) as error:
            raise SafetensorError(f"{url} is no safetensors file: its header is not JSON") from error
        self._offset, self._size = 8 + length, size - 8 - length

    def get_tensor(self, name: str) -> Tensor:
        try:
            entry = self._entries[name]
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
            sound = whole and end - start == math.prod(shape) * dtype.itemsize and start < end <= self._size
        except (KeyError, TypeError, ValueError) as error:
            raise SafetensorError(f"{self.url} has no tensor {name} of fp32, fp16 or bf16") from error
        if not sound:
            raise SafetensorError(f"{self.url}: {name} is at bytes {start} to {end}, which its shape does not fit")
        content = open_range(self.url, self._offset + start, end - start)
        return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)

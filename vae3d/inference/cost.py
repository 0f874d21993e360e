"""What encoding and decoding cost: speed, memory, size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

REPEATS = 3
PEAK_RESET = Path("/proc/self/clear_refs")


@torch.inference_mode()
def measure_cost(model: nn.Module, video: Tensor, dtype: torch.dtype | None = None) -> dict[str, float | None]:
    """Encode and decode a clip [1, 3, T, H, W] a few times.

    Frames per second are of the median run after one to warm up. Memory in GiB is what a run needs at its peak beyond
    what was there before it, weights aside; null where the system does not tell (CPU, other than on Linux).
    """
    frames = video.shape[2]

    def encode() -> Tensor:
        with torch.autocast(video.device.type, dtype, enabled=dtype is not None):
            return model.encode(video).mode()

    z = encode()

    def decode() -> Tensor:
        with torch.autocast(video.device.type, dtype, enabled=dtype is not None):
            return model.decode(z, frames)

    encode_seconds, encode_memory = timed(encode, video.device)
    decode_seconds, decode_memory = timed(decode, video.device)
    return {
        "frames": frames,
        "height": video.shape[3],
        "width": video.shape[4],
        "encode_frames_per_second": frames / encode_seconds,
        "decode_frames_per_second": frames / decode_seconds,
        "encode_memory_gib": encode_memory,
        "decode_memory_gib": decode_memory,
        "parameters": sum(p.numel() for p in model.parameters()),
        "compression": math.prod(video.shape[1:]) / math.prod(z.shape[1:]),
        "device": torch.cuda.get_device_name(video.device) if video.device.type == "cuda" else video.device.type,
        "precision": "fp32" if dtype is None else str(dtype).removeprefix("torch."),
    }


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, float | None]:
    """Seconds of the median run, and the peak of memory in GiB."""
    run()
    before = _start_of_peak(device)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = _peak(device)
    memory = None if before is None or peak is None else max(0, peak - before) / 2**30
    return statistics.median(seconds), memory


def _start_of_peak(device: torch.device) -> int | None:
    """Forget the peak so far; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not PEAK_RESET.exists():
        return None
    PEAK_RESET.write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" and PEAK_RESET.exists() else None


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

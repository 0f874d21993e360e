"""Measure speed and memory of encoding and decoding."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.host_memory import release_freed_memory
from vae3d.precision import autocast

REPEATS = 3
PEAK_RESET = Path("/proc/self/clear_refs")  # writing 5 resets VmHWM, see proc(5)


@torch.inference_mode()
def measure_cost(model: nn.Module, video: Tensor, precision: str) -> dict[str, Any]:
    """Encode and decode a clip [1, 3, T, H, W] a few times. precision: of autocast.

    Frames per second: of the median run, after a warm-up. Memory in GiB: the peak minus the memory in use before, and
    so without the weights; None for a CPU on another system than Linux.
    """
    frames = video.shape[2]

    def encode() -> Tensor:
        with autocast(video.device, precision):
            return model.encode(video).mode()

    z = encode()

    def decode() -> Tensor:
        with autocast(video.device, precision):
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
        "precision": precision,
    }


def timed(run: Callable[[], Tensor], device: torch.device, repeats: int = REPEATS) -> tuple[float, float | None]:
    """Seconds of the median of `repeats` runs after a warm-up, and the peak memory of one in GiB."""

    def seconds_of_a_run() -> float:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    seconds_of_a_run()
    before = _reset_peak(device)
    seconds = [seconds_of_a_run()]
    # Of the first run alone: the next ones may not fit into what it has freed, and malloc then takes more.
    memory = None if before is None else max(0, _peak(device) - before) / 2**30
    seconds += [seconds_of_a_run() for _ in range(repeats - 1)]
    return statistics.median(seconds), memory


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _read_status("VmHWM")


def _reset_peak(device: torch.device) -> int | None:
    """Reset the peak memory. Returns the bytes in use now; None if the peak cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not PEAK_RESET.exists():
        return None
    release_freed_memory()  # else the runs reuse it, and their peak is not above the memory in use
    PEAK_RESET.write_text("5")
    return _read_status("VmRSS")


def _read_status(key: str) -> int:
    """An entry of /proc/self/status in bytes. psutil has no peak that can be reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

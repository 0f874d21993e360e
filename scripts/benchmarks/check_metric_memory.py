"""Check that scoring a long video needs no more memory than a short one, and that degenerate videos score.

    python scripts/benchmarks/check_metric_memory.py [--frames 10000] [--size 64] [--bound 64]
    python scripts/benchmarks/check_metric_memory.py --networks     # also LPIPS and rFID; minutes on a CPU

Scores a lossless pair of videos as eval/eval_common_metric.py does and prints the memory of the process over time. Then
scores videos that are equal, still, black, and one frame long. Exit status 1 if memory grew by more than --bound MiB
after the first tenth, or a score is missing or not finite. Networks have random weights.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from random_weights import write_weights

from vae3d.argparse_types import finite_float, positive_int
from vae3d.evaluation.pairs import Pair, Protocol
from vae3d.evaluation.score import score_pair
from vae3d.inference.video import VideoWriter
from vae3d.metrics import Metric, MetricSet, VideoResult, build_metrics
from vae3d.metrics.base import Chunk

METRICS = ["psnr", "ssim", "flicker", "tpsnr", "ws_psnr", "ws_ssim", "seam", "polar", "cube"]
NETWORKS = ["lpips_alex", "rfid"]
SHORT = 17  # frames of a degenerate video; metrics that are too slow for the long one score only these:
SLOW, SLOW_NETWORKS = ["tof"], ["tlp", "flolpips"]
ROWS = 20  # printed over time
MIB = 2**20


class Memory(Metric):
    """Records the resident memory of the process in MiB, by the number of scored frames."""

    name = "memory"
    columns = {}

    def __init__(self, every: int) -> None:
        self.every, self.process = every, psutil.Process()
        self.history: dict[int, float] = {}

    def update(self, chunk: Chunk) -> None:
        if chunk.start >= self.every * len(self.history):
            self.history[chunk.start] = self.process.memory_info().rss / MIB

    def result(self) -> VideoResult:
        return VideoResult()


def moving(size: int) -> Iterator[np.ndarray]:
    """Yield frames [H, W, 3] uint8 of a drifting pattern without end."""
    rows, columns = np.mgrid[:size, :size]
    t = 0
    while True:
        waves = [np.sin((rows * a + columns * b + t * c) / 9) for a, b, c in ((2, 1, 3), (1, 3, 2), (-1, 2, 4))]
        yield (127.5 + 120 * np.stack(waves, -1)).round().astype(np.uint8)
        t += 1


def degrade(frame: np.ndarray) -> np.ndarray:
    return np.clip(frame.astype(np.int16) + 3 - frame % 7, 0, 255).astype(np.uint8)


def write_pair(folder: Path, name: str, frames: int, original: Iterator[np.ndarray], equal: bool = False) -> Pair:
    """Write frame by frame. The reconstruction has errors unless equal=True."""
    ref, rec = folder / f"{name}_ori.mp4", folder / f"{name}_rec.mp4"
    with VideoWriter(ref, 24, "lossless") as a, VideoWriter(rec, 24, "lossless") as b:
        for _, frame in zip(range(frames), original, strict=False):
            a.write(frame[None])
            b.write(frame[None] if equal else degrade(frame)[None])
    return Pair(name, ref, rec)


def check_memory(pair: Pair, metrics: MetricSet, frames: int, bound: float) -> list[str]:
    """Print memory over time; returns errors."""
    memory = Memory(max(1, frames // ROWS))
    result, _ = score_pair(pair, MetricSet([*metrics, memory]), Protocol())
    print(f"{'frames':>8}{'MiB':>10}")
    for count, mib in memory.history.items():
        print(f"{count:8,}{mib:10.1f}")
    settled = [mib for count, mib in memory.history.items() if count >= frames // 10]
    part = max(1, len(settled) // 5)  # medians, because a sample may include memory that is about to be freed
    growth = statistics.median(settled[-part:]) - statistics.median(settled[:part])
    print(f"growth after the first tenth: {growth:.1f} MiB (bound {bound:g}); {scores(metrics, result)}")
    errors = wrong_scores(metrics, pair.name, result, frames)
    return errors + ([f"memory grew by {growth:.1f} MiB"] if growth > bound else [])


def check_degenerate(folder: Path, size: int, metrics: MetricSet) -> list[str]:
    """Print the scores; returns errors."""
    still = next(moving(size))
    pairs = {
        write_pair(folder, "equal", SHORT, moving(size), equal=True): SHORT,
        write_pair(folder, "still", SHORT, iter([still] * SHORT)): SHORT,
        write_pair(folder, "black", SHORT, iter([still * 0] * SHORT), equal=True): SHORT,
        write_pair(folder, "black and grey", SHORT, iter([still * 0] * SHORT)): SHORT,
        write_pair(folder, "one frame", 1, moving(size)): 1,
    }
    errors = []
    for pair, frames in pairs.items():
        result, _ = score_pair(pair, metrics, Protocol())
        print(f"{pair.name}: {scores(metrics, result)}")
        errors += wrong_scores(metrics, pair.name, result, frames)
    return errors


def scores(metrics: MetricSet, result: VideoResult) -> str:
    return "  ".join(f"{c} {'-' if v is None else f'{v:.5g}'}" for c, v in metrics.aggregate([result]).items())


def wrong_scores(metrics: MetricSet, name: str, result: VideoResult, frames: int) -> list[str]:
    """Errors of missing and non-finite scores. A single frame has no neighbours and no distribution."""
    errors = []
    for metric in metrics:
        undefined = frames == 1 and (metric.pairs or metric.name == "rfid")
        for column, value in metric.aggregate([result]).items():
            if value is None and not undefined:
                errors.append(f"{name}: {column} is missing")
            if value is not None and not math.isfinite(value):
                errors.append(f"{name}: {column} is {value}")
    return errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=positive_int, default=10_000, help="of the long video; default %(default)s")
    parser.add_argument("--size", type=positive_int, default=64, help="height and width; default %(default)s")
    parser.add_argument(
        "--bound", type=finite_float, default=64, help="MiB that memory may grow by; default %(default)s"
    )
    parser.add_argument("--networks", action="store_true", help=f"also {' and '.join(NETWORKS)}")
    parser.add_argument(
        "--rfid_stride", type=positive_int, default=50, help="rfid of the long video takes every n-th frame"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = METRICS + (NETWORKS if args.networks else [])
    extra = SLOW + (SLOW_NETWORKS if args.networks else [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.networks:
            write_weights(folder, "alex", "inception", "pwc")
            os.environ |= {"VAE3D_WEIGHTS": name, "VAE3D_ALLOW_UNVERIFIED": "1"}
        pair = write_pair(folder, "long", args.frames, moving(args.size))
        metrics = build_metrics(names, settings={"rfid": {"stride": args.rfid_stride}})
        errors = check_memory(pair, metrics, args.frames, args.bound)
        errors += check_degenerate(folder, args.size, build_metrics(names + extra))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

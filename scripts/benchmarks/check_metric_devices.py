"""Check that a GPU gives the CPU's scores, metric by metric, and measure its speed.

    python scripts/benchmarks/check_metric_devices.py [--device cuda] [--size 256] [--frames 17] [--metric NAME ...]

Scores a moving synthetic clip and a noisy copy on both devices, with random weights. Exit status 1 if a column differs
by more than 1e-3 relative: convolutions sum in another order on a GPU, and RAFT and PWC-Net amplify the difference.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from random_weights import SHAPES, write_weights
from torch import Tensor

from vae3d.argparse_types import positive_int
from vae3d.metrics import METRICS, VideoResult, build_metrics
from vae3d.metrics.distribution import SetMetric
from vae3d.precision import as_device

TOLERANCE = 1e-3


def make_pair(frames: int, size: int) -> tuple[Tensor, Tensor]:
    """[T, 3, H, W] in [0, 1]: a smooth pattern that moves one pixel per frame, and a noisy copy."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size // 16 + 2, size // 16 + 2, generator=rng)
    wide = F.interpolate(coarse, size=(size + frames, size + frames), mode="bicubic").clamp(0, 1)[0]
    ref = torch.stack([wide[:, t : t + size, t : t + size] for t in range(frames)])
    return ref, (ref + 0.03 * torch.randn(ref.shape, generator=rng)).clamp(0, 1)


def scores(name: str, device: torch.device, pair: tuple[Tensor, Tensor]) -> tuple[dict[str, float], float]:
    """Column -> value (for metrics of sets the mean absolute feature), and frames per second of the second run."""
    metrics = build_metrics([name], device)
    ref, rec = (frames.to(device) for frames in pair)
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        metrics.update(ref, rec)
        result = metrics.result()  # copies to the CPU, which synchronises
        seconds = time.perf_counter() - start
    return values(metrics.metrics[0], result), len(ref) / seconds


def values(metric: object, result: VideoResult) -> dict[str, float]:
    if isinstance(metric, SetMetric):
        return {metric.name: float(result.features[metric.name][1].rows.abs().mean())}
    return {column: score.value for column, score in result.scores.items() if score.value is not None}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="compared with cpu; default %(default)s")
    parser.add_argument("--size", type=positive_int, default=256, help="of the square frames; default %(default)s")
    parser.add_argument("--frames", type=positive_int, default=17, help="of the clip; default %(default)s")
    parser.add_argument("--metric", nargs="+", default=list(METRICS), metavar="NAME", help="default: all")
    args = parser.parse_args(argv)
    device = as_device(args.device)
    pair = make_pair(args.frames, args.size)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"VAE3D_WEIGHTS": folder, "VAE3D_ALLOW_UNVERIFIED": "1"}
        write_weights(Path(folder), *SHAPES)
        print(f"{'column':22}{'cpu':>14}{args.device:>14}{'relative':>11}{'frames/s':>10}")
        for name in args.metric:
            expected, _ = scores(name, torch.device("cpu"), pair)
            found, speed = scores(name, device, pair)
            for column, value in expected.items():
                error = abs(found[column] - value) / max(abs(value), 1e-12)
                bad += error > TOLERANCE
                print(f"{column:22}{value:14.6f}{found[column]:14.6f}{error:11.1e}{speed:10.1f}")
    print("all columns agree" if not bad else f"{bad} columns differ by more than {TOLERANCE:g}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Measure the speed of the metrics on one CPU thread against the published evaluation of Open-Sora v1.2 (`eval/vae`).

    python scripts/benchmarks/bench_metrics.py [--size 256] [--frames 17] [--videos 3] [--repeats 5]

Both sides score the same frames in turns and must give equal numbers. Prints medians of CPU seconds, which other
programs disturb less than wall time. The published algorithms are rewritten here as they run in the original: SSIM
channel by channel with a two-dimensional window, LPIPS frame by frame with gradients, each video decoded whole and once
per metric. Networks have random weights, which does not change the time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from random_weights import write_weights
from torch import Tensor

from vae3d.argparse_types import positive_int
from vae3d.evaluation.pairs import Protocol, find_pairs
from vae3d.evaluation.score import plan, score_pair
from vae3d.inference.video import write_video
from vae3d.metrics import MetricSet, build_metrics
from vae3d.pixels import as_unit
from vae3d.pretrained.lpips import TRUNKS
from vae3d.pretrained.pwcnet import CHANNELS, correlation

PRESET = "opensora12"  # with LPIPS of the upsampled map, as published
SHORTEST = 0.05  # seconds; faster functions are timed in a loop


@dataclass
class Case:
    """Two implementations of the same scores. work: frames or pairs per call. tolerance: relative to the largest score.
    target: least speed of vae3d over published."""

    name: str
    unit: str
    work: int
    ours: Callable[[], np.ndarray]
    published: Callable[[], np.ndarray] | None = None
    tolerance: float = 0.0
    target: float | None = None


def published_ssim(ref: Tensor, rec: Tensor) -> np.ndarray:
    """[T] scores of [T, 3, H, W] frames in [0, 1]: `cal_ssim.py`."""
    kernel = cv2.getGaussianKernel(11, 1.5)
    window = np.outer(kernel, kernel)

    def smooth(plane: np.ndarray) -> np.ndarray:
        return cv2.filter2D(plane, -1, window)[5:-5, 5:-5]

    scores = []
    for frames in zip(ref.numpy(), rec.numpy(), strict=True):
        channels = []
        for x, y in zip(*(frame.astype(np.float64) for frame in frames), strict=True):
            mean_x, mean_y = smooth(x), smooth(y)
            mean_xx, mean_yy, mean_xy = mean_x**2, mean_y**2, mean_x * mean_y
            var_x, var_y, covariance = smooth(x**2) - mean_xx, smooth(y**2) - mean_yy, smooth(x * y) - mean_xy
            similar = (2 * mean_xy + 0.01**2) * (2 * covariance + 0.03**2)
            channels.append((similar / ((mean_xx + mean_yy + 0.01**2) * (var_x + var_y + 0.03**2))).mean())
        scores.append(np.mean(channels))
    return np.array(scores)


def published_psnr(ref: Tensor, rec: Tensor) -> np.ndarray:
    """`cal_psnr.py`."""
    errors = [np.mean((x - y) ** 2) for x, y in zip(ref.numpy(), rec.numpy(), strict=True)]
    return np.array([100.0 if error < 1e-10 else 20 * math.log10(1 / math.sqrt(error)) for error in errors])


def published_lpips(network: torch.nn.Module, ref: Tensor, rec: Tensor) -> np.ndarray:
    """`cal_lpips.py`: one frame at a time, with gradients on."""
    pairs = zip(ref * 2 - 1, rec * 2 - 1, strict=True)
    return np.array([network(x[None], y[None]).mean().detach().item() for x, y in pairs])


def lpips_package(folder: Path) -> torch.nn.Module:
    """The lpips package's network with the weights of the folder."""
    import lpips

    trunk = torch.load(folder / TRUNKS["alex"][1], weights_only=True)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", spatial=True, pnet_rand=True)
    network.net.load_state_dict({key: trunk[f"features.{key.split('.', 1)[1]}"] for key in network.net.state_dict()})
    return network.eval()


def shifted_products(first: Tensor, second: Tensor) -> Tensor:
    """The cost volume of `pretrained.pwcnet.correlation`, shift by shift as in the paper."""
    height, width = first.shape[-2:]
    padded = F.pad(second, (4, 4, 4, 4))
    shifts = [(dy, dx) for dy in range(9) for dx in range(9)]
    return torch.stack([(first * padded[..., y : y + height, x : x + width]).mean(1) for y, x in shifts], 1)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W, 3] in 0 to 255, with roughly the spectrum of photographs."""
    scales = [(height >> k or 1, width >> k or 1, 2**k) for k in range(7)]
    layers = [
        cv2.resize(rng.normal(0, k, (h, w, 3)), (width, height), interpolation=cv2.INTER_CUBIC) for h, w, k in scales
    ]
    return 128 + 0.8 * sum(layers)


def clips(frames: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A panned texture, and a blurred copy with errors; [T, H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    wide, errors = texture(rng, size + frames, size + 2 * frames), texture(rng, size, size) - 128
    moving = [wide[i : i + size, 2 * i : 2 * i + size] for i in range(frames)]
    blurred = [cv2.GaussianBlur(x, (0, 0), 1) + 0.05 * errors for x in moving]
    original, reconstruction = (np.stack(x).round().clip(0, 255).astype(np.uint8) for x in (moving, blurred))
    return original, reconstruction


def published_layout(frames: np.ndarray) -> Tensor:
    """[T, 3, H, W] float32 in [0, 1], channel after channel in memory."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(255).contiguous()


def decode_whole(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return published_layout(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))


def metric_cases(size: int, frames: int, theirs: torch.nn.Module) -> list[Case]:
    """One metric at a time, on frames in memory."""
    pair = clips(frames, size, 0)
    ref, rec = (published_layout(video) for video in pair)
    own_ref, own_rec = (as_unit(video) for video in pair)

    def ours(name: str) -> Callable[[], np.ndarray]:
        metrics = build_metrics([name], preset=PRESET)

        @torch.inference_mode()
        def score() -> np.ndarray:
            metrics.update(own_ref, own_rec)
            return np.array(metrics.result().scores[name].frames)

        return score

    return [
        Case("ssim", "frames", frames, ours("ssim"), lambda: published_ssim(ref, rec), 1e-12, 5),
        Case("psnr", "frames", frames, ours("psnr"), lambda: published_psnr(ref, rec), 1e-6),
        Case("lpips_alex", "frames", frames, ours("lpips_alex"), lambda: published_lpips(theirs, ref, rec), 1e-4),
        Case("flolpips", "pairs", frames - 1, ours("flolpips")),
    ]


def end_to_end(folder: Path, size: int, frames: int, videos: int, theirs: torch.nn.Module) -> Case:
    """From lossless files to the scores of every frame."""
    for i in range(videos):
        for kind, clip in zip(("ori", "rec"), clips(frames, size, i), strict=True):
            write_video(folder / kind / f"{i:03d}.mp4", clip, 24)
    names = ["ssim", "psnr", "lpips_alex"]
    metrics = build_metrics(names, preset=PRESET)
    published = [published_ssim, published_psnr, lambda ref, rec: published_lpips(theirs, ref, rec)]

    def ours() -> np.ndarray:
        protocol = Protocol()
        jobs, _ = plan(find_pairs(folder / "ori", folder / "rec")[0], protocol, metrics)
        results = [score_pair(job.pair, MetricSet(metrics.metrics), protocol)[0] for job in jobs]
        return np.array([[result.scores[name].frames for result in results] for name in names])

    def whole_videos() -> np.ndarray:
        files = [(path, folder / "rec" / path.name) for path in sorted((folder / "ori").iterdir())]
        return np.array([[score(*map(decode_whole, pair)) for pair in files] for score in published])

    return Case("+".join(names) + ", files", "frames", videos * frames, ours, whole_videos, 1e-4, 2)


def correlation_cases(size: int) -> list[Case]:
    """PWC-Net's correlation at each level of its pyramid, coarsest first."""
    cases = []
    for level in range(6, 1, -1):
        side = max(1, size >> level)
        first, second = torch.randn(2, 1, CHANNELS[level - 1], side, side, generator=torch.Generator().manual_seed(0))
        cases.append(
            Case(
                f"correlation, {CHANNELS[level - 1]} x {side} x {side}",
                "pairs",
                1,
                lambda a=first, b=second: correlation(a, b).numpy(),
                lambda a=first, b=second: shifted_products(a, b).numpy(),
                1e-5,
                2,
            )
        )
    return cases


def measure(case: Case, repeats: int) -> tuple[float, float | None]:
    """Median work per second of vae3d and of the published code. Raises AssertionError if their scores differ."""
    ways = [case.ours] + ([case.published] if case.published else [])
    if case.published:
        for a, b in zip(case.ours(), case.published(), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=case.tolerance * np.abs(b).max(), err_msg=case.name)
    loops = [math.ceil(SHORTEST / max(timed(way, 1), 1e-6)) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, count, found in zip(ways, loops, seconds, strict=True):
            found.append(timed(way, count))
    rates = [case.work / statistics.median(found) for found in seconds]
    return rates[0], rates[1] if len(rates) == 2 else None


def timed(way: Callable[[], object], loops: int) -> float:
    """CPU seconds of one call, over all threads."""
    begin = time.process_time()
    for _ in range(loops):
        way()
    return (time.process_time() - begin) / loops


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive_int, default=256, help="height and width; default %(default)s")
    parser.add_argument("--frames", type=positive_int, default=17, help="of a video; default %(default)s")
    parser.add_argument("--videos", type=positive_int, default=3, help="default %(default)s")
    parser.add_argument("--repeats", type=positive_int, default=5, help="default %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder / "weights", "alex", "pwc")
        os.environ |= {"VAE3D_WEIGHTS": str(folder / "weights"), "VAE3D_ALLOW_UNVERIFIED": "1"}
        theirs = lpips_package(folder / "weights")
        cases = [
            *metric_cases(args.size, args.frames, theirs),
            end_to_end(folder, args.size, args.frames, args.videos, theirs),
            *correlation_cases(args.size),
        ]
        print(f"{args.size}x{args.size}, one thread, per second{'ours':>24}{'published':>12}{'ratio':>8}{'target':>8}")
        for case in cases:
            ours, published = measure(case, args.repeats)
            row = f"{case.name + ', ' + case.unit:40}{ours:12,.1f}"
            row += f"{published:12,.1f}{ours / published:7.1f}x" if published else ""
            print(row + (f"{case.target:7.0f}x" if case.target else ""))


if __name__ == "__main__":
    main()

"""Measure time and memory of reading one random 17-frame clip, resized to 256 x 256, from 10 s of 1280 x 720 H.264.

    python scripts/benchmarks/bench_reading.py [--repeats 9]
    python scripts/benchmarks/bench_reading.py --video mine.mp4   # the same from a video of yours

Compares vae3d's readers with decoding the whole file, as torchvision's read_video and Open-Sora 1.2 do. Each reading
runs in a process of its own on one thread; the methods take turns. Prints medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vae3d.argparse_types import positive_int

FRAMES, SIZE, RATE, SECONDS = 17, 256, 24, 10


def make_video(path: Path) -> None:
    """Write a panned smooth pattern with a key frame every second."""
    rng = np.random.default_rng(0)
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((2240, 1440), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(RATE), "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for i in range(RATE * SECONDS):
            view = np.ascontiguousarray(wide[i : i + 720, 3 * i : 3 * i + 1280])
            frame = av.VideoFrame.from_ndarray(view, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def whole_file(path: str, start: float) -> np.ndarray:
    """Decode the whole file into memory, then cut out the clip."""
    import torch
    import torch.nn.functional as F

    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_rgb().to_ndarray() for frame in container.decode(video=0)]
    video = torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2)
    first = int(start * (len(video) - FRAMES + 1))
    clip = F.interpolate(
        video[first : first + FRAMES].float(), scale_factor=SIZE / min(video.shape[-2:]), mode="bilinear"
    )
    left = (clip.shape[-1] - SIZE) // 2
    return clip[..., left : left + SIZE].byte().numpy()


def only_the_clip(path: str, start: float, reader: str) -> np.ndarray:
    from vae3d.data.clips import ClipSettings, read_clip
    from vae3d.data.readers import open_media

    opened = open_media(path, reader)
    clip = read_clip(opened, path, ClipSettings(SIZE, SIZE), FRAMES, start)
    opened.close()
    return clip


METHODS = {
    "whole file": whole_file,
    "vae3d, pyav": lambda path, start: only_the_clip(path, start, "pyav"),
    "vae3d, decord": lambda path, start: only_the_clip(path, start, "decord"),
}


def child(method: str, path: str, start: float) -> None:
    """Print the time of one reading, and its peak memory above that of the imports."""
    import torch

    torch.set_num_threads(1)
    warm = Path(path).with_name("warm.mp4")
    METHODS[method](str(warm), 0.0)  # imports and first-call costs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    METHODS[method](path, start)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "mib": (peak - before) / 1024}))


def measure(method: str, path: Path, start: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", method, str(path), str(start)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=9)
    parser.add_argument("--video", type=Path, help="a video of yours instead, of at least 17 frames")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], float(args.child[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{args.video.suffix if args.video else '.mp4'}"
        if args.video:
            path.symlink_to(args.video.resolve(strict=True))
        else:
            make_video(path)
        make_warm_up(Path(folder) / "warm.mp4")
        starts = np.random.default_rng(0).random(args.repeats)
        results = {method: [] for method in METHODS}
        for start in starts:
            for method in METHODS:
                results[method].append(measure(method, path, start))
    base = results["whole file"]
    print(f"{'':16}{'seconds':>9}{'speed':>8}{'MiB':>8}{'memory':>9}")
    for method, runs in results.items():
        seconds, mib = (statistics.median(run[key] for run in runs) for key in ("seconds", "mib"))
        speed = statistics.median(b["seconds"] / r["seconds"] for b, r in zip(base, runs, strict=True))
        memory = mib / statistics.median(run["mib"] for run in base)
        print(f"{method:16}{seconds:9.3f}{speed:7.1f}x{mib:8.0f}{memory:9.1%}")


def make_warm_up(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(FRAMES + 1):
            frame = av.VideoFrame.from_ndarray(np.full((240, 320, 3), i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()

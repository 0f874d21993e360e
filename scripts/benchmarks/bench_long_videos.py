"""Measure time and bytes of reading one random 17-frame clip from 640 x 360 H.264 files of 10 s to an hour.

    python scripts/benchmarks/bench_long_videos.py [--seconds 10 60 600 3600] [--clips 40] [--container mp4]

Each clip opens its file again, as a data worker does, on one thread. Prints medians. Bytes are those that the process
reads, from the page cache too. `index` is the first opening of a file, which reads all of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vae3d.argparse_types import positive_int

FRAMES, RATE, LOOP = 17, 24, 10  # of a clip, per second, seconds of video that are encoded once and repeated
WIDTH, HEIGHT = 640, 360


def make_loop(path: Path) -> None:
    """Write ten seconds at 2.5 Mbit/s with sound, a key frame every five seconds."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (HEIGHT // 4 + 64, WIDTH // 4 + 256, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    options = {"g": str(5 * RATE), "b": "2500k", "bf": "3", "preset": "veryfast"}
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=48000, layout="mono")
        for i in range(RATE * LOOP):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(wide[i : i + HEIGHT, 4 * i : 4 * i + WIDTH]), format="rgb24"
            )
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(video.encode(frame))
            noise = rng.standard_normal((1, 48000 // RATE)).astype(np.float32) / 9
            samples = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            samples.sample_rate = 48000
            container.mux(sound.encode(samples))
        container.mux(video.encode())
        container.mux(sound.encode())


def repeat(source: Path, target: Path, times: int) -> None:
    """Write a file's packets several times in a row."""
    with av.open(str(target), "w") as written:
        streams = None
        for turn in range(times):
            with av.open(str(source)) as read:
                streams = streams or {s.index: written.add_stream_from_template(s) for s in read.streams}
                for packet in read.demux():
                    if packet.dts is None:
                        continue
                    if packet.stream.type == "audio" and not 0 <= packet.dts * packet.time_base < LOOP - 0.1:
                        continue  # priming samples that the encoder adds at both ends
                    shift = int(turn * LOOP / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = streams[packet.stream_index]
                    written.mux(packet)


def bytes_read() -> int:
    """Bytes that this process has read by read calls."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def read_one(path: Path, start: float) -> np.ndarray:
    from vae3d.data.batches.clips import ClipSettings, read_clip
    from vae3d.data.decoding.readers import open_media

    reader = open_media(path)
    clip = read_clip(reader, str(path), ClipSettings(256, 256), FRAMES, start)
    reader.close()
    return clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive_int, nargs="+", default=[10, 60, 600, 3600])
    parser.add_argument("--clips", type=positive_int, default=40)
    parser.add_argument("--container", default="mp4", choices=["mp4", "mkv", "avi", "ts", "mpg"])
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    starts = np.random.default_rng(0).random(args.clips)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VAE3D_CACHE"] = f"{folder}/cache"
        loop = Path(folder) / "loop.mp4"
        make_loop(loop)
        read_one(loop, 0.0)  # imports and first-call costs
        print(f"{'seconds':>8}{'MB':>8}{'index s':>9}{'clip ms':>9}{'clip MB':>9}")
        for seconds in args.seconds:
            path = Path(folder) / f"{seconds}.{args.container}"
            repeat(loop, path, max(1, seconds // LOOP))
            begin = time.perf_counter()
            read_one(path, 0.0)
            index = time.perf_counter() - begin
            times, amounts = [], []
            for start in starts:
                begin, before = time.perf_counter(), bytes_read()
                read_one(path, float(start))
                times.append(time.perf_counter() - begin)
                amounts.append(bytes_read() - before)
            took, read = 1000 * statistics.median(times), statistics.median(amounts) / 1e6
            print(f"{seconds:8}{path.stat().st_size / 1e6:8.0f}{index:9.2f}{took:9.1f}{read:9.2f}", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()

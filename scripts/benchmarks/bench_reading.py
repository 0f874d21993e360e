"""Measure the time of reading a random 17-frame clip, resized to 256, from H.264, against decord and torchcodec.

    python scripts/benchmarks/bench_reading.py [--repeats 9]             # three minutes on an idle core
    python scripts/benchmarks/bench_reading.py --video mine.mp4          # a video of yours
    python scripts/benchmarks/bench_reading.py --memory [--video ...]    # against decoding the whole file, with memory
    python scripts/benchmarks/bench_reading.py --shards [--video ...]    # files and a tar, also torchvision, webdataset

Milliseconds are CPU time of this process on one thread, medians; readers take turns on the same clips, and ratios are
medians over pairs. *decord* and *torchcodec* resize as vae3d does, and their frames must be equal to vae3d's;
*decord sized* lets decord resize, whose pixels differ. Each reading opens the file, except *open again*, where the file
was read before and vae3d has kept it open. Peers that are not installed are left out. The last lines compare a random
clip of an hour with one of ten seconds.

--memory compares vae3d's readers with decoding the whole file, as torchvision's read_video and Open-Sora 1.2 do. Each
reading runs in a process of its own on one thread; the methods take turns. Prints medians.

--shards reads one random clip of each of SHARD_FILES files, one after the other. From files: vae3d, the peers, and
torchvision's read_video where torchvision still has it (up to 0.25). From a tar: vae3d by its index, and webdataset in
both ways of its users: each video is decoded whole (by its torch_video, or by PyAV where there is no read_video) and
the clip cut out, or decord or torchcodec take the clip from its bytes. All read the same clips, and the frames must be
equal. The methods take turns, in another order each round; of each the fastest of --repeats rounds counts. Prints a
table for docs/speed.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vae3d.argparse_types import positive_int

FRAMES, SIZE, RATE, SECONDS = 17, 256, 24, 10
GOAL = 1.1  # times as fast as the fastest peer
LONG_GOAL = 1.5  # of a one-hour file, times the time of a ten-second one
CASES = {  # name: height, width, frames between key frames, repetitions of the ten seconds
    "256x256, GOP 24": (256, 256, 24, 1),
    "1280x720, GOP 24": (720, 1280, 24, 1),
    "1280x720, GOP 250": (720, 1280, 250, 1),
    "320x180, 10 s": (180, 320, 24, 1),
    "320x180, 1 h": (180, 320, 24, 360),
}
SHARD_CASES = ("256x256, GOP 24", "1280x720, GOP 24", "1280x720, GOP 250")
SHARD_FILES = 4
NO_GOAL = ("320x180, 10 s", "320x180, 1 h")  # are compared with each other


def make_video(path: Path, height: int = 720, width: int = 1280, gop: int = RATE, repeats: int = 1) -> None:
    """Write ten seconds of a panned smooth pattern, `repeats` times one after the other."""
    rng = np.random.default_rng(0)
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((width + 4 * RATE * SECONDS, 2 * height), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"g": str(gop), "crf": "23", "sc_threshold": "0", "preset": "fast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for i in range(RATE * SECONDS):
            top = i * height // (RATE * SECONDS)
            view = np.ascontiguousarray(wide[top : top + height, 3 * i : 3 * i + width])
            frame = av.VideoFrame.from_ndarray(view, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            packets += stream.encode(frame)
        packets += stream.encode()
        for k in range(repeats):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                shift = round(k * SECONDS / packet.time_base)
                copy.pts, copy.dts, copy.time_base = packet.pts + shift, packet.dts + shift, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                container.mux(copy)


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
    from vae3d.data.batches.clips import ClipSettings, read_clip
    from vae3d.data.decoding.readers import open_media

    opened = open_media(path, reader)
    clip = read_clip(opened, path, ClipSettings(SIZE, SIZE), FRAMES, start)
    opened.close()
    return clip


METHODS = {
    "whole file": whole_file,
    "vae3d, pyav": lambda path, start: only_the_clip(path, start, "pyav"),
    "vae3d, decord": lambda path, start: only_the_clip(path, start, "decord"),
}


def peers(path: str) -> dict[str, Callable[[str, float], np.ndarray]]:
    """name -> reading a clip with a library that is installed, as vae3d reads it: [17, 256, 256, 3]."""
    import torch

    from vae3d.data.batches.clips import resize_crop_params
    from vae3d.data.decoding.readers import media_info, resize

    info = media_info(path)
    crop = resize_crop_params(*info.size_to_scale((SIZE, SIZE)), (SIZE, SIZE))
    found: dict[str, Callable[[str, float], np.ndarray]] = {}

    def clip(frames: np.ndarray) -> np.ndarray:
        return crop.crop(np.stack([resize(frame, crop.size) for frame in frames]))

    def first(count: int, start: float) -> int:
        return int(start * (count - FRAMES + 1))

    if importlib.util.find_spec("decord"):
        import decord

        def with_decord(path: str, start: float, **size: int) -> np.ndarray:
            video = decord.VideoReader(path, num_threads=1, **size)
            i = first(len(video), start)
            return clip(video.get_batch(range(i, i + FRAMES)).asnumpy())

        found["decord"] = with_decord
        found["decord sized"] = functools.partial(with_decord, height=crop.size[0], width=crop.size[1])
    if importlib.util.find_spec("torchcodec"):
        from torchcodec.decoders import VideoDecoder

        def with_torchcodec(path: str, start: float, mode: str) -> np.ndarray:
            video = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode, dimension_order="NHWC")
            i = first(len(video), start)
            return clip(video.get_frames_in_range(i, i + FRAMES).data.numpy())

        found["torchcodec"] = functools.partial(with_torchcodec, mode="exact")
        found["torchcodec approximate"] = functools.partial(with_torchcodec, mode="approximate")
    torch.set_num_threads(1)
    return found


def compare(path: str, repeats: int) -> dict[str, list[float]]:
    """name -> milliseconds of each reading. Raises SystemExit if a peer reads other frames."""
    from vae3d.data.decoding.kept_sources import close_kept_sources

    def ours(path: str, start: float) -> np.ndarray:
        return only_the_clip(path, start, "auto")

    others = peers(path)
    times: dict[str, list[float]] = {name: [] for name in ("vae3d", "open again", *others)}

    def timed(name: str, read: Callable[[str, float], np.ndarray], start: float) -> np.ndarray:
        begin = time.process_time()
        frames = read(path, start)
        times[name].append(1e3 * (time.process_time() - begin))
        return frames

    for read in (ours, *others.values()):
        read(path, 0.5)  # first-call costs, and the index
    for start in np.random.default_rng(0).random(repeats):
        close_kept_sources()
        expected = timed("vae3d", ours, start)
        timed("open again", ours, start)
        for name, read in others.items():
            frames = timed(name, read, start)
            if not name.endswith("sized") and not np.array_equal(frames, expected):
                raise SystemExit(f"{name} reads other frames of {path} than vae3d")
    return times


def report(case: str, times: dict[str, list[float]]) -> None:
    ours, *_ = names = list(times)
    print(f"{case}, CPU milliseconds of a clip")
    for name in names:
        ratio = statistics.median(peer / own for peer, own in zip(times[name], times[ours], strict=True))
        print(f"  {name:24}{statistics.median(times[name]):8.1f}{ratio:8.2f} times vae3d's", flush=True)
    peers = [statistics.median(p / o for p, o in zip(times[name], times[ours], strict=True)) for name in names[2:]]
    if peers:
        verdict = f", goal {GOAL} {'reached' if min(peers) >= GOAL else 'missed'}" if case not in NO_GOAL else ""
        print(f"  fastest peer / vae3d: {min(peers):.2f}{verdict}", flush=True)


def report_long(times: dict[str, dict[str, list[float]]]) -> None:
    short, long = (times.get(f"320x180, {length}") for length in ("10 s", "1 h"))
    if not short or not long:
        return
    print("a clip of one hour / of ten seconds")
    for name in short:
        ratio = statistics.median(long[name]) / statistics.median(short[name])
        goal = f", goal {LONG_GOAL} {'reached' if ratio <= LONG_GOAL else 'missed'}" if name == "vae3d" else ""
        print(f"  {name:24}{ratio:8.2f}{goal}")


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
    parser.add_argument("--memory", action="store_true", help="compare with decoding the whole file")
    parser.add_argument("--shards", action="store_true", help="files and a tar, also with torchvision and webdataset")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this text in their name, as 320x180")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], float(args.child[2]))
        return
    if args.video and not args.video.is_file():
        parser.error(f"--video {args.video}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            compare_memory(Path(folder), args.video, args.repeats)
            return
        if args.shards:
            compare_shards(Path(folder), args.video, args.repeats, args.only)
            return
        if args.video:
            report(args.video.name, compare(str(args.video), args.repeats))
            return
        cases = {case: shape for case, shape in CASES.items() if args.only in case}
        if not cases:
            parser.error(f"--only {args.only}: is in none of {', '.join(CASES)}")
        times = {}
        for number, (case, shape) in enumerate(cases.items()):
            path = Path(folder) / f"{number}.mp4"
            make_video(path, *shape)
            times[case] = compare(str(path), args.repeats)
            report(case, times[case])
        report_long(times)


def compare_memory(folder: Path, video: Path | None, repeats: int) -> None:
    """Print time and memory of each of METHODS."""
    path = folder / f"clip{video.suffix if video else '.mp4'}"
    if video:
        path.symlink_to(video.resolve(strict=True))
    else:
        make_video(path)
    make_warm_up(folder / "warm.mp4")
    starts = np.random.default_rng(0).random(repeats)
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


# --- files and shards

Clip = np.ndarray  # [17, height, width, 3] uint8, at the size of the file
Method = Callable[
    [list[Path], Path, list[int]], Iterator[Clip]
]  # clips that begin at given frames, of files and their tar


def compare_shards(folder: Path, video: Path | None, repeats: int, only: str) -> None:
    """Print a table of the CPU milliseconds of a clip, of each method and kind of file."""
    columns: dict[str, dict[str, Cost]] = {}
    for case in [video.name] if video else [case for case in SHARD_CASES if only in case]:
        paths = [folder / f"{len(columns)}-{i}{video.suffix if video else '.mp4'}" for i in range(SHARD_FILES)]
        if video:
            shutil.copy(video, paths[0])
        else:
            make_video(paths[0], *CASES[case])
        for path in paths[1:]:
            shutil.copy(paths[0], path)
        shard = folder / f"{len(columns)}.tar"
        with tarfile.open(shard, "w") as tar:
            for path in paths:
                tar.add(path, path.name)
        columns[case] = measure_shards(paths, shard, repeats)
    if not columns:
        raise SystemExit(f"--only {only}: is in none of {', '.join(SHARD_CASES)}")
    print_shards(columns)


@dataclass
class Cost:
    """Milliseconds and bytes of a clip."""

    cpu: float = math.inf
    wall: float = math.inf
    read: float = 0.0


def measure_shards(paths: list[Path], shard: Path, repeats: int) -> dict[str, Cost]:
    """The cost of a clip of each method: that of its fastest round."""
    import torch

    from vae3d.data.batches.clips import resize_crop_params
    from vae3d.data.decoding.kept_sources import close_kept_sources
    from vae3d.data.decoding.readers import media_info, resize

    torch.set_num_threads(1)
    info = media_info(paths[0])
    crop = resize_crop_params(*info.size_to_scale((SIZE, SIZE)), (SIZE, SIZE))
    methods = shard_methods(Fraction(info.fps).limit_denominator(1001))
    costs = {name: Cost() for name in methods}
    draws = (np.arange(len(paths)) + np.random.default_rng(0).random(len(paths))) / len(paths)  # spread over the file
    starts = (draws * (info.num_frames - FRAMES + 1)).astype(int).tolist()
    expected: list[np.ndarray] = []
    names = list(methods)
    for number in range(repeats + 1):  # the first round makes the indexes, and is not counted
        for name in names[number % len(names) :] + names[: number % len(names)]:
            close_kept_sources()
            clips, cost = [], costs[name]
            before, wall, cpu = bytes_read(), time.perf_counter(), time.process_time()
            for clip in methods[name](paths, shard, starts):
                resized = clip if name.startswith("vae3d") else [resize(frame, crop.size) for frame in clip]
                clips.append(crop.crop(np.stack(resized)))
            if number:
                cost.cpu = min(cost.cpu, 1e3 * (time.process_time() - cpu) / len(paths))
                cost.wall = min(cost.wall, 1e3 * (time.perf_counter() - wall) / len(paths))
                cost.read = (bytes_read() - before) / len(paths)
            expected = expected or clips
            if len(clips) != len(paths) or not all(map(np.array_equal, clips, expected)):
                raise SystemExit(f"{name} reads other frames than vae3d")
    return costs


def bytes_read() -> int:
    """Bytes that this process has asked the system for; 0 where they are not counted."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def shard_methods(rate: Fraction) -> dict[str, Method]:
    """Those whose libraries are installed; prints what is left out. rate: frames per second of the files."""
    import webdataset as wds

    from vae3d.data.batches.clips import resize_crop_params
    from vae3d.data.decoding.readers import open_media
    from vae3d.data.storage.paths import member_path

    def ours(path: str | Path, start: int) -> np.ndarray:
        with closing(open_media(path)) as reader:
            crop = resize_crop_params(*reader.info.size_to_scale((SIZE, SIZE)), (SIZE, SIZE))
            return reader.read(range(start, start + FRAMES), crop.size)

    def members(shard: Path) -> list[str]:
        with tarfile.open(shard) as tar:
            return [member_path(str(shard), member.offset_data, member.size, member.name) for member in tar]

    index = functools.cache(members)  # a table has it
    found: dict[str, Method] = {
        "vae3d, files": lambda paths, shard, starts: map(ours, paths, starts),
        "vae3d, tar": lambda paths, shard, starts: map(ours, index(shard), starts),
    }

    def each(read: Callable[[Path, int], Clip]) -> Method:
        return lambda paths, shard, starts: map(read, paths, starts)

    def from_tar(read: Callable[[bytes, int], Clip]) -> Method:
        def method(paths: list[Path], shard: Path, starts: list[int]) -> Iterator[Clip]:
            for sample, start in zip(wds.WebDataset(str(shard), shardshuffle=False), starts, strict=True):
                yield read(next(value for name, value in sample.items() if not name.startswith("__")), start)

        return method

    def decoded_in_tar(decoder: Callable[[str, bytes], Any]) -> Method:
        def method(paths: list[Path], shard: Path, starts: list[int]) -> Iterator[Clip]:
            samples = wds.WebDataset(str(shard), shardshuffle=False).decode(decoder)
            for sample, start in zip(samples, starts, strict=True):
                video = next(value for name, value in sample.items() if not name.startswith("__"))
                video = video[0] if isinstance(video, tuple) else video
                yield np.asarray(video[start : start + FRAMES])

        return method

    if importlib.util.find_spec("decord"):
        import decord

        def with_decord(source: Any, start: int) -> Clip:
            video = decord.VideoReader(source, num_threads=1)
            return video.get_batch(range(start, start + FRAMES)).asnumpy()

        found["decord, files"] = each(lambda path, start: with_decord(str(path), start))
        found["webdataset, decord"] = from_tar(lambda content, start: with_decord(io.BytesIO(content), start))
    else:
        print("decord is not installed")
    if importlib.util.find_spec("torchcodec"):
        from torchcodec.decoders import VideoDecoder

        def with_torchcodec(source: Any, start: int) -> Clip:
            video = VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC")
            return video.get_frames_in_range(start, start + FRAMES).data.numpy()

        found["torchcodec, files"] = each(lambda path, start: with_torchcodec(str(path), start))
        found["webdataset, torchcodec"] = from_tar(with_torchcodec)
    else:
        print("torchcodec is not installed")
    try:
        from torchvision.io import read_video
    except ImportError:
        print(f"torchvision {importlib.metadata.version('torchvision')} has no read_video; PyAV decodes whole files")
        found["webdataset, whole videos"] = decoded_in_tar(whole_video)
    else:

        def with_torchvision(path: Path, start: int) -> Clip:
            first, last = start / rate, (start + FRAMES - 1) / rate  # exact: a little earlier gives one frame more
            return read_video(str(path), first, last, pts_unit="sec")[0].numpy()

        found["torchvision, files"] = each(with_torchvision)
        found["torchvision, whole files"] = each(
            lambda path, start: read_video(str(path), pts_unit="sec")[0][start : start + FRAMES].numpy()
        )
        found["webdataset, whole videos"] = decoded_in_tar(wds.torch_video)
    return found


def whole_video(name: str, content: bytes) -> np.ndarray | None:
    """A decoder of webdataset: all frames of a video."""
    if not name.endswith(".mp4"):
        return None
    with av.open(io.BytesIO(content)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def print_shards(columns: dict[str, dict[str, Cost]]) -> None:
    """A table in Markdown, and what it was measured with."""
    from vae3d.commands.bench_data import machine
    from vae3d.data.workers import processor_count

    here = machine(processor_count(), ("torch", "av", "decord", "torchcodec", "torchvision", "webdataset"))
    versions = ", ".join(f"{package} {version}" for package, version in here["versions"].items())
    print(f"{here['processor']}, one thread, {versions}\n")
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        cells = []
        for costs in columns.values():
            base = costs["vae3d, tar" if name.startswith("webdataset") else "vae3d, files"]
            cost, ratio = costs[name], costs[name].cpu / base.cpu
            cells.append(f"{cost.cpu:.1f} ms, {ratio:.2f}x (wall {cost.wall:.1f}), {cost.read / 1e6:.2f} MB")
        print(f"| {name} | " + " | ".join(cells) + " |")


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

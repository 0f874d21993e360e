"""Time until a page of many videos can be used, and the memory of the browser's process that shows it, also while a
large clip plays.

    python scripts/benchmarks/bench_page.py --videos 1000

Needs playwright and a Chromium of the system. Makes a few clips and gives them to all videos.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vae3d.argparse_types import positive_int
from vae3d.report.page import Chapter, Metric, Report, Video, encode_clip, write_clip, write_page

METRICS = {
    name: Metric(name.upper(), "higher" if name in ("psnr", "ssim") else "lower", f"Meaning of {name}.")
    for name in ("psnr", "ssim", "lpips", "dists", "flicker", "temporal", "ghosting", "sharpness")
}
SCROLL = """(async () => {
    const box = document.querySelector(".videos-box");
    for (box.scrollTop = 0; box.scrollTop + box.clientHeight < box.scrollHeight - 1; box.scrollTop += 400) {
        await new Promise(requestAnimationFrame);
    }
})()"""
SECONDS, MEGABYTES = 2.0, 300.0  # more than this is too much


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=positive_int, default=1000)
    parser.add_argument("--reconstructions", type=positive_int, default=3)
    parser.add_argument("--runs", type=positive_int, default=3)
    return parser.parse_args()


def write(folder: Path, videos: int, reconstructions: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"rec{index}" for index in range(reconstructions)]
    ramp = np.linspace(0, 255, 192).astype(np.uint8)
    original = np.stack([np.roll(np.broadcast_to(ramp[None, :, None], (108, 192, 3)), 8 * t, 1) for t in range(24)])
    curves = {name: {metric: [*rng.random(24)] for metric in METRICS} for name in names}
    clip = encode_clip([original], {name: [255 - original] for name in names}, 24)
    rows = []
    for index in range(videos):
        id = f"video{index:05d}"
        write_clip(folder, id, clip, curves)
        scores = {name: dict(zip(METRICS, map(float, rng.random(len(METRICS))), strict=True)) for name in names}
        rows.append(Video(id, f"some/folder/{id}.mp4", scores, {"codec": "h264"}, {"original": f"ori/{id}.mp4"}))
    write_page(folder, Report("Many videos", [Chapter("Videos", "", names, METRICS, rows, "psnr")]))


def write_large(folder: Path, reconstructions: int) -> None:
    """A page of one video of 640 x 360, 48 frames."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (360 // 8, 640 // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    original = np.stack([np.roll(first, 3 * t, 1) for t in range(48)])
    names = [f"rec{index}" for index in range(reconstructions)]
    write_clip(folder, "large", encode_clip([original], {name: [255 - original] for name in names}, 24))
    write_page(folder, Report("A large video", [Chapter("Videos", "", names, METRICS, [Video("large", "large.mp4")])]))


def measure_playing(page_file: Path, seconds: int = 12) -> tuple[float, float]:
    """Megabytes of the renderer before a clip plays, and at most while it does."""
    with opened_page(page_file) as page:
        before = renderer_megabytes()
        page.keyboard.press("Space")
        page.wait_for_selector(".player.playing")
        playing = []
        for _ in range(2 * seconds):
            page.wait_for_timeout(500)
            playing.append(renderer_megabytes())
    return before, max(playing)


@contextmanager
def opened_page(page_file: Path) -> Iterator[Any]:
    """The page in a new browser, when its first picture stands."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no chromium on the PATH")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(page_file.as_uri(), wait_until="commit")
        page.wait_for_selector(".player:not(.loading) .frame")
        yield page
        browser.close()


def measure(page_file: Path, runs: int) -> tuple[list[float], list[tuple[float, float, float]]]:
    """Seconds until the first picture stands and the page answers; megabytes of the renderer at first, after ten videos
    were opened and the table was scrolled, and then without the caches that Chromium drops when memory gets short."""
    seconds, megabytes = [], []
    for _ in range(runs):
        with opened_page(page_file) as page:
            # The frame after the main thread is free again: the page answers.
            ready = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"
            seconds.append(page.evaluate(ready) / 1000)
            page.wait_for_timeout(1000)
            first = renderer_megabytes()
            for _ in range(10):
                page.keyboard.press("n")
                page.wait_for_timeout(150)
            page.evaluate(SCROLL)
            page.wait_for_timeout(1000)
            later = renderer_megabytes()
            session = page.context.new_cdp_session(page)
            session.send("Memory.simulatePressureNotification", {"level": "critical"})
            page.wait_for_timeout(1000)
            megabytes.append((first, later, renderer_megabytes()))
    return seconds, megabytes


def renderer_megabytes() -> float:
    """USS of the largest renderer that this process started."""
    sizes = [0]
    for process in psutil.Process().children(recursive=True):
        try:
            if "--type=renderer" in " ".join(process.cmdline()):
                sizes.append(process.memory_full_info().uss)
        except psutil.Error:  # it ended
            continue
    if max(sizes) == 0:
        raise RuntimeError("no renderer was found")
    return max(sizes) / 1e6


def main() -> int:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.videos, args.reconstructions)
        index = Path(folder) / "index.html"
        seconds, megabytes = measure(index, args.runs)
        size = index.stat().st_size / 1e6
        large = Path(folder) / "large"
        write_large(large, args.reconstructions)
        before, playing = measure_playing(large / "index.html")
    print(f"{args.videos} videos, {args.reconstructions} reconstructions, index.html {size:.1f} MB, {args.runs} runs")
    print(f"until it can be used: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    first, later, purged = map(max, zip(*megabytes, strict=True))
    print(f"memory of the page's process: {first:.0f} MB; after ten videos and all rows: {later:.0f} MB")
    print(f"without caches that Chromium drops when memory gets short: {purged:.0f} MB")
    print(f"a clip of 640 x 360: {before:.0f} MB before it plays, at most {playing:.0f} MB while it does")
    return int(statistics.median(seconds) > SECONDS or max(later, playing) > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())

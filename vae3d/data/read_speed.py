"""Reading random clips in worker processes against the clock, for bench-data."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any

from vae3d.errors import UserError

# Functions import what takes long (torch, pandas, PyAV), so that --help and a wrong flag are answered at once.
if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    from vae3d.data.batches.clips import ClipSettings
    from vae3d.data.table.segments import Bounds

PROCESS_IO = Path("/proc/self/io")
WAIT = 300.0  # seconds that workers wait for each other before the clock starts


@dataclass(frozen=True)
class File:
    """A row of a table. bounds: of the part of the file in seconds."""

    path: str
    bounds: Bounds


@dataclass(frozen=True)
class Opening:
    """Clips that are read from one opening of a file. starts: places of the clips, as fractions in [0, 1)."""

    file: File
    starts: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """What one worker reads. frames: of a clip. cold: drop files from the system's memory first."""

    openings: tuple[Opening, ...]
    settings: ClipSettings
    frames: int
    cold: bool


@dataclass
class Measured:
    """Of one worker, or of all. Times in seconds; resize: None where it is a part of decoding. bytes_read: None where
    the system does not count them; disk_bytes: those that were not in its memory."""

    begin: float
    end: float
    clips: int
    cpu: float
    open: float
    read: float
    resize: float | None
    bytes_read: int | None
    disk_bytes: int | None


def plan(files: Sequence[File], workers: int, clips: int, clips_per_file: int) -> list[tuple[Opening, ...]]:
    """What each worker reads. All together read at least `clips` clips, of all files in turn, at places that depend on
    nothing else."""
    import numpy as np

    openings = []
    for number in range(-(-clips // clips_per_file)):
        draws = np.random.default_rng([0, number]).random(clips_per_file)
        starts = (np.arange(clips_per_file) + draws) / clips_per_file
        openings.append(Opening(files[number % len(files)], tuple(starts.tolist())))
    return [tuple(openings[worker::workers]) for worker in range(workers)]


def measure(shares: Sequence[tuple[Opening, ...]], settings: ClipSettings, frames: int, cold: bool) -> Measured:
    """Read each share in a process of its own, all at once. Raises MediaError, and UserError if a process dies."""
    from vae3d.data.decoding.readers import decodes_on_gpu

    context = multiprocessing.get_context("spawn" if decodes_on_gpu(settings.reader) else None)
    with context.Manager() as manager, ProcessPoolExecutor(len(shares), mp_context=context) as pool:
        barrier = manager.Barrier(len(shares))
        work = [pool.submit(read_openings, Work(share, settings, frames, cold), barrier) for share in shares]
        try:
            failed = [error for future in work if (error := future.exception()) is not None]
            for error in sorted(failed, key=lambda error: isinstance(error, BrokenBarrierError)):
                raise error
            parts = [future.result() for future in work]
        except BrokenProcessPool as error:
            raise UserError(
                f"reader={settings.reader} crashed in a worker, or there was no memory for it; vae3d "
                "check-data finds a file that crashes PyAV"
            ) from error
    return Measured(
        min(part.begin for part in parts),
        max(part.end for part in parts),
        *(_total([getattr(part, name) for part in parts]) for name in ("clips", "cpu", "open", "read", "resize")),
        *(_total([getattr(part, name) for part in parts]) for name in ("bytes_read", "disk_bytes")),
    )


def _total(values: Sequence[Any]) -> Any:
    return None if None in values else sum(values)


# --- in a worker process


def read_openings(work: Work, barrier: Barrier) -> Measured:
    """Read clips in this process, from the moment on when all workers are ready. Raises MediaError."""
    import torch

    from vae3d.data.batches.clips import open_frames, read_clips
    from vae3d.data.decoding.kept_sources import close_kept_sources
    from vae3d.data.storage.files import local_range

    torch.set_num_threads(1)  # as in workers of a DataLoader
    ready = False
    try:
        _read(work, work.openings[0], open_frames, read_clips)  # first-call costs
        ready = True
    finally:
        if not ready:
            barrier.abort()  # the others stop waiting
    opened = read = 0.0
    barrier.wait(WAIT)
    io, cpu, begin = _io(), time.process_time(), time.monotonic()
    for opening in work.openings:
        close_kept_sources()  # a data set has more files than are kept open
        if work.cold:
            drop_from_memory(local_range(opening.file.path).file)
        seconds = _read(work, opening, open_frames, read_clips)
        opened, read = opened + seconds[0], read + seconds[1]
    end, cpu, after = time.monotonic(), time.process_time() - cpu, _io()
    return Measured(
        begin,
        end,
        sum(len(opening.starts) for opening in work.openings),
        cpu,
        opened,
        read,
        _resize_seconds(work),
        *(None if io is None or after is None else after[name] - io[name] for name in ("rchar", "read_bytes")),
    )


def _read(work: Work, opening: Opening, open_frames: Any, read_clips: Any) -> tuple[float, float]:
    """Seconds of opening a file, and of reading its clips."""
    file, count = opening.file, len(opening.starts)
    begin = time.perf_counter()
    with closing(open_frames(file.path, work.settings, file.bounds)) as reader:
        opened = time.perf_counter()
        read_clips(reader, file.path, work.settings, [work.frames] * count, opening.starts, [None] * count)
        return opened - begin, time.perf_counter() - opened


def _resize_seconds(work: Work) -> float | None:
    """Seconds that the clips' frames took to resize, from one frame of each file."""
    from vae3d.data.batches.clips import open_frames, resize_crop_params
    from vae3d.data.decoding.readers import decodes_on_gpu, is_image, resize

    target, seconds, known = (work.settings.height, work.settings.width), 0.0, {}
    for opening in work.openings:
        file = opening.file
        if is_image(file.path) or decodes_on_gpu(work.settings.reader):
            return None
        if file not in known:
            with closing(open_frames(file.path, work.settings, file.bounds)) as reader:
                crop = resize_crop_params(*reader.info.size_to_scale(target), target)
                frame = reader.read([reader.info.num_frames // 2])[0]
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                resize(frame, crop.size)
                times.append(time.perf_counter() - begin)
            known[file] = min(times)
        seconds += known[file] * work.frames * len(opening.starts)
    return seconds


def _io() -> dict[str, int] | None:
    """This process's counters of bytes; None where there are none."""
    try:
        lines = PROCESS_IO.read_text().splitlines()
    except OSError:
        return None
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}


def drop_from_memory(path: str | Path) -> None:
    """Drop the pages of a local file from the system's memory, so that the next reader waits for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)

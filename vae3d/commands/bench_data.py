"""Measure how fast clips are read from your files, and how many cores would feed your GPUs:

    vae3d bench-data videos.csv
    vae3d bench-data videos/ --size 256x256 512x512 --workers 1 8 --gpus 8 --batch 4 --step_seconds 0.6

PATHS are files, folders, tables and all else that training reads. Random clips are read as training reads them, by each
reader that is installed, at each size, by each number of worker processes.

  clips/s      of all workers together
  per core     clips per second of CPU time
  CPU ms       CPU time of a clip, all threads
  read         bytes that the process asks the system for, per clip, in memory already or not (Linux)
  open, decode, resize
               shares of the time of a clip. decode: with the conversion to RGB. Resizing is timed on one frame of each
               file. Of images and of torchcodec_cuda it is a part of decoding.

All rows read the same clips. Every clip opens its file (--clips_per_file N: every N-th). The files were opened before,
so the system has them in its memory if they fit. --cold drops each from there before it is read, and also shows what
comes from the disk (Linux). Objects of a store are in the local cache by then; its first reading fetches each whole.

Files that cannot be read are listed as vae3d check-data lists them. Exit status: 1 if there are any, 2 if
nothing could be measured.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae3d.argparse_types import Parser, height_and_width, non_negative_int, positive_float, positive_int
from vae3d.data.read_speed import File, Measured, measure, plan
from vae3d.errors import UserError, printable
from vae3d.text import plural, significant

# Functions import what takes long (torch, pandas, PyAV), so that --help and a wrong flag are answered at once.
if TYPE_CHECKING:
    from vae3d.data.batches.clips import ClipSettings
    from vae3d.data.media import MediaInfo

READER_NAMES = ("pyav", "decord", "torchcodec", "torchcodec_cuda")
WIDTH = 16  # of a column of names


@dataclass(frozen=True)
class Row:
    """A line of the result. open, decode, resize: shares of a clip's time; resize: None where decoding includes it."""

    reader: str
    height: int
    width: int
    workers: int
    files: int
    clips: int
    seconds: float
    clips_per_second: float
    clips_per_core_second: float
    cpu_seconds_per_clip: float
    bytes_per_clip: float | None
    disk_bytes_per_clip: float | None
    open: float
    decode: float
    resize: float | None


@dataclass(frozen=True)
class Need:
    """What feeds the GPUs, by the row of a reader and size with the most workers. workers: of all GPUs together."""

    reader: str
    height: int
    width: int
    clips_per_second: float
    cores: float
    workers: int
    bytes_per_second: float | None


# --- what was measured


def row_of(settings: ClipSettings, workers: int, files: int, found: Measured) -> Row:
    seconds, total = found.end - found.begin, found.open + found.read
    resize = None if found.resize is None else min(found.resize, found.read)
    return Row(
        settings.reader,
        settings.height,
        settings.width,
        workers,
        files,
        found.clips,
        seconds,
        clips_per_second=found.clips / seconds,
        clips_per_core_second=found.clips / max(found.cpu, 1e-9),
        cpu_seconds_per_clip=found.cpu / found.clips,
        bytes_per_clip=None if found.bytes_read is None else found.bytes_read / found.clips,
        disk_bytes_per_clip=None if found.disk_bytes is None else found.disk_bytes / found.clips,
        open=found.open / total,
        decode=(found.read - (resize or 0.0)) / total,
        resize=None if resize is None else resize / total,
    )


def needs_of(rows: Sequence[Row], clips_per_second: float) -> list[Need]:
    """Cores, workers and bytes per second for so many clips per second, of each reader and size."""
    largest: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        key = row.reader, row.height, row.width
        if key not in largest or row.workers > largest[key].workers:
            largest[key] = row
    return [
        Need(
            *key,
            clips_per_second,
            cores=clips_per_second * row.cpu_seconds_per_clip,
            workers=math.ceil(clips_per_second / (row.clips_per_second / row.workers)),
            bytes_per_second=None if row.bytes_per_clip is None else row.bytes_per_clip * clips_per_second,
        )
        for key, row in largest.items()
    ]


# --- the files and readers


def list_files(paths: Sequence[str], root: str | None, limit: int) -> tuple[list[File], list[str]]:
    """At most `limit` rows of what PATHS list, drawn at random but always the same, and lines for invalid rows.

    limit: 0 for all. Raises UserError.
    """
    import numpy as np
    import pandas as pd

    from vae3d.data.sources.open_source import open_source
    from vae3d.data.table.segments import bounds_of

    files, errors = [], []
    for path in paths:
        table = open_source(path, root).table()
        bounds = bounds_of(table)
        for i, (row, file, error) in enumerate(zip(table["row"], table["path"], table["error"], strict=True)):
            if pd.notna(error):
                errors.append(printable(f"row {row}: {file}: {error}"))
            else:
                files.append(File(file, bounds[i]))
    chosen = np.random.default_rng(0).permutation(len(files))[: limit or None]
    return [files[i] for i in sorted(chosen)], errors


def readable(files: Sequence[File], workers: int) -> tuple[dict[File, MediaInfo], list[str]]:
    """The files that PyAV decodes, with their metadata, and lines for the others. Also makes their indexes."""
    from vae3d.commands.check_data import examine_all

    results = examine_all([file.path for file in files], [file.bounds for file in files], False, workers)
    good = {file: info for file, info in zip(files, results, strict=True) if not isinstance(info, str)}
    bad = [f"{file.path}: {info}" for file, info in zip(files, results, strict=True) if isinstance(info, str)]
    return good, [printable(line) for line in bad]


def long_enough(files: dict[File, MediaInfo], settings: ClipSettings, frames: int) -> list[File]:
    """Those that give a clip of so many frames."""
    from vae3d.data.decoding.readers import open_media
    from vae3d.data.media import MediaError
    from vae3d.data.table.segments import Segment

    found = []
    for file, info in files.items():
        count = info.num_frames
        if not all(map(math.isnan, file.bounds)):
            try:
                with closing(Segment(open_media(file.path), file.path, file.bounds)) as part:
                    count = part.info.num_frames
            except MediaError:  # cannot be: check has opened it
                continue
        if settings.length(count, info.fps) >= frames:
            found.append(file)
    return found


def installed_readers(chosen: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The readers that work here, and lines for those that do not. Raises UserError for a chosen one of these."""
    from vae3d.data.decoding.readers import check_reader

    found, notes = [], []
    for reader in chosen or READER_NAMES:
        try:
            check_reader(reader)
        except UserError as error:
            if chosen:
                raise
            notes.append(f"not measured: {error}")
        else:
            found.append(reader)
    return found, notes


def opened_by(files: Sequence[File], settings: ClipSettings) -> tuple[list[File], list[str]]:
    """The files that a reader opens, and lines for those that it refuses."""
    from vae3d.data.batches.clips import open_frames
    from vae3d.data.media import MediaError

    found, refused = [], []
    for file in files:
        try:
            open_frames(file.path, settings, file.bounds).close()
        except MediaError as error:
            refused.append(printable(f"{settings.reader}: {file.path}: {error.reason_for(file.path)}"))
        else:
            found.append(file)
    return found, refused


# --- the command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("bench-data", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATHS", help="files, folders, tables, JSON lists, datasets")
    parser.add_argument("--root", help="folder of relative paths; default: the table's folder")
    parser.add_argument("--reader", nargs="+", choices=READER_NAMES, help="default: all that are installed")
    parser.add_argument(
        "--size",
        nargs="+",
        type=height_and_width,
        default=[(256, 256)],
        metavar="HxW",
        help="of clips; default: 256x256",
    )
    parser.add_argument("--frames", type=positive_int, default=17, help="of a clip; default: 17")
    parser.add_argument("--stride", type=positive_int, default=1, help="take every n-th frame")
    parser.add_argument("--workers", nargs="+", type=positive_int, help="processes; default: 1, and one per processor")
    parser.add_argument("--clips", type=positive_int, help="clips of a row; default: 64, or 4 per worker")
    parser.add_argument("--clips_per_file", type=positive_int, default=1, help="as data.clips_per_file; default: 1")
    parser.add_argument("--files", type=non_negative_int, default=32, help="rows to draw; 0: all; default: 32")
    parser.add_argument("--cold", action="store_true", help="drop each file from the system's memory before it is read")
    parser.add_argument("--gpus", type=positive_int, default=1, help="GPUs to feed; default: 1")
    parser.add_argument("--batch", type=positive_int, help="clips of a step on each GPU")
    parser.add_argument("--step_seconds", type=positive_float, help="that a GPU takes for a step")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures here")
    args = parser.parse_args(argv)
    if (args.batch is None) != (args.step_seconds is None):
        parser.error("--batch and --step_seconds go together")
    if args.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold: this system cannot drop files from its memory")
    return args


def main(args: argparse.Namespace) -> int:
    """Measure, and print the table. Returns the exit status. Raises UserError."""
    from vae3d.data.batches.clips import ClipSettings
    from vae3d.data.storage.paths import is_stored
    from vae3d.data.workers import processor_count
    from vae3d.io import check_output_file, write_json

    if args.json:
        check_output_file(args.json, "--json")
    readers, notes = installed_readers(args.reader)
    listed, errors = list_files(args.paths, args.root, args.files)
    processors = processor_count()
    good, bad = readable(listed, min(processors, 8))
    base = ClipSettings(*args.size[0], stride=args.stride)
    files = long_enough(good, base, args.frames)
    errors += bad
    for line in errors:
        print(line)
    if not files:
        if good:
            raise UserError(f"no readable file has the {plural(args.frames, 'frame')} of a clip; lower --frames")
        raise UserError("no file can be read")
    if args.cold and (
        other := [file.path for file in files if not (is_stored(file.path) or os.path.isfile(file.path))]
    ):
        raise UserError(f"--cold: {other[0]} is not one file")
    if len(files) < len(good):
        notes.append(f"{len(good) - len(files)} of {len(good)} files have fewer frames than a clip, and are not read")
    print(f"{plural(len(files), 'file')}, clips of {plural(args.frames, 'frame')}, {plural(processors, 'processor')}")
    print(_header(args.cold), flush=True)
    counts = sorted(set(args.workers or (1, processors)))
    clips = args.clips or max(64, 4 * counts[-1] * args.clips_per_file)
    if clips < counts[-1] * args.clips_per_file:
        raise UserError(f"--clips {clips} are too few for {plural(counts[-1], 'worker')}; use 4 per worker, or more")
    opened = {reader: opened_by(files, replace(base, reader=reader)) for reader in readers}
    notes += [line for _, refused in opened.values() for line in refused]
    rows: list[Row] = []
    for height, width in dict.fromkeys(args.size):
        for reader, (usable, _) in opened.items():
            settings = replace(base, height=height, width=width, reader=reader)
            for workers in counts if usable else ():
                shares = plan(usable, workers, clips, args.clips_per_file)
                rows.append(row_of(settings, workers, len(usable), measure(shares, settings, args.frames, args.cold)))
                print(_line(rows[-1], args.cold), flush=True)
    for line in notes:
        print(line)
    if not rows:
        raise UserError("no reader opens any of the files")
    needs = needs_of(rows, args.gpus * args.batch / args.step_seconds) if args.batch else []
    for line in _need_lines(needs, args):
        print(line)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "command")}
        result = {"settings": settings, "machine": machine(processors), "rows": list(map(asdict, rows))}
        write_json(args.json, result | {"needs": list(map(asdict, needs)), "errors": errors, "notes": notes})
        print(f"wrote {args.json}")
    return 1 if errors else 0


def machine(processors: int, packages: Sequence[str] = ("torch", "av", "decord", "torchcodec")) -> dict[str, Any]:
    """Processors of this process and their name, and versions of packages that are installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"processor": next(names, platform.machine()), "processors": processors, "versions": versions}


def _header(cold: bool) -> str:
    names = ["size", "workers", "clips/s", "per core", "CPU ms", "read", *(["disk"] if cold else [])]
    return f"{'reader':{WIDTH}}" + "".join(f"{name:>10}" for name in [*names, "open", "decode", "resize"])


def _line(row: Row, cold: bool) -> str:
    sizes = [row.bytes_per_clip, *([row.disk_bytes_per_clip] if cold else [])]
    cells = [
        f"{row.height}x{row.width}",
        str(row.workers),
        f"{row.clips_per_second:.1f}",
        f"{row.clips_per_core_second:.1f}",
        f"{1e3 * row.cpu_seconds_per_clip:.1f}",
        *("-" if size is None else f"{size / 1e6:.2f} MB" for size in sizes),
        *("-" if share is None else f"{share:.0%}" for share in (row.open, row.decode, row.resize)),
    ]
    return f"{row.reader:{WIDTH}}" + "".join(f"{cell:>10}" for cell in cells)


def _need_lines(needs: Sequence[Need], args: argparse.Namespace) -> list[str]:
    if not needs:
        return []
    rate = significant(needs[0].clips_per_second, 4)
    clips = plural(args.batch, "clip")
    lines = [f"{plural(args.gpus, 'GPU')} x {clips} in {args.step_seconds:g} s: {rate} clips/s need"]
    for need in needs:
        read = need.bytes_per_second
        traffic = "" if read is None else f", {significant(read / 1e6, 4)} MB/s of files"
        workers = f"{plural(need.workers, 'worker')} ({math.ceil(need.workers / args.gpus)} per GPU)"
        size = f"{need.height}x{need.width}"
        lines.append(f"{need.reader:{WIDTH}}{size:>10}  {plural(math.ceil(need.cores), 'core')}, {workers}{traffic}")
    return lines

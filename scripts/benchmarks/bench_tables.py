"""Measure what a table of a run costs, at 100,000, 1,000,000 and 10,000,000 rows: time, memory and disk.

    python scripts/benchmarks/bench_tables.py                       # five minutes on two idle cores, 4 GB of disk
    python scripts/benchmarks/bench_tables.py 1000000 --kinds csv parquet jsonl hf folder

Per table: *prepare* is the first start of all, which reads the whole table; *start* a later one, from the source to the
first clip's index, with the data's fingerprint compared to a checkpoint's. Each runs in a new process, as a rank; its
memory is what it has more than before it opened the table: RSS (all pages that it has mapped, of which ranks and
workers share those of the file), USS (its own alone) and anonymous memory (what no file holds). *peak* is the highest
of the first start, over a process that has only imported the same. *worker* is what a forked worker process has more
after it looked up 1,000 clips. Seconds are wall time, and CPU time of the process and its children; microseconds are
CPU time, of a step of 8 clips and of a clip's path.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from vae3d.argparse_types import positive_int

MIB = 2**20
DRAWS = 1000
CLIPS_PER_FILE = 20  # of a JSON list, whose files must exist
KINDS = ("csv", "parquet", "jsonl", "hf", "folder")


def write_source(folder: Path, kind: str, rows: int) -> Path:
    """A source of videos with their metadata, or of images: a table, whose files do not exist; a JSON list of clips of
    empty files; parquet files of a Hugging Face dataset; a folder of empty images. Returns its path."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / {"hf": "dataset", "folder": "images"}.get(kind, f"videos.{kind}")
    writer = None
    for first in range(0, rows, 500_000):
        numbers = np.arange(first, min(first + 500_000, rows))
        files = numbers // CLIPS_PER_FILE if kind == "jsonl" else numbers
        names = [f"videos/{i // 1000:05}/clip_{i:08}.{'png' if kind == 'folder' else 'mp4'}" for i in files.tolist()]
        table = pd.DataFrame({
            "path": names,
            "num_frames": 17 + numbers * 7919 % 200,
            "height": np.where(numbers % 3, 720, 1080),
            "width": np.where(numbers % 3, 1280, 1920),
            "fps": np.where(numbers % 5, 24.0, 29.97),
        })  # fmt: skip
        if kind in ("jsonl", "folder"):
            make_files(path if kind == "folder" else folder, dict.fromkeys(names))
        if kind == "csv":
            table.to_csv(path, mode="a", header=first == 0, index=False)
        elif kind == "jsonl":
            listed = table.drop(columns=["height", "width"]).rename(columns={"num_frames": "frames"})
            listed.to_json(path, orient="records", lines=True, mode="a")
        elif kind == "hf":
            path.mkdir(exist_ok=True)
            image = pa.array([{"bytes": name.encode(), "path": f"{i}.png"} for i, name in enumerate(names)])
            label = pa.array(numbers % 1000)
            pq.write_table(pa.table({"image": image, "label": label}), path / f"train-{first:08}.parquet")
        elif kind == "parquet":
            rows_of_file = pa.Table.from_pandas(table, preserve_index=False)
            writer = writer or pq.ParquetWriter(path, rows_of_file.schema)
            writer.write_table(rows_of_file)
    if writer is not None:
        writer.close()
    return path


def make_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        file = folder / name
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
        file.touch()


def open_kind(path: Path, kind: str):
    """The source of a kind."""
    from vae3d.data.sources.hugging_face import HuggingFace
    from vae3d.data.sources.image_folder import ImageFolder
    from vae3d.data.sources.json_clips import JsonClips
    from vae3d.data.sources.table import Table

    return {"jsonl": JsonClips, "hf": HuggingFace, "folder": ImageFolder}.get(kind, Table)(path)


def memory() -> dict[str, float]:
    """MiB of this process: RSS, USS and anonymous."""
    full = psutil.Process().memory_full_info()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    anonymous = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), full.uss)
    return {"rss": full.rss / MIB, "uss": full.uss / MIB, "anonymous": anonymous / MIB}


def more(before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in memory().items()}


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(file: Path, saved: Path, kind: str) -> dict[str, object]:
    """Start as a rank does. saved: the state of the fingerprint in a checkpoint; written if it is not there."""
    import torch

    from vae3d.data.batches.batch_schedule import BatchSchedule, FrameCounts
    from vae3d.data.batches.clips import ClipDataset, ClipSettings
    from vae3d.data.batches.selection import clip_lengths
    from vae3d.data.loader import read_tables

    source = open_kind(file, kind)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, wall, cpu = memory(), time.perf_counter(), cpu_seconds()
    settings = ClipSettings(256, 256)
    frames = FrameCounts(1, 1) if kind in ("hf", "folder") else FrameCounts(17, 33, 4)
    tables = read_tables(source, settings, num_val_files=64, max_broken=0.01)
    lengths, by_length = clip_lengths(tables.train, settings), tables.train.stored("by_length")
    schedule = BatchSchedule(lengths, frames, seed=0, batch_size=8, by_length=by_length)
    dataset = ClipDataset(tables.train, schedule, settings)
    (index, *_), *_ = schedule.step(0)
    path = dataset.table.path(index.row)
    tables.fingerprint.digests()
    if saved.is_file():
        changes = tables.fingerprint.changes_since(torch.load(saved, weights_only=True))
        assert changes == [], changes
    else:
        torch.save(tables.fingerprint.state_dict(), saved)
    found = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "rows": len(tables.train), "path": path}
    found |= {"more": more(before), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - imported}
    found["checkpoint"] = saved.stat().st_size / MIB
    started = time.process_time()
    steps = [schedule.step(step) for step in range(DRAWS)]
    found["step_us"] = 1e6 * (time.process_time() - started) / len(steps)
    rows = [steps[i][0][0].row for i in range(DRAWS)]
    found["worker"] = of_worker(lambda: [dataset.table.path(row) for row in rows])
    return found


def of_worker(work) -> dict[str, float]:
    """What a forked process has more after `work` than at its start, and the microseconds of each of its DRAWS."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        work()  # the first time, memory that parent and child share is copied
        before, started = memory(), time.process_time()
        work()
        seconds = time.process_time() - started
        os.write(writing, json.dumps({**more(before), "us": 1e6 * seconds / DRAWS}).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(os.read(reading, 10_000))


def in_new_process(file: Path, saved: Path, cache: Path, kind: str) -> dict:
    command = [sys.executable, __file__, "--measure", str(file), str(saved), kind]
    library = str(file.parent / "library")  # its copy of a dataset, which is no table of ours
    environment = {**os.environ, "VAE3D_CACHE": str(cache), "HF_DATASETS_CACHE": library}
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def size_of(folder: Path) -> float:
    """MiB of a file, or of all files of a folder."""
    if folder.is_file():
        return folder.stat().st_size / MIB
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / MIB


COLUMNS = [
    "rows", "table", "prepare: s (CPU s)", "peak, MiB", "start: s (CPU s)", "RSS, MiB", "USS", "anonymous",
    "worker: RSS", "USS", "rows of a step, us", "a path, us", "checkpoint, MiB", "disk, MiB",
]  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(rows: int, kind: str, size: float, first: dict, later: dict, disk: float) -> str:
    start, worker = later["more"], later["worker"]
    cells = [
        f"{rows:,}",
        f"{kind}, {size:.0f} MiB",
        f"{first['wall']:.1f} ({first['cpu']:.1f})",
        f"{first['peak']:.0f}",
        f"{later['wall']:.2f} ({later['cpu']:.2f})",
        *(f"{start[name]:.0f}" for name in ("rss", "uss", "anonymous")),
        *(f"{worker[name]:.1f}" for name in ("rss", "uss")),
        f"{later['step_us']:.0f}",
        f"{worker['us']:.1f}",
        f"{later['checkpoint']:.1f}",
        f"{disk:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=positive_int, nargs="*", default=[10**5, 10**6, 10**7])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["csv", "parquet"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        path, saved, kind = args.measure
        print(json.dumps(measure(Path(path), Path(saved), kind)))
        return
    load = os.getloadavg()[0]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}; {versions()}\n{HEADER}"
    )
    for rows in args.rows:
        for kind in args.kinds:
            folder = Path(tempfile.mkdtemp(prefix="bench_tables_"))
            try:
                cache, saved = folder / "cache", folder / "fingerprint.pt"
                file = write_source(folder, kind, rows)
                first, later = (in_new_process(file, saved, cache, kind) for _ in range(2))
                disk = size_of(cache) if cache.is_dir() else 0.0
                print(line(rows, kind, size_of(file), first, later, disk), flush=True)
            finally:
                shutil.rmtree(folder)


def versions() -> str:
    import numpy
    import pandas
    import pyarrow

    packages = {"NumPy": numpy, "pandas": pandas, "pyarrow": pyarrow}
    return ", ".join([f"Python {platform.python_version()}", *(f"{n} {p.__version__}" for n, p in packages.items())])


if __name__ == "__main__":
    main()

"""Check every file of a data set, and list the bad ones with the reason:

    vae3d check-data FILE

FILE is a table, a JSON list, a folder, tar shards, a Hugging Face dataset, or a URL. Each image is decoded; each video
(or part of one) at its first, middle and last frame, or completely with --full. --clean OUT.csv writes the good rows
with num_frames, height, width and fps, so that training need not probe the files. Exit status: 1 if any row is bad, 2
if FILE cannot be read. --alpha checks files for a model of RGBA (model.pixel_channels=4): each must have alpha.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vae3d.argparse_types import Parser, positive_int
from vae3d.commands.console import show
from vae3d.errors import UserError, printable
from vae3d.io import check_output_file, is_same_file, naming
from vae3d.text import plural

# Functions import what takes long (torch, pandas, PyAV), so that --help and a wrong flag are answered at once.
if TYPE_CHECKING:
    import pandas as pd

    from vae3d.data.media import MediaInfo
    from vae3d.data.table.segments import Bounds


AT_A_TIME = 10_000  # files that a pool is given


def examine(path: str, bounds: Bounds, full: bool, alpha: bool = False) -> MediaInfo | str:
    """Metadata of a file, or the reason why it, or its part within `bounds`, cannot be used: with alpha, as RGBA."""
    from vae3d.data.decoding.readers import open_media
    from vae3d.data.media import MediaError
    from vae3d.data.table.segments import Segment

    try:
        file = open_media(path, alpha=alpha)
        reader = Segment(file, path, bounds)
        count = reader.info.num_frames
        for index in range(count) if full else sorted({0, count // 2, count - 1}):
            reader.read([index])
        reader.close()
    except MediaError as error:
        return error.reason_for(path)
    return file.info


def examine_all(
    paths: list[str], bounds: list[Bounds], full: bool, workers: int, alpha: bool = False
) -> list[MediaInfo | str]:
    """examine() of every file, in processes: a crash of a decoder ends one of them, and is reported for its file."""
    from vae3d.progress import progress

    work, results = partial(examine, full=full, alpha=alpha), []
    with progress(total=len(paths), unit="file") as bar:
        while (done := len(results)) < len(paths):
            try:
                with ProcessPoolExecutor(workers) as pool:
                    part = slice(done, done + AT_A_TIME)
                    for result in pool.map(work, paths[part], bounds[part], chunksize=4):
                        results.append(result)
                        bar.update()
            except BrokenProcessPool:  # the next file crashed it, or one that another process had started
                results.append(_examine_alone(work, paths[len(results)], bounds[len(results)]))
                bar.update()
    return results


def _examine_alone(work: Callable[[str, Bounds], MediaInfo | str], path: str, bounds: Bounds) -> MediaInfo | str:
    try:
        with ProcessPoolExecutor(1) as pool:
            return pool.submit(work, path, bounds).result()
    except BrokenProcessPool:
        return "crashes the decoder, or needs more memory than there is"


def disagreement(row: pd.Series, info: MediaInfo) -> str | None:
    """The numbers of a row that differ from its file's; None if there are none. Sizes may be those of square pixels, or
    those stored."""
    from vae3d.data.table.probe import numbers_of

    wrong = []
    for name, actual in numbers_of(info).items():
        given = row[name]
        if given == getattr(info, name):
            continue
        if abs(given - actual) > (0.01 * given if name == "fps" else 0):  # never for NaN, which means not given
            wrong.append(f"{name} is {given:g} in the table, {actual:g} in the file")
    return "; ".join(wrong) or None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("check-data", description=__doc__)
    parser.add_argument("table", help="CSV, parquet or JSON file, a folder, or the folder of a Hugging Face dataset")
    parser.add_argument("--root", help="folder of relative paths; default: the table's folder")
    parser.add_argument("--full", action="store_true", help="decode every frame")
    parser.add_argument("--alpha", action="store_true", help="read RGBA; files without alpha are bad")
    parser.add_argument("--clean", type=Path, metavar="OUT.csv", help="write the good rows here")
    parser.add_argument("--workers", type=positive_int, help="processes; default: 4, or one per processor")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Print the bad rows, and write the good ones to --clean. Returns the exit status. Raises UserError."""
    import pandas as pd

    from vae3d.data.sources.open_source import open_source
    from vae3d.data.table.probe import numbers_of
    from vae3d.data.table.rows import NUMBERS, QUOTED_CSV
    from vae3d.data.table.segments import SEGMENT, bounds_of
    from vae3d.data.workers import usable_workers

    if clean := args.clean:
        check_output_file(clean, "--clean")
        if is_same_file(clean, args.table):
            raise UserError(f"--clean {clean}: is the table itself, whose other columns would be lost; name another")
    source = open_source(args.table, args.root)
    table = source.table()
    usable, notes = usable_workers(args.workers or 4, "--workers")
    for note in notes if args.workers else ():  # no warning about the default
        show(note, file=sys.stderr)
    results = examine_all(table["path"].tolist(), bounds_of(table), args.full, usable, args.alpha)
    good = []
    for (_, row), result in zip(table.iterrows(), results, strict=True):
        if pd.notna(row["error"]):
            reason = row["error"]
        else:
            reason = result if isinstance(result, str) else disagreement(row, result)
        if reason is None:
            good.append({**row, **numbers_of(result)})
        else:
            print(printable(f"row {row['row']}: {row['path']}: {reason}"))
    for note in getattr(source, "notes", ()):
        show(note)
    are = "is" if len(table) == 1 else "are"
    print(f"{len(good)} of {plural(len(table), 'row')} {are} good, {len(table) - len(good)} bad")
    if clean:
        optional = [name for name in (*SEGMENT, "split", "text", "label") if table[name].notna().any()]
        with naming(clean):
            found = pd.DataFrame(good, columns=["path", *NUMBERS, *optional])
            found.to_csv(clean, **QUOTED_CSV)
        print(f"wrote the good rows to {clean}")
    return 0 if len(good) == len(table) else 1

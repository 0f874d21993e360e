"""Reconstructing the files of a table, shared among ranks."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from vae3d.data.readers import MediaError
from vae3d.errors import UserError
from vae3d.inference.reconstruct import KINDS, Done, Reconstructor
from vae3d.metrics import MetricError

log = logging.getLogger("vae3d")
Gather = Callable[[list], list]


class InferenceError(UserError):
    """Reconstruction that cannot start, or did not succeed for every file."""


def refuse_to_mix(reconstructor: Reconstructor) -> None:
    """Raises InferenceError if an output folder already holds something."""
    for kind in KINDS:
        folder = reconstructor.folder(kind)
        if folder.is_dir() and any(folder.iterdir()):
            raise InferenceError(f"{folder} is not empty; choose another save_dir, or set overwrite=true")


def refuse_own_source(reconstructor: Reconstructor, source: str) -> None:
    """Raises InferenceError if the results would lie inside the folder that is read."""
    inside = [kind for kind in KINDS if reconstructor.folder(kind).resolve().is_relative_to(Path(source).resolve())]
    if inside:
        raise InferenceError(f"save_dir={reconstructor.prefix} lies in source={source}; choose another place")


def clear(reconstructor: Reconstructor) -> None:
    """Delete what an earlier reconstruction of the same prefix wrote, and nothing else."""
    for kind in KINDS:
        folder = reconstructor.folder(kind)
        for file in folder.iterdir() if folder.is_dir() else ():
            if re.fullmatch(r"\.?\d{6}_.*\.(mp4|png)|index\.csv|metrics\.json", file.name):
                file.unlink()


def reconstruct_files(
    reconstructor: Reconstructor,
    table: pd.DataFrame,
    *,
    skip_errors: bool,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = list,
) -> list[Done]:
    """Reconstruct this rank's share of the table; rank 0 writes index.csv, prints and stores the scores of all.

    Returns every rank's files in the table's order. Raises MediaError at the first file that cannot be read or
    scored, or, with skip_errors, InferenceError that lists them all at the end.
    """
    done: list[Done] = []
    failed: list[str] = []
    mine = table.iloc[rank::world_size]
    for _, entry in tqdm(mine.iterrows(), total=len(mine), unit="file", disable=None if rank == 0 else True):
        try:
            if not entry["name"]:
                raise MediaError(f"row {entry['row']}", "has no `path`")
            done.append(reconstructor.file(entry["path"], int(entry["row"])))
        except (MediaError, MetricError) as error:
            if isinstance(error, MetricError):
                error = MediaError(entry["path"], str(error))
            if not skip_errors:
                raise error from None
            log.warning("skipped: %s", error)
            failed.append(str(error))
    done = sorted(gather(done), key=lambda item: item.id)
    failed = gather(failed)
    if rank == 0:
        report(reconstructor, done)
    if failed:
        listed = "\n".join(f"  {reason}" for reason in failed)
        raise InferenceError(f"{len(failed)} of {len(table)} files could not be read:\n{listed}")
    return done


def report(reconstructor: Reconstructor, done: Sequence[Done]) -> None:
    """Write <prefix>_rec/index.csv, and <prefix>_rec/metrics.json if there are scores; say where all is."""
    folder = reconstructor.folder("rec")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([item.row() for item in done]).to_csv(folder / "index.csv", index=False)
    frames = sum(item.frames for item in done)
    written = [str(reconstructor.folder(kind)) for kind in KINDS if reconstructor.folder(kind).is_dir()]
    log.info("%d files, %d frames -> %s", len(done), frames, ", ".join(written))
    names = [metric.name for metric in reconstructor.metrics]
    if not (names and done):
        return
    means = {name: sum(item.scores[name] for item in done) / len(done) for name in names}
    (folder / "metrics.json").write_text(json.dumps({"videos": len(done), "frames": frames, **means}, indent=2) + "\n")
    for name, mean in means.items():
        log.info("%8s %.4f  (mean of %d videos, each the mean of its frames)", name, mean, len(done))

"""Reconstructing the files of a table, shared among ranks."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from vae3d.data.readers import MediaError
from vae3d.data.segments import SEGMENT_FAULT, bounds_of
from vae3d.data.sources import SPLITS, DataError, open_source
from vae3d.errors import UserError
from vae3d.inference.comparison import Comparer
from vae3d.inference.comparison_report import report_comparison
from vae3d.inference.cost import measure_cost
from vae3d.inference.reconstruct import KINDS, Done, Reconstructor
from vae3d.metrics import MetricError

log = logging.getLogger("vae3d")
Gather = Callable[[list], list]


class InferenceError(UserError):
    """Reconstruction that cannot start, or did not succeed for every file."""


def rows_of(source: str, root: str | None, split: str | None, count: int | None) -> pd.DataFrame:
    """The files of a source, only of one split, only the first `count`. Raises DataError if there are none."""
    table = open_source(source, root).table()
    if split is not None:
        unknown = table.loc[~table["split"].isin(SPLITS), "row"]
        if len(unknown):
            raise DataError(f"{source}: `split` is none of {', '.join(SPLITS)} in rows {list(unknown[:10])}")
        table = table[table["split"] == split]
    table = table.iloc[:count]
    if table.empty:
        raise DataError(f"{source} has no rows of split {split}")
    return table


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
            if re.fullmatch(r"\.?\d{6}_.*\.(mp4|png)|index\.csv|(metrics|comparison)\.json", file.name):
                file.unlink()


def reconstruct_files(
    reconstructor: Reconstructor,
    table: pd.DataFrame,
    *,
    skip_errors: bool,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = list,
    cost: dict[str, Any] | None = None,
    comparer: Comparer | None = None,
) -> list[Done]:
    """Reconstruct this rank's share of the table; rank 0 writes index.csv, prints and stores the scores of all.

    cost: of measure_cost, to be reported too. comparer: for what is compared of each file. Returns every rank's files
    in the table's order. Raises MediaError at the first file that cannot be read or scored, or, with skip_errors,
    InferenceError that lists them all at the end.
    """
    done: list[Done] = []
    compared: list[dict[str, Any]] = []
    failed: list[str] = []
    mine = table.iloc[rank::world_size]
    for _, entry in tqdm(mine.iterrows(), total=len(mine), unit="file", disable=None if rank == 0 else True):
        try:
            if not entry["name"]:
                raise MediaError(f"row {entry['row']}", "has no `path`")
            if entry["fault"] == SEGMENT_FAULT:  # other faults are of facts that are not needed here
                raise MediaError(f"row {entry['row']} ({entry['path']})", SEGMENT_FAULT)
            file = entry["path"], int(entry["row"]), (entry["start"], entry["end"])
            done.append(reconstructor.file(*file))
            if comparer is not None:
                compared.append(comparer.file(*file))
        except (MediaError, MetricError) as error:
            if isinstance(error, MetricError):
                error = MediaError(entry["path"], str(error))
            if not skip_errors:
                raise error from None
            log.warning("skipped: %s", error)
            failed.append(str(error))
    done = sorted(gather(done), key=lambda item: item.id)
    compared = sorted(gather(compared), key=lambda item: item["file"])
    failed = gather(failed)
    if rank == 0:
        report(reconstructor, done, cost)
        if comparer is not None:
            report_comparison(comparer, compared)
    if failed:
        listed = "\n".join(f"  {reason}" for reason in failed)
        raise InferenceError(f"{len(failed)} of {len(table)} files could not be read:\n{listed}")
    return done


def cost_of(reconstructor: Reconstructor, table: pd.DataFrame) -> dict[str, Any]:
    """Speed and memory of the model on the first chunk of the first file. Raises MediaError if it cannot be read."""
    usable = table[(table["name"] != "") & (table["fault"] != SEGMENT_FAULT)]
    if usable.empty:
        raise InferenceError("cost=true needs a file to measure with, and no row has a path")
    chunk = reconstructor.first_chunk(usable["path"].iloc[0], bounds_of(usable)[0])
    return measure_cost(reconstructor.model, chunk, reconstructor.dtype)


def report(reconstructor: Reconstructor, done: Sequence[Done], cost: dict[str, Any] | None) -> None:
    """Write <prefix>_rec/index.csv, and <prefix>_rec/metrics.json if anything was measured; say where all is."""
    folder = reconstructor.folder("rec")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([item.row() for item in done]).to_csv(folder / "index.csv", index=False)
    frames = sum(item.frames for item in done)
    written = [str(reconstructor.folder(kind)) for kind in KINDS if reconstructor.folder(kind).is_dir()]
    log.info("%d files, %d frames -> %s", len(done), frames, ", ".join(written))
    scores = reconstructor.metrics.over([item.result for item in done]) if done else {}
    for name, mean in scores.items():
        log.info("%14s %s  (over %d videos)", name, "undefined" if mean is None else f"{mean:.4f}", len(done))
    if cost is not None:
        log.info(
            "encodes %.1f and decodes %.1f frames of %dx%d per second (%s, %s)",
            *(cost[key] for key in ("encode_frames_per_second", "decode_frames_per_second", "height", "width")),
            *(cost["device"], cost["precision"]),
        )
    if scores or cost is not None:
        told = {"videos": len(done), "frames": frames, **scores} | ({} if cost is None else {"cost": cost})
        (folder / "metrics.json").write_text(json.dumps(told, indent=2) + "\n")

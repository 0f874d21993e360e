"""Reconstructing the files of a table, shared among ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from vae3d.data.media import DataError
from vae3d.data.readers import MediaError
from vae3d.data.rows import SPLITS
from vae3d.data.segments import SEGMENT_ERROR, bounds_of
from vae3d.data.sources import open_source
from vae3d.errors import UserError
from vae3d.inference.comparison import Comparer
from vae3d.inference.comparison_report import report_comparison
from vae3d.inference.cost import measure_cost
from vae3d.inference.reconstruct import KINDS, Done, Reconstructor, identifier
from vae3d.inference.results import Results
from vae3d.io import naming, write_json, write_text
from vae3d.latents.identity import digest_of, source_version
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


def command_of(settings: Mapping[str, Any], weights: Mapping[str, str | None], table: pd.DataFrame) -> dict[str, Any]:
    """What the results depend on, to tell a resume from another command: settings, hashes of weights, rows."""
    free = ("save_dir", "checkpoint", "source", "root", "overwrite", "on_error", "cost", "device")
    rows = [[int(row), path, str(start), str(end)] for row, path, start, end in
            table[["row", "path", "start", "end"]].itertuples(index=False)]  # fmt: skip
    chosen = {name: value for name, value in settings.items() if name not in free}
    chosen["teacher"] = {name: value for name, value in settings["teacher"].items() if name != "path"}
    told = {"rows of the source": digest_of(rows), **{f"weights of {who}": value for who, value in weights.items()}}
    return told | chosen


def check_not_own_source(reconstructor: Reconstructor, source: str) -> None:
    """Raises InferenceError if the results would lie inside the folder that is read."""
    inside = [kind for kind in KINDS if reconstructor.folder(kind).resolve().is_relative_to(Path(source).resolve())]
    if inside:
        raise InferenceError(f"save_dir={reconstructor.prefix} lies in source={source}; choose another place")


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

    Files that `Results` has as finished are kept. cost: of measure_cost, to be reported too. comparer: for what is
    compared of each file. Returns every rank's files in the table's order. Raises MediaError at the first file that
    cannot be read or scored, or, with skip_errors, InferenceError that lists them all at the end.
    """
    results = Results(reconstructor, comparer)
    done: list[Done] = []
    compared: list[dict[str, Any]] = []
    failed: list[str] = []
    kept = 0
    mine = table.iloc[rank::world_size]
    for _, entry in tqdm(mine.iterrows(), total=len(mine), unit="file", disable=None if rank == 0 else True):
        try:
            if not entry["name"]:
                raise MediaError(f"row {entry['row']}", "has no `path`")
            if entry["error"] == SEGMENT_ERROR:  # other errors are of facts that are not needed here
                raise MediaError(f"row {entry['row']} ({entry['path']})", SEGMENT_ERROR)
            source, row, bounds = entry["path"], int(entry["row"]), (entry["start"], entry["end"])
            finished = results.read(identifier(row, source), source)
            if finished is None:
                results.discard(identifier(row, source))
                version = source_version(source)
                file = reconstructor.file(source, row, bounds)
                finished = file, comparer and comparer.file(source, row, bounds)
                results.write(source, version, *finished)
            else:
                kept += 1
            done.append(finished[0])
            compared += [] if finished[1] is None else [finished[1]]
        except (MediaError, MetricError) as error:
            if isinstance(error, MetricError):
                error = MediaError(entry["path"], str(error))
            if not skip_errors:
                raise error from None
            log.warning("skipped: %s", error)
            failed.append(str(error))
    done = sorted(gather(done), key=lambda item: item.id)
    compared = sorted(gather(compared), key=lambda item: item["file"])
    failed, kept = gather(failed), sum(gather([kept]))
    if rank == 0 and kept:
        log.info("%d of %d files were finished before", kept, len(table))
    if rank == 0:
        report(reconstructor, done, cost)
        if comparer is not None:
            report_comparison(comparer, compared)
    if failed:
        listed = "\n".join(f"  {reason}" for reason in failed)
        raise InferenceError(f"{len(failed)} of {len(table)} files could not be reconstructed:\n{listed}")
    return done


def cost_of(reconstructor: Reconstructor, table: pd.DataFrame) -> dict[str, Any]:
    """Speed and memory of the model on the first chunk of the first file. Raises MediaError if it cannot be read."""
    usable = table[(table["name"] != "") & (table["error"] != SEGMENT_ERROR)]
    if usable.empty:
        raise InferenceError("cost=true needs a file to measure with, and no row has a path")
    chunk = reconstructor.first_chunk(usable["path"].iloc[0], bounds_of(usable)[0])
    return measure_cost(reconstructor.model, chunk, reconstructor.dtype)


def report(reconstructor: Reconstructor, done: Sequence[Done], cost: dict[str, Any] | None) -> None:
    """Write <prefix>_rec/index.csv, and <prefix>_rec/metrics.json if anything was measured; say where all is."""
    folder = reconstructor.folder("rec")
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder / "index.csv"):
        write_text(folder / "index.csv", pd.DataFrame([item.row() for item in done]).to_csv(index=False))
    frames = sum(item.frames for item in done)
    written = [str(reconstructor.folder(kind)) for kind in KINDS if reconstructor.folder(kind).is_dir()]
    log.info("%d files, %d frames -> %s", len(done), frames, ", ".join(written))
    scores = reconstructor.metrics.aggregate([item.result for item in done]) if done else {}
    for name, mean in scores.items():
        log.info("%14s %s  (over %d videos)", name, "undefined" if mean is None else f"{mean:.4f}", len(done))
    if enlarged := [item for item in done if item.enlarged]:
        log.warning(
            "%d of %d files are enlarged to height=, width= (the first is %s): that smooths errors, so SSIM and others "
            "look better than at the files' own size",
            *(len(enlarged), len(done), enlarged[0].source),
        )
    if cost is not None:
        log.info(
            "encodes %.1f and decodes %.1f frames of %dx%d per second (%s, %s)",
            *(cost[key] for key in ("encode_frames_per_second", "decode_frames_per_second", "height", "width")),
            *(cost["device"], cost["precision"]),
        )
    if scores or cost is not None:
        told = {"videos": len(done), "frames": frames, **scores} | ({} if cost is None else {"cost": cost})
        with naming(folder / "metrics.json"):
            write_json(folder / "metrics.json", told)

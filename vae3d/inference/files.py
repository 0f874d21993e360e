"""Reconstruct the files of a table, split among ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vae3d.data.media import DataError, MediaError
from vae3d.data.sources.open_source import open_source
from vae3d.data.table.rows import QUOTED_CSV, SPLITS
from vae3d.data.table.segments import SEGMENT_ERROR, bounds_of
from vae3d.data.table.versions import source_version
from vae3d.distributed import all_gather_object, gather_to_main
from vae3d.errors import UserError
from vae3d.evaluation.store import read_features
from vae3d.hashing import json_hash
from vae3d.inference import page
from vae3d.inference.comparison_report import report_comparison
from vae3d.inference.cost import measure_cost
from vae3d.inference.reconstruct import KINDS, PAGES, FileResult, Reconstructor, identifier
from vae3d.inference.results import Finished, Results
from vae3d.io import write_json, write_text
from vae3d.metrics import MetricError
from vae3d.metrics.distribution import SetMetric
from vae3d.progress import progress
from vae3d.report.page import PAGE, write_page
from vae3d.text import plural

log = logging.getLogger("vae3d")


def select_rows(source: str, root: str | None, split: str | None, count: int | None) -> pd.DataFrame:
    """The table of a source: all rows or those of one split, at most the first `count`. Raises DataError if empty."""
    opened = open_source(source, root)
    table = opened.table()
    for note in getattr(opened, "notes", ()):
        log.info(note)
    if split is not None:
        unknown = table.loc[~table["split"].isin(SPLITS), "row"]
        if len(unknown):
            raise DataError(f"{source}: `split` is none of {', '.join(SPLITS)} in rows {list(unknown[:10])}")
        table = table[table["split"] == split]
    table = table.iloc[:count]
    if table.empty:
        raise DataError(f"{source} has no rows of split {split}")
    return table


def command_record(
    settings: Mapping[str, Any], weights: Mapping[str, str | None], table: pd.DataFrame
) -> dict[str, Any]:
    """What the results depend on: settings, hashes of weights, rows. A command resumes if its record is the same."""
    free = ("save_dir", "checkpoint", "source", "root", "overwrite", "on_error", "cost", "device", "report")
    fixed = {name: value for name, value in settings.items() if name not in free}
    if "teacher" in settings:
        fixed["teacher"] = {name: value for name, value in settings["teacher"].items() if name != "path"}
    columns = table[["row", "path", "start", "end"]].itertuples(index=False)
    rows = [[int(row), path, str(start), str(end)] for row, path, start, end in columns]
    hashes = {f"weights of {network}": value for network, value in weights.items()}
    return {"rows of the source": json_hash(rows), **hashes, **fixed}


def check_not_own_source(reconstructor: Reconstructor) -> None:
    """Raises UserError if the results would be written into the source folder."""
    config, folders = reconstructor.config, [reconstructor.folder(kind) for kind in (*KINDS, *PAGES)]
    if any(folder.resolve().is_relative_to(Path(config.source).resolve()) for folder in folders):
        raise UserError(f"save_dir={config.save_dir} is inside source={config.source}; choose another save_dir")


def reconstruct_files(
    results: Results, table: pd.DataFrame, rank: int, world_size: int, cost: dict[str, Any] | None, command: str
) -> None:
    """Reconstruct this rank's share of the table, and compare it if there is a teacher; rank 0 reports on all.

    Files that a killed run of the same command finished are kept. cost: of measure_cost, for the report. command: to
    show on pages.
    Raises MediaError at the first file that cannot be read or scored; with on_error=skip UserError at the end, which
    lists them all.
    """
    reconstructor, comparer = results.reconstructor, results.comparer
    done: list[Finished] = []
    failed: list[str] = []
    kept = 0
    share = table.iloc[rank::world_size]
    for _, entry in progress(share.iterrows(), total=len(share), unit="file", hidden=rank != 0):
        try:
            finished, was_there = finish_file(results, entry)
        except MediaError as error:
            if reconstructor.config.on_error == "stop":
                others = "; on_error=skip goes on with the other files" if len(table) > 1 else ""
                raise MediaError(error.path, error.reason + others) from None
            log.warning("skipped: %s", error)
            failed.append(str(error))
            continue
        if comparer is not None and finished[1]["cost"]:
            comparer.measures = False
        done.append(finished)
        kept += was_there
    failed = [error for errors in all_gather_object(failed) for error in errors]
    ranks = gather_to_main((done, kept))
    items = sorted((item for done, _ in ranks for item in done), key=lambda item: item[0].id)
    files = [file for file, _ in items]
    if rank == 0:
        if kept := sum(kept for _, kept in ranks):
            log.info("%d of %d files were already finished", kept, len(table))
        means = report(results, files, cost)
        if comparer is not None:
            report_comparison(comparer, [comparison for _, comparison in items if comparison is not None], command)
    if reconstructor.config.report:
        mine = [file for file, _ in done]
        page.write_clips(reconstructor, progress(mine, unit="file", desc="page", hidden=rank != 0))
        all_gather_object(None)  # wait for the clips of all ranks
        if files:
            folder = reconstructor.folder("report")
            write_page(folder, page.make_report(results, files, means, cost, failed, command))
            log.info("%s shows them", folder / PAGE)
    if failed:
        reasons = "\n".join(f"  {reason}" for reason in failed)
        raise UserError(f"{len(failed)} of {len(table)} files could not be reconstructed:\n{reasons}")


def finish_file(results: Results, entry: pd.Series) -> tuple[Finished, bool]:
    """Reconstruct the file of a row, unless an earlier run finished it; and whether one did.

    Raises MediaError if it cannot be read or scored; its outputs are deleted then.
    """
    reconstructor, comparer = results.reconstructor, results.comparer
    source, row, bounds = entry["path"], int(entry["row"]), (entry["start"], entry["end"])
    name = identifier(row, source)
    try:
        if not entry["name"]:
            raise MediaError(f"row {row}", "has no `path`")
        if entry["error"] == SEGMENT_ERROR:  # other errors are about metadata that is not needed here
            raise MediaError(f"row {row} ({source})", SEGMENT_ERROR)
        if (found := results.read(name, source)) is not None:
            return found, True
        results.discard(name)
        version = source_version(source)
        finished = reconstructor.file(source, row, bounds), comparer and comparer.file(source, row, bounds)
        results.write(source, version, *finished)
    except (MediaError, MetricError) as error:
        results.discard(name)
        raise (error if isinstance(error, MediaError) else MediaError(source, str(error))) from None
    finished[0].result.features.clear()  # `report` reads them from the disk, file by file
    return finished, False


def measure_first_file(reconstructor: Reconstructor, table: pd.DataFrame) -> dict[str, Any] | None:
    """measure_cost of the model on the first chunk of the first file, with on_error=skip of the first that can be read,
    None if none can. Raises MediaError, and UserError if no row has a file."""
    usable = table[(table["name"] != "") & (table["error"] != SEGMENT_ERROR)]
    if usable.empty:
        raise UserError("cost=true needs a file to measure on, and no row has a `path`")
    for path, bounds in zip(usable["path"], bounds_of(usable), strict=True):
        try:
            chunk = reconstructor.first_chunk(path, bounds)
        except MediaError:
            if reconstructor.config.on_error == "stop":
                raise
            continue  # reconstruct_files names it
        return measure_cost(reconstructor.model, chunk, reconstructor.config.precision)
    return None


def report(results: Results, done: Sequence[FileResult], cost: dict[str, Any] | None) -> dict[str, float | None]:
    """Write <save_dir>_rec/index.csv, and <save_dir>_rec/metrics.json if there are scores or costs; log the results.

    Returns the means of the metrics."""
    reconstructor = results.reconstructor
    folder = reconstructor.folder("rec")
    folder.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame([item.row() for item in done])
    write_text(folder / "index.csv", rows.to_csv(**QUOTED_CSV))
    frames = sum(item.frames for item in done)
    written = [str(reconstructor.folder(kind)) for kind in KINDS if reconstructor.folder(kind).is_dir()]
    log.info("%s, %s -> %s", plural(len(done), "file"), plural(frames, "frame"), ", ".join(written))
    tiles = getattr(reconstructor.model, "tiling", None)
    if tiles is not None:
        log.info("coded in %s", tiles)
    scores = mean_scores(results, done) if done else {}
    for name, mean in scores.items():
        shown = "undefined" if mean is None else f"{mean:.4f}"
        undefined = sum(name in item.result.scores and item.result.scores[name].value is None for item in done)
        log.info("%14s %s  (over %s)", name, shown, plural(len(done) - undefined, "video"))
    if enlarged := [item for item in done if item.enlarged]:
        log.warning(
            f"{len(enlarged)} of {len(done)} files, such as {enlarged[0].source}, are smaller than height=, width= and "
            "were enlarged. That smooths errors: SSIM and others look better than at the files' own size"
        )
    if cost is not None:
        log.info(
            f"encodes {cost['encode_frames_per_second']:.1f} and decodes {cost['decode_frames_per_second']:.1f} frames "
            f"of {cost['height']}x{cost['width']} per second ({cost['device']}, {cost['precision']})"
        )
    if scores or cost is not None:
        summary = {"videos": len(done), "frames": frames, **scores} | ({} if cost is None else {"cost": cost})
        summary |= {} if tiles is None else {"tiles": str(tiles)}
        write_json(folder / "metrics.json", summary)
    return scores


def mean_scores(results: Results, done: Sequence[FileResult]) -> dict[str, float | None]:
    """Every column of the metrics over all files. Of metrics that compare sets, one file's features are in memory; what
    they warn of, such as too few samples, is logged."""
    scores: dict[str, float | None] = {}
    for metric in results.reconstructor.metrics:
        if isinstance(metric, SetMetric):
            features = (read_features(results.features_file(item.id, metric.name)) for item in done)
            scores[metric.name], _, warnings = metric.combine(features)
            for warning in warnings:
                log.warning(warning)
        else:
            scores |= metric.aggregate([item.result for item in done])
    return scores

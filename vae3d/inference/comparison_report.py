"""Report of a comparison of student and teacher: <save_dir>_rec/comparison.json, tables in the log, a page."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vae3d import __version__
from vae3d.evaluation.page import page_metrics, rank_column
from vae3d.inference.comparison import MAX_FRAMES, MIN_GAIN, PAIRS, Comparer, pair_name
from vae3d.io import write_json
from vae3d.report import number, text_table
from vae3d.report.page import PAGE, Chapter, Metric, Report, Table, Video, clip_id, write_page
from vae3d.text import plural

log = logging.getLogger("vae3d")
UNITS = {
    "pairs": "encoder -> decoder; pixels are rounded to 8 bits, latents are the mode of the posterior",
    "mse": "mean square error over all pixels, frames and colours, of pixels in [0, 1]; of RGBA, over mid-grey",
    "psnr": "dB, mean over frames of the PSNR of each frame",
    "psnr_video": "dB, of the MSE over all frames of a file",
    "ssim": "0 to 1, mean over frames",
    "lpips_alex, lpips_vgg": "mean over frames; smaller is nearer",
    "baseline": "dB as psnr_video, of black frames and of frames of the file's mean colour",
    "latents": "of both encoders, in the student's latent space; mean and std per channel",
    "first_frame_seconds": "from the first latent (all latents, if the decoder does not stream) to the first frames; "
    "median, after a warm-up run",
    "memory_gib": "peak memory of a run in GiB, above the memory before it",
}


def report_comparison(comparer: Comparer, compared: Sequence[dict[str, Any]], command: str) -> None:
    """Write comparison.json and the page, and log the means. compared: what Comparer.file returned, on all ranks."""
    if not compared:
        return
    files = [each["file"] for each in compared]
    cost = next((each["cost"] for each in compared if each["cost"]), {})
    warnings, notes = degenerate_pairs(files), _partial(comparer, files)
    report = {
        **{whose: network.metadata() for whose, network in comparer.networks.items()},
        "units": UNITS,
        "files_compared": len(files),
        "mean": mean_of([{name: file[name] for name in ("pairs", "baseline", "latents")} for file in files]),
        "cost": cost,
        "warnings": warnings,
        "notes": notes,
        "files": files,
    }
    path = comparer.reconstructor.folder("rec") / "comparison.json"
    write_json(path, report)
    for line in [*_lines(report), *_cost_lines(cost), *notes]:
        log.info(line)
    folder = comparer.reconstructor.folder("compare")
    write_page(folder, make_page(comparer, report, folder, path, command))
    log.info("%s; %s shows it", path, folder / PAGE)
    for warning in warnings:
        log.warning(warning)


def mean_of(values: Sequence[Any]) -> Any:
    """Mean over files of numbers, and of dicts and lists of them, element by element; None if one is None."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_of([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(place)) for place in zip(*values, strict=True)]
    return None if None in values else fmean(values)


def degenerate_pairs(files: Sequence[dict[str, Any]]) -> list[str]:
    """A warning for each pair that is hardly better than frames of one colour."""
    found = []
    for pair in map(pair_name, PAIRS):
        gains = [file["pairs"][pair]["psnr_video"] - max(file["baseline"].values()) for file in files]
        if count := sum(gain < MIN_GAIN for gain in gains):
            worst = files[gains.index(min(gains))]
            psnr, flat = worst["pairs"][pair]["psnr_video"], worst["baseline"]
            found.append(
                f"{pair} shows nothing in {count} of {len(files)} files: its PSNR is less than {MIN_GAIN:g} dB "
                f"above that of frames of one colour ({worst['file']}: {psnr:.2f} dB; black {flat['black']:.2f}, "
                f"mean colour {flat['mean_colour']:.2f})"
            )
    return found


def _partial(comparer: Comparer, files: Sequence[dict[str, Any]]) -> list[str]:
    """A note if only the first frames of some files were compared."""
    parts = [file for file in files if file["frames"] < file["frames_reconstructed"]]
    if not parts:
        return []
    total = parts[0]["frames_reconstructed"]
    return [
        f"{len(parts)} of {len(files)} files are compared on their first frames only, at most {MAX_FRAMES} that fit "
        f"both ({parts[0]['file']}: {parts[0]['frames']} of {total}); set num_frames for another number, such as "
        f"{', '.join(map(str, comparer.nearest(total)))}"
    ]


def make_page(comparer: Comparer, report: dict[str, Any], folder: Path, json_file: Path, command: str) -> Report:
    """The page of a comparison, for `folder`. report: the content of comparison.json."""
    pairs = list(map(pair_name, PAIRS))
    mse = Metric("mse", "lower", "Mean square error of pixels in [0, 1], over all frames and colours.")
    metrics = {"mse": mse} | page_metrics(comparer.metrics.columns)
    chapter = Chapter(
        "Student and teacher",
        "Every encoder with every decoder, encoder -> decoder, on the same frames.",
        reconstructions=pairs,
        metrics=metrics,
        videos=[_video(comparer, file, folder) for file in report["files"]],
        ranked_by=rank_column(comparer.metrics.columns),
        tables=[
            Table("Means", *_pair_table(report)),
            Table("Latents", *_latent_table(report["mean"]["latents"]), note=UNITS["latents"]),
            *([Table("Cost", *_cost_table(report["cost"]), note=_cost_note(report["cost"]))] if report["cost"] else []),
        ],
        warnings=report["warnings"],
    )
    return Report(
        f"{Path(report['student']['path']).name} and its teacher {Path(report['teacher']['path']).name}",
        [chapter],
        facts={whose: _network(report[whose]) for whose in ("student", "teacher")}
        | {"pixels": UNITS["pairs"], "versions": f"vae3d {__version__}"},
        commands=command,
        links={json_file.name: os.path.relpath(json_file, folder)},
        warnings=report["notes"],
    )


def _video(comparer: Comparer, file: dict[str, Any], folder: Path) -> Video:
    labels = {"ori": "original, all frames", "rec": "student -> student, all frames"}
    outputs = comparer.reconstructor.outputs(file["file"])
    links = {labels[kind]: os.path.relpath(path, folder) for kind, path in outputs if kind in labels}
    latents = file["latents"]
    facts = {"source": file["source"], "latents": f"MSE {latents['mse']:.6f}, cosine {latents['cosine']:.4f}"}
    if file["frames"] < file["frames_reconstructed"]:
        facts["compared"] = f"the first {file['frames']} of {file['frames_reconstructed']} frames"
    panorama = file["width"] == 2 * file["height"]
    return Video(clip_id(file["file"]), file["file"], file["pairs"], facts, links, panorama=panorama)


def _pair_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: means of each pair, and of frames of one colour."""
    means = report["mean"]
    columns = list(next(iter(means["pairs"].values())))
    rows = [
        [pair, *(f"{scores[c]:.6f}" if c == "mse" else number(scores[c]) for c in columns)]
        for pair, scores in means["pairs"].items()
    ]
    for name, label in (("black", "black frames"), ("mean_colour", "frames of the mean colour")):
        rows.append([label, *(number(means["baseline"][name]) if c == "psnr_video" else "" for c in columns)])
    return ["encoder -> decoder", *columns], rows


def _latent_table(latents: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: mean and standard deviation of every channel, of both encoders."""
    head = ["channel", *(f"{key} of the {whose}" for key in ("mean", "std") for whose in ("student", "teacher"))]
    columns = [latents[whose][key] for key in ("mean", "std") for whose in ("student", "teacher")]
    return head, [[str(i), *map(number, values)] for i, values in enumerate(zip(*columns, strict=True))]


def _lines(report: dict[str, Any]) -> list[str]:
    """Log lines: the two networks, the table of pairs, the latents."""
    head, rows = _pair_table(report)
    latents = report["mean"]["latents"]
    return [
        *(f"{whose}: {_network(report[whose])}" for whose in ("student", "teacher")),
        f"mean over {plural(report['files_compared'], 'file')}\n" + text_table(head, [*rows[:-2], None, *rows[-2:]]),
        f"latents of the student against the teacher's: MSE {latents['mse']:.6f}, cosine {latents['cosine']:.4f}",
    ]


def _network(network: dict[str, Any]) -> str:
    variant = f", variant {network['variant']}" if network["variant"] else ""
    millions = network["parameters"] / 1e6
    return (
        f"{network['network']}{variant}, {millions:.2f} M parameters, {network['precision']}, {network['latent']} "
        f"latents, {network['path']}"
    )


def _cost_lines(costs: dict[str, Any]) -> list[str]:
    return [f"cost {_cost_note(costs)}\n" + text_table(*_cost_table(costs))] if costs else []


def _cost_table(costs: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["network", "encodes frames/s", "decodes frames/s", "first frame ms", "after"]
    rows = []
    for whose in ("student", "teacher"):
        cost = costs[whose]
        speeds = [f"{cost[f'{step}_frames_per_second']:.1f}" for step in ("encode", "decode")]
        first_frame = f"{1000 * cost['first_frame_seconds']:.1f}"
        rows.append([whose, *speeds, first_frame, cost["first_frame_from"].split(",")[0]])
    return head, rows


def _cost_note(costs: dict[str, Any]) -> str:
    clip = costs["student"]
    return (
        f"on {costs['file']} ({plural(clip['frames'], 'frame')} of {clip['height']}x{clip['width']}, {clip['device']})"
    )

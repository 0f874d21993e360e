"""Report of a comparison of student and teacher: <save_dir>_rec/comparison.json, and tables in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from vae3d.inference.comparison import MAX_FRAMES, MIN_GAIN, PAIRS, Comparer, pair_name
from vae3d.io import write_json
from vae3d.report import number, text_table
from vae3d.text import plural

log = logging.getLogger("vae3d")
UNITS = {
    "pairs": "encoder -> decoder; pixels are rounded to 8 bits, latents are the mode of the posterior",
    "mse": "mean square error over all pixels, frames and channels, of pixels in [0, 1]",
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


def report_comparison(comparer: Comparer, files: Sequence[dict[str, Any]]) -> None:
    """Write comparison.json and log it. files: entries of Comparer.file, from all ranks."""
    if not files:
        return
    warnings, notes = degenerate_pairs(files), _partial(comparer, files)
    report = {
        **{whose: network.metadata() for whose, network in comparer.networks.items()},
        "units": UNITS,
        "files_compared": len(files),
        "mean": mean_of([{name: file[name] for name in ("pairs", "baseline", "latents")} for file in files]),
        "cost": comparer.costs,
        "warnings": warnings,
        "notes": notes,
        "files": list(files),
    }
    path = comparer.reconstructor.folder("rec") / "comparison.json"
    write_json(path, report)
    for line in [*_lines(report), *_cost_lines(comparer.costs), *notes]:
        log.info(line)
    log.info("%s; pictures in %s", path, comparer.reconstructor.folder("compare"))
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


def _lines(report: dict[str, Any]) -> list[str]:
    """Log lines: the two networks, the table of pairs, the latents."""
    means = report["mean"]
    columns = list(next(iter(means["pairs"].values())))
    rows: list[Sequence[str] | None] = [
        [pair, *(f"{scores[c]:.6f}" if c == "mse" else number(scores[c]) for c in columns)]
        for pair, scores in means["pairs"].items()
    ]
    rows.append(None)
    for name, label in (("black", "black frames"), ("mean_colour", "frames of the mean colour")):
        rows.append([label, *(number(means["baseline"][name]) if c == "psnr_video" else "" for c in columns)])
    latents = means["latents"]
    return [
        *(f"{whose}: {_network(report[whose])}" for whose in ("student", "teacher")),
        f"mean over {plural(report['files_compared'], 'file')}\n" + text_table(["encoder -> decoder", *columns], rows),
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
    if not costs:
        return []
    head = ["network", "encodes frames/s", "decodes frames/s", "first frame ms", "after"]
    rows = []
    for whose in ("student", "teacher"):
        cost = costs[whose]
        speeds = [f"{cost[f'{step}_frames_per_second']:.1f}" for step in ("encode", "decode")]
        first_frame = f"{1000 * cost['first_frame_seconds']:.1f}"
        rows.append([whose, *speeds, first_frame, cost["first_frame_from"].split(",")[0]])
    clip = costs["student"]
    measured = f"{plural(clip['frames'], 'frame')} of {clip['height']}x{clip['width']}, {clip['device']}"
    return [f"cost on {costs['file']} ({measured})\n" + text_table(head, rows)]

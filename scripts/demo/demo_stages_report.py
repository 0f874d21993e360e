"""Draw the stages part of the demo report: the three stages of Open-Sora 1.2, and the 2D VAE before them.

Reads runs/STAGE/metrics.jsonl, out/STAGE_{ori,rec,spatial} and their _eval/summary.json, which scripts/demo.sh writes.
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from demo_page import (
    animation_tag,
    as_html,
    as_text,
    enlarged,
    figure_tag,
    history,
    image_tag,
    read_json,
    read_video,
)
from matplotlib.figure import Figure

import vae3d
from vae3d.inference.pictures import ERROR_LABEL, ERROR_NOTE, error_maps

STAGES = {
    "spatial": "2D VAE alone",
    "stage1": "stage 1: latents, identity",
    "stage2": "stage 2: latents",
    "stage3": "stage 3: everything, pixels",
}
CURVES = ("val/psnr", "loss", "grad_norm")
ENLARGE = 2
SHOWN = (0, 8, 16, 24, 32, 39)  # frames in the strips

SECTION = """<h2>Three stages</h2>
<p>A toy video VAE (4 &times; 2 &times; 2 compression) trained through the three stages of Open-Sora 1.2. With
{parameters} parameters its pictures are blurred. Scores on held-out clips:</p>
{table}
<p><i>2D ceiling</i>: the same clips through the 2D VAE alone, which the temporal VAE inside it cannot exceed. Stages 1
and 2 freeze the 2D VAE; stage 3 trains it too.</p>
<p>Original, through the 2D VAE alone, after stage 1, after stage 3:</p>
{movies}
<p>Frames. {error}.</p>
{strips}
{curves}
"""


def strip(frames: np.ndarray) -> str:
    return image_tag(enlarged(np.concatenate([frames[i] for i in SHOWN if i < len(frames)], axis=1), ENLARGE))


def strips(name: str, out: Path) -> str:
    """Rows of frames of one clip: original, 2D VAE, stage 3, error of stage 3."""
    original = read_video(out / f"stage3_ori/{name}.mp4")
    spatial = read_video(out / f"stage3_spatial/{name}.mp4")
    final = read_video(out / f"stage3_rec/{name}.mp4")
    rows = {
        "original": original,
        "2D VAE alone": spatial,
        "reconstruction": final,
        ERROR_LABEL: error_maps(original, final),
    }
    cells = "\n".join(f"<span>{label}</span>{strip(frames)}" for label, frames in rows.items())
    return f'<h3>{html.escape(name)}</h3>\n<div class="strip">{cells}</div>'


def movie(name: str, out: Path) -> str:
    """One clip as an animation: original, 2D VAE, stage 1, stage 3 side by side."""
    folders = ("stage3_ori", "stage3_spatial", "stage1_rec", "stage3_rec")
    frames = np.concatenate([read_video(out / folder / f"{name}.mp4") for folder in folders], axis=2)
    return animation_tag(name, frames, ENLARGE, duration=80, quality=85)


def curves(histories: dict[str, list[dict[str, float]]]) -> str:
    figure = Figure(figsize=(12, 6))
    axes = figure.subplots(len(CURVES), len(histories), sharex="col", squeeze=False)
    for column, (stage, lines) in enumerate(histories.items()):
        axes[0, column].set_title(STAGES[stage], fontsize=9)
        for row, key in enumerate(CURVES):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis = axes[row, column]
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 10 else None)
            if key != "val/psnr":
                axis.set_yscale("log")
            if column == 0:
                axis.set_ylabel(key)
        axes[-1, column].set_xlabel("step")
    figure.tight_layout()
    return figure_tag(figure)


def scores(out: Path) -> list[list[str]]:
    """Header and rows: stage, PSNR and SSIM of the reconstruction and of the 2D VAE alone."""

    def cells(stage: str, kind: str) -> list[str]:
        if stage == kind == "spatial":  # a 2D VAE has no 2D VAE inside
            return ["", ""]
        means = read_json(out / f"{stage}_{kind}_eval/summary.json")["metrics"]
        return [f"{means['psnr']['mean']:.2f}", f"{means['ssim']['mean']:.4f}"]

    header = ["after", "PSNR (dB)", "SSIM", "2D ceiling, PSNR", "2D ceiling, SSIM"]
    return [header, *([title, *cells(stage, "rec"), *cells(stage, "spatial")] for stage, title in STAGES.items())]


def parameters(run: Path) -> str:
    return f"{sum(p.numel() for p in vae3d.load(run).parameters()):,}"


def section(folder: Path) -> str:
    out = folder / "out"
    names = sorted(path.stem for path in (out / "stage3_rec").glob("*.mp4"))
    return SECTION.format(
        parameters=parameters(folder / "runs/stage3"),
        table=as_html(scores(out)),
        movies="\n".join(movie(name, out) for name in names),
        error=ERROR_NOTE,
        strips="\n".join(strips(name, out) for name in names),
        curves=curves({stage: history(folder / "runs" / stage) for stage in STAGES}),
    )


def tables(folder: Path) -> str:
    return as_text(scores(folder / "out"))

"""The chapter of the demo's page on the three stages of Open-Sora 1.2, and the 2D VAE before them.

Reads the page and the scores in out/*_eval and the runs of the STAGES, which scripts/demo.sh writes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from demo_page import compared, points, score_table, training_table
from markupsafe import Markup

from vae3d.report.page import Chapter, Chart

STAGES = {
    "spatial": "2D VAE alone",
    "stage1": "stage 1: latents, identity",
    "stage2": "stage 2: latents",
    "stage3": "stage 3: everything, pixels",
}
COLUMNS = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 4), "tpsnr": ("PSNR of changes (dB)", 2)}
CURVES = {"val/psnr": ("PSNR in validation", "dB"), "loss": ("Loss", ""), "grad_norm": ("Norm of the gradient", "")}

TEXT = Markup("""
<p>A toy video VAE (4 &times; 2 &times; 2 compression), trained through the three stages of Open-Sora 1.2 on made clips.
It is so small that its pictures are blurred. You see clips that it has not seen.</p>
<ul><li><b>2D_VAE</b>: the image VAE that all begins with, frame by frame.</li>
<li><b>stage1</b>, <b>stage2</b>: a temporal VAE learns to code its latents; the 2D VAE is frozen, and what it loses is
lost.</li>
<li><b>stage3</b>: both learn from pixels. <b>stage3_2D_VAE</b> is the 2D VAE alone after that.</li></ul>
<p>Wipe between <i>2D_VAE</i> and <i>stage3</i>, and look at <i>change</i>: what moves is what the temporal VAE has to
code.</p>
""")


def chapter(folder: Path, page: Path) -> Chapter:
    rows = {label: f"{stage}_rec" for stage, label in STAGES.items()} | {"2D VAE of stage 3 alone": "stage3_spatial"}
    charts = [
        Chart(title, "step", one_after_another(folder / "runs", key), unit, log=key != "val/psnr")
        for key, (title, unit) in CURVES.items()
    ]
    return replace(
        compared(folder / "out/spatial_rec_eval", page, COLUMNS),
        title="Three stages",
        text=TEXT,
        tables=[
            score_table("Scores of held-out clips", folder / "out", rows, COLUMNS),
            training_table(folder, STAGES),
        ],
        charts=charts,
    )


def one_after_another(runs: Path, key: str) -> dict[str, list[tuple[int, float]]]:
    """The curves of the stages, each from the last step of the one before. Losses of stages differ in kind."""
    series, start = {}, 0
    for stage, label in STAGES.items():
        line = points(runs / stage, key)
        series[label] = [(start + step, value) for step, value in line]
        start += line[-1][0]
    return series

"""The chapter of the demo's page on a GAN; alone, write its curves and reconstructions as one picture.

    python scripts/demo/demo_gan_report.py demo docs/gan.jpg

Reads runs/RUN, out/RUN_{ori,rec} of the RUNS below and the page and scores in out/RUN_rec_eval, which scripts/demo.sh
writes.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from demo_page import as_text, compared, draw_part, existing, plot, points_of, score_table, training_table
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from vae3d.data.decoding.images import open_image
from vae3d.report.page import Chapter, Chart, Table

START = "sd_vae_tiny"
RUNS = {START: "start", "sd_vae_control": "300 steps more", "sd_vae_gan_tiny": "300 steps with the GAN"}
COLUMNS = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3), "sharpness": ("sharpness", 3)}
CURVES = {"val/psnr": "val/psnr (dB)", "val/sharpness": "val/sharpness (1: as sharp as the original)"}
NOTE = "Sharpness: the reconstruction's gradient energy over the original's."

TEXT = Markup("""
<p>A toy image VAE on photographs, continued for the same steps with and without a PatchGAN. You see photographs that it
has not seen.</p>
<ul><li><b>start</b>: trained with L1 alone, which leaves blur.</li>
<li><b>more_steps</b>: the same, continued.</li>
<li><b>gan</b>: continued with the GAN, which adds detail. Detail in the wrong place lowers PSNR.</li></ul>
<p>Blink between the original and <i>gan</i> with the lens on: texture is sharp, but elsewhere.</p>
""")


def scores(folder: Path) -> Table:
    rows = {label: f"{run}_rec" for run, label in RUNS.items()}
    return score_table("Scores of held-out photographs", folder / "out", rows, COLUMNS, NOTE)


def curves(folder: Path) -> list[Chart]:
    """PSNR and sharpness in validation; the two continued runs begin where the first ends."""
    charts = []
    for key, title in CURVES.items():
        series = points_of(folder, RUNS, key)
        first, *others = series
        last = series[first][-1]
        for label in others:
            series[label] = [last, *((last[0] + step, value) for step, value in series[label])]
        charts.append(Chart(title, "step", series))
    return charts


def chapter(folder: Path, page: Path) -> Chapter:
    return replace(
        compared(folder / f"out/{START}_rec_eval", page, COLUMNS),
        title="A GAN",
        text=TEXT,
        tables=[scores(folder), training_table(folder, RUNS)],
        charts=curves(folder),
    )


def pictures(folder: Path) -> Figure:
    """Held-out photographs: the original, then each run's reconstruction."""
    names = sorted(path.name for path in (folder / f"out/{START}_ori").glob("*.png"))
    columns = {f"{START}_ori": "original", **{f"{run}_rec": title for run, title in RUNS.items()}}
    figure = Figure(figsize=(3 * len(columns), 3 * len(names) + 0.3))
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for axis, title in zip(axes[0], columns.values(), strict=True):
        axis.set_title(title, fontsize=9)
    for row, name in zip(axes, names, strict=True):
        for axis, source in zip(row, columns, strict=True):
            with open_image(existing(folder / "out" / source / name)) as image:
                axis.imshow(np.asarray(image), interpolation="nearest")
            axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    return figure


def stacked(folder: Path) -> Image.Image:
    """Curves above pictures, with equal widths."""
    parts = []
    for figure in (plot(curves(folder), 3.4), pictures(folder)):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        drawn = Image.open(file, formats=["PNG"]).convert("RGB")
        parts.append(drawn.resize((1000, round(drawn.height * 1000 / drawn.width)), Image.Resampling.LANCZOS))
    whole = Image.new("RGB", (1000, sum(part.height for part in parts)))
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (0, parts[0].height))
    return whole


def draw(folder: Path, picture: Path) -> None:
    stacked(folder).save(picture, quality=88)
    print(as_text(scores(folder)))


if __name__ == "__main__":
    draw_part(__doc__, draw)

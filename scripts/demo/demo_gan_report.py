"""Draw the GAN part of the demo report; alone, write its curves and reconstructions as one picture and print its table.

    python scripts/demo/demo_gan_report.py demo docs/gan.jpg

Reads runs/RUN/metrics.jsonl, out/RUN_{ori,rec} and their _eval/summary.json, which scripts/demo.sh writes.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from demo_distillation_report import points
from demo_page import as_html, as_text, draw_part, existing, figure_tag, read_json
from matplotlib.figure import Figure
from PIL import Image

from vae3d.data.images import open_image

START = "sd_vae_tiny"
RUNS = {START: "start", "sd_vae_control": "300 steps more", "sd_vae_gan_tiny": "300 steps with the GAN"}
SCORES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "sharpness": "sharpness"}
CURVES = {"val/psnr": "val/psnr (dB)", "val/sharpness": "val/sharpness (1: as sharp as the original)"}

SECTION = """<h2>A GAN</h2>
<p>A toy image VAE on photographs, continued for the same steps with and without a PatchGAN. Scores on held-out
photographs:</p>
{table}
<p><i>Sharpness</i>: the reconstruction's gradient energy over the original's. L1 alone leaves blur. The GAN adds
detail; detail in the wrong place lowers PSNR.</p>
{curves}
<p>Validation during training uses smaller crops than the table.</p>
{pictures}
"""


def scores(folder: Path) -> list[list[str]]:
    """Header and rows: run, scores."""
    rows = [["", *SCORES.values()]]
    for run, title in RUNS.items():
        means = read_json(folder / f"out/{run}_rec_eval/summary.json")["metrics"]
        rows.append([title, *(f"{means[name]['mean']:.{2 if name == 'psnr' else 3}f}" for name in SCORES)])
    return rows


def curves(folder: Path) -> Figure:
    """PSNR and sharpness during training; the two continued runs begin where the first ends."""
    figure = Figure(figsize=(12, 3.4))
    for axis, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        first = points(folder / "runs" / START, key)
        for run, name in RUNS.items():
            steps, values = points(folder / "runs" / run, key)
            if run != START:
                steps = [first[0][-1], *(first[0][-1] + step for step in steps)]
                values = [first[1][-1], *values]
            axis.plot(steps, values, marker="o", markersize=3, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


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


def section(folder: Path) -> str:
    return SECTION.format(
        table=as_html(scores(folder)), curves=figure_tag(curves(folder)), pictures=figure_tag(pictures(folder))
    )


def tables(folder: Path) -> str:
    return as_text(scores(folder))


def stacked(folder: Path) -> Image.Image:
    """Curves above pictures, with equal widths."""
    parts = []
    for figure in (curves(folder), pictures(folder)):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        drawn = Image.open(file, formats=["PNG"]).convert("RGB")
        parts.append(drawn.resize((1000, round(drawn.height * 1000 / drawn.width)), Image.Resampling.LANCZOS))
    whole = Image.new("RGB", (1000, sum(part.height for part in parts)))
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (0, parts[0].height))
    return whole


def report(folder: Path, picture: Path) -> None:
    stacked(folder).save(picture, quality=88)
    print(tables(folder))


if __name__ == "__main__":
    draw_part(__doc__, report)

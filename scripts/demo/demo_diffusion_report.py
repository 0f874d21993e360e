"""Draw the diffusion part of the demo report; alone, write one picture of samples beside data and print the table.

    python scripts/demo/demo_diffusion_report.py demo docs/latent_samples.png

Reads out/RUN/{grid,data} (.png or .mp4) and out/RUN/distances.json of the RUNS below, which scripts/demo.sh writes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from demo_page import as_html, as_text, draw_part, enlarged, image_tag, read_json, read_video
from PIL import Image

from vae3d.data.images import open_image

RUNS = {"ldm_unet_tiny": "UNet, images", "ldm_video_tiny": "video transformer, clips"}
DISTANCES = {"noise": "noise", "samples": "samples", "other latents": "other latents of the data"}
GRID = 10  # columns of the grids that sampling writes
COLUMNS, ROWS = 5, 3  # shown
GAP = 14  # pixels between samples and data

SECTION = """<h2>Diffusion in latents</h2>
<p>Two toy autoencoders, and two diffusion models on their cached latents, by class: a UNet on photographs and a video
transformer on clips. Sliced Wasserstein distance to latents of the data, in their standard deviations:</p>
{table}
<p><i>Noise</i> is what sampling starts from. <i>Other latents of the data</i> are the closest samples can come.</p>
<p>Left samples, right data of the same classes, decoded by the autoencoder. Clips show their first, middle and last
frame. The class of a clip is its photograph; some clips cut to another one.</p>
{pictures}
"""


def scores(folder: Path) -> list[list[str]]:
    """Header and rows: model, distances."""
    rows = [["", *DISTANCES.values()]]
    for run, title in RUNS.items():
        distances = read_json(folder / f"out/{run}/distances.json")
        rows.append(
            [f"{title} ({distances['count']})", *(f"{distances['sliced_wasserstein'][name]:.2f}" for name in DISTANCES)]
        )
    return rows


def frames(folder: Path, name: str) -> np.ndarray:
    """First columns and rows of a grid of samples, [T, H, W, 3] uint8."""
    image = folder / f"{name}.png"
    if image.is_file():
        with open_image(image) as opened:
            grid = np.asarray(opened.convert("RGB"))[None]
    else:
        grid = read_video(folder / f"{name}.mp4")
    cell = -(-grid.shape[2] // GRID)
    return grid[:, : ROWS * cell, : COLUMNS * cell]


def beside(folder: Path) -> np.ndarray:
    """Samples and data of a run side by side, [H, W, 3]; three frames of a video below each other."""
    pair = [frames(folder, name) for name in ("grid", "data")]
    shown = dict.fromkeys((0, len(pair[0]) // 2, len(pair[0]) - 1))
    gap = np.full((pair[0].shape[1], GAP, 3), 255, np.uint8)
    lines = [np.concatenate([pair[0][time], gap, pair[1][time]], axis=1) for time in shown]
    between = np.full((GAP // 2, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (line, between)][:-1])


def section(folder: Path) -> str:
    pictures = "\n".join(f"<p>{image_tag(enlarged(beside(folder / 'out' / run), 2))}</p>" for run in RUNS)
    return SECTION.format(table=as_html(scores(folder)), pictures=pictures)


def tables(folder: Path) -> str:
    return as_text(scores(folder))


def report(folder: Path, picture: Path) -> None:
    parts = [Image.fromarray(beside(folder / "out" / run)) for run in RUNS]
    width = max(part.width for part in parts)
    parts = [part.resize((width, round(part.height * width / part.width)), Image.Resampling.LANCZOS) for part in parts]
    whole = Image.new("RGB", (width, sum(part.height for part in parts) + GAP), "white")
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (0, parts[0].height + GAP))
    whole.quantize(256).save(picture, optimize=True)
    print(tables(folder))


if __name__ == "__main__":
    draw_part(__doc__, report)

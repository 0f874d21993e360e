"""The distillation's part of the demo report; by itself, its curves as one picture and its tables.

    python scripts/demo/demo_distillation_report.py demo docs/distillation.png

Reads what scripts/demo.sh leaves in the folder: runs/{TEACHER,STUDENT}/metrics.jsonl, out/STUDENT_rec/comparison.json
and the strips of pictures in out/STUDENT_compare.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_page import as_html, as_text, draw_part, existing, figure_tag, history, image_tag, read_json
from matplotlib.figure import Figure

from vae3d.data.images import open_image
from vae3d.errors import UserError

TEACHER, STUDENT = "taehv_teacher_tiny", "taehv_tiny"
LOSSES = {"loss/latent": "latents: |student - teacher|", "loss/features": "features in the decoder: squared error"}
SMOOTH = 'style="image-rendering: auto"'  # the strips hold text and are wider than the page

SECTION = """<h2>A tiny decoder</h2>
<p>A TAEHV, the student, learned the latents of a toy VAE of Wan's kind, its teacher, and to decode them. Each then
decodes what the other encodes. Held-out clips, {clip}:</p>
{pairs}
<p><i>PSNR</i>: of the error over all frames of a clip; both scores are means over clips. The last row is what frames
of one colour reach. A decoder that stands in for the teacher's comes near <i>teacher, teacher</i> with the teacher's
latents.</p>
{warnings}
{networks}
<p><i>Parameters</i>: of encoder and decoder together. Speed on {device}, one clip.</p>
{curves}
<p>Validation during training is on shorter and smaller clips than the tables' scores.</p>
<p>The clips with the best and the worst PSNR of the student alone, encoder &gt; decoder:</p>
{strips}
"""


def comparison(folder: Path) -> dict[str, Any]:
    """What scripts/compare.py wrote of student and teacher."""
    return read_json(folder / f"out/{STUDENT}_rec/comparison.json")


def pairs(told: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: whose encoder, whose decoder, scores."""
    means = told["mean"]
    rows = [["encoder", "decoder", "PSNR (dB)", "SSIM"]]
    for pair, scores in means["pairs"].items():
        rows.append([*pair.split(" -> "), f"{scores['psnr_video']:.2f}", f"{scores['ssim']:.4f}"])
    return [*rows, ["mean colour", "", f"{means['baseline']['mean_colour']:.2f}", ""]]


def networks(told: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: whose, network, parameters, frames per second."""
    rows = [["", "network", "parameters", "encodes, frames/s", "decodes, frames/s"]]
    for whose in ("student", "teacher"):
        cost = told["cost"][whose]
        speeds = [f"{cost[f'{what}_frames_per_second']:.0f}" for what in ("encode", "decode")]
        rows.append([whose, told[whose]["network"], f"{told[whose]['parameters']:,}", *speeds])
    return rows


def points(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a run's metric. Raises UserError if the run did not write it."""
    lines = [line for line in history(run) if key in line]
    if not lines:
        raise UserError(f"{run / 'metrics.jsonl'} has no {key}: the run stopped before; go on with scripts/demo.sh")
    return [line["step"] for line in lines], [line[key] for line in lines]


def curves(folder: Path) -> Figure:
    """The student's validation PSNR beside its teacher's last, and its losses against the teacher."""
    teacher, student = folder / "runs" / TEACHER, folder / "runs" / STUDENT
    figure = Figure(figsize=(12, 3.2))
    psnr, *losses = figure.subplots(1, 1 + len(LOSSES))
    last = points(teacher, "val/psnr")[1][-1]
    psnr.axhline(last, color="gray", linestyle="--", label=f"teacher, {last:.2f} dB")
    psnr.plot(*points(student, "val/psnr"), marker="o", label="student")
    psnr.set_title("val/psnr (dB)", fontsize=9)
    psnr.legend(fontsize=8)
    for axis, (key, title) in zip(losses, LOSSES.items(), strict=True):
        axis.plot(*points(student, key))
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=9)
    for axis in (psnr, *losses):
        axis.set_xlabel("step")
    figure.tight_layout()
    return figure


def best_and_worst(told: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Of the files, by the student's own reconstruction; one file is both."""
    ranked = sorted(told["files"], key=own_psnr, reverse=True)
    return ranked[:: max(1, len(ranked) - 1)]


def own_psnr(file: Mapping[str, Any]) -> float:
    return file["pairs"]["student -> student"]["psnr_video"]


def strip(file: Mapping[str, Any], folder: Path) -> str:
    with open_image(existing(folder / f"out/{STUDENT}_compare/{file['file']}.png")) as picture:
        return f"<h3>{html.escape(file['file'])}: {own_psnr(file):.2f} dB</h3>\n{image_tag(picture, SMOOTH)}"


def section(folder: Path) -> str:
    told = comparison(folder)
    clip = told["cost"]["student"]
    return SECTION.format(
        clip=f"{clip['frames']} frames of {clip['height']} &times; {clip['width']}",
        pairs=as_html(pairs(told)),
        warnings="\n".join(f"<p><b>{html.escape(warning)}</b></p>" for warning in told["warnings"]),
        networks=as_html(networks(told)),
        device=html.escape(clip["device"]),
        curves=figure_tag(curves(folder)),
        strips="\n".join(strip(file, folder) for file in best_and_worst(told)),
    )


def tables(folder: Path) -> str:
    told = comparison(folder)
    return f"{as_text(pairs(told))}\n\n{as_text(networks(told))}"


def report(folder: Path, picture: Path) -> None:
    curves(folder).savefig(picture, dpi=110)
    print(tables(folder))


if __name__ == "__main__":
    draw_part(__doc__, report)

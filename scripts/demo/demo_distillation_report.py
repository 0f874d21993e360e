"""Draw the distillation part of the demo report; alone, write its curves as one picture and print its tables.

    python scripts/demo/demo_distillation_report.py demo docs/distillation.png

Reads runs/{TEACHER,STUDENT}/metrics.jsonl, out/STUDENT_rec/comparison.json and links to the page
out/STUDENT_compare, which scripts/demo.sh writes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_page import as_html, as_text, draw_part, existing, figure_tag, history, read_json
from matplotlib.figure import Figure

from vae3d.errors import UserError
from vae3d.report.page import clip_id

TEACHER, STUDENT = "taehv_teacher_tiny", "taehv_tiny"
LOSSES = {"loss/latent": "latents: |student - teacher|", "loss/features": "features in the decoder: squared error"}

SECTION = """<h2>A tiny decoder</h2>
<p>A TAEHV, the student, learned to encode and decode the latents of a toy Wan VAE, its teacher. Each then decodes the
other's latents. Held-out clips, {clip}:</p>
{pairs}
<p><i>PSNR</i>: of the error over all frames of a clip. Both scores are means over clips. The last row is the score of
frames of one colour. A decoder that can replace the teacher's comes near <i>teacher, teacher</i> with the teacher's
latents.</p>
{warnings}
{networks}
<p><i>Parameters</i>: of encoder and decoder together. Speed on {device}, one clip.</p>
{curves}
<p>Validation during training uses shorter and smaller clips than the tables.</p>
<p>Clips with the best and the worst PSNR of the student, moving:</p>
{links}
"""


def comparison(folder: Path) -> dict[str, Any]:
    """The file that scripts/compare.py writes."""
    return read_json(folder / f"out/{STUDENT}_rec/comparison.json")


def pairs(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: encoder, decoder, scores."""
    means = results["mean"]
    rows = [["encoder", "decoder", "PSNR (dB)", "SSIM"]]
    for pair, scores in means["pairs"].items():
        rows.append([*pair.split(" -> "), f"{scores['psnr_video']:.2f}", f"{scores['ssim']:.4f}"])
    return [*rows, ["mean colour", "", f"{means['baseline']['mean_colour']:.2f}", ""]]


def networks(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: student or teacher, network, parameters, frames per second."""
    rows = [["", "network", "parameters", "encodes, frames/s", "decodes, frames/s"]]
    for name in ("student", "teacher"):
        cost = results["cost"][name]
        speeds = [f"{cost[f'{what}_frames_per_second']:.0f}" for what in ("encode", "decode")]
        rows.append([name, results[name]["network"], f"{results[name]['parameters']:,}", *speeds])
    return rows


def points(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a run's metric. Raises UserError if the run has none."""
    lines = [line for line in history(run) if key in line]
    if not lines:
        raise UserError(
            f"{run / 'metrics.jsonl'} has no {key}: the run is not finished; continue it with scripts/demo.sh"
        )
    return [line["step"] for line in lines], [line[key] for line in lines]


def curves(folder: Path) -> Figure:
    """The student's validation PSNR with the teacher's last, and the student's losses."""
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


def best_and_worst(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The files with the best and the worst PSNR of the student; one file if there is only one."""
    ranked = sorted(results["files"], key=own_psnr, reverse=True)
    return ranked[:: max(1, len(ranked) - 1)]


def own_psnr(file: Mapping[str, Any]) -> float:
    return file["pairs"]["student -> student"]["psnr_video"]


def link(file: Mapping[str, Any], folder: Path) -> str:
    page = existing(folder / f"out/{STUDENT}_compare/index.html").relative_to(folder)
    target = f"{page}#video={clip_id(file['file'])}"
    return f'<p><a href="{html.escape(target)}">{html.escape(file["file"])}: {own_psnr(file):.2f} dB</a></p>'


def section(folder: Path) -> str:
    results = comparison(folder)
    clip = results["cost"]["student"]
    return SECTION.format(
        clip=f"{clip['frames']} frames of {clip['height']} &times; {clip['width']}",
        pairs=as_html(pairs(results)),
        warnings="\n".join(f"<p><b>{html.escape(warning)}</b></p>" for warning in results["warnings"]),
        networks=as_html(networks(results)),
        device=html.escape(clip["device"]),
        curves=figure_tag(curves(folder)),
        links="\n".join(link(file, folder) for file in best_and_worst(results)),
    )


def tables(folder: Path) -> str:
    results = comparison(folder)
    return f"{as_text(pairs(results))}\n\n{as_text(networks(results))}"


def report(folder: Path, picture: Path) -> None:
    curves(folder).savefig(picture, dpi=110)
    print(tables(folder))


if __name__ == "__main__":
    draw_part(__doc__, report)

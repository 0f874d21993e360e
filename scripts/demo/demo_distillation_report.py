"""The chapter of the demo's page on distillation; alone, write its curves as one picture and print its tables.

    python scripts/demo/demo_distillation_report.py demo docs/distillation.png

Reads runs/{TEACHER,STUDENT}, out/STUDENT_rec/comparison.json and the page in out/STUDENT_compare, which scripts/demo.sh
writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo_page import as_text, compared, draw_part, plot, points, read_json, training_table
from markupsafe import Markup

from vae3d.report.page import Chapter, Chart, Table

TEACHER, STUDENT = "taehv_teacher_tiny", "taehv_tiny"
LOSSES = {"loss/latent": "latents: |student - teacher|", "loss/features": "features in the decoder: squared error"}

TEXT = Markup("""
<p>A TAEHV, the student, learned to encode and decode the latents of a toy Wan VAE, its teacher. Each then decodes the
other's latents: <i>teacher -&gt; student</i> is encoded by the teacher and decoded by the student. A decoder that can
replace the teacher's makes this pair look like <i>teacher -&gt; teacher</i>: wipe between the two. You see clips that
neither has seen.</p>
""")


def comparison(folder: Path) -> dict[str, Any]:
    """The file that vae3d compare writes."""
    return read_json(folder / f"out/{STUDENT}_rec/comparison.json")


def pairs(results: Mapping[str, Any]) -> Table:
    means, clip = results["mean"], results["cost"]["student"]
    rows = [
        [*pair.split(" -> "), f"{scores['psnr_video']:.2f}", f"{scores['ssim']:.4f}"]
        for pair, scores in means["pairs"].items()
    ]
    rows.append(["frames of the mean colour", "", f"{means['baseline']['mean_colour']:.2f}", ""])
    note = (
        f"Held-out clips, {clip['frames']} frames of {clip['height']} x {clip['width']}; means over clips. PSNR: of "
        "the error over all frames of a clip. Validation during training uses shorter and smaller clips."
    )
    return Table("Scores", ["encoder", "decoder", "PSNR (dB)", "SSIM"], rows, note)


def networks(results: Mapping[str, Any]) -> Table:
    rows = []
    for name in ("student", "teacher"):
        cost = results["cost"][name]
        speeds = [f"{cost[f'{what}_frames_per_second']:.0f}" for what in ("encode", "decode")]
        rows.append([name, results[name]["network"], f"{results[name]['parameters']:,}", *speeds])
    head = ["", "network", "parameters", "encodes, frames/s", "decodes, frames/s"]
    return Table("Networks", head, rows, f"Speed on {results['cost']['student']['device']}, one clip.")


def curves(folder: Path) -> list[Chart]:
    """The student's validation PSNR with the teacher's last, and the student's losses."""
    student = folder / "runs" / STUDENT
    line = points(student, "val/psnr")
    (_, last) = points(folder / "runs" / TEACHER, "val/psnr")[-1]
    teacher = [(line[0][0], last), (line[-1][0], last)]
    psnr = Chart("val/psnr (dB)", "step", {"student": line, f"teacher, {last:.2f} dB at its end": teacher})
    return [psnr, *(Chart(title, "step", {"student": points(student, key)}) for key, title in LOSSES.items())]


def chapter(folder: Path, page: Path) -> Chapter:
    results = comparison(folder)
    return replace(
        compared(folder / f"out/{STUDENT}_compare", page, ("psnr", "psnr_video", "ssim")),
        title="A tiny decoder",
        text=TEXT,
        tables=[
            pairs(results),
            networks(results),
            training_table(folder, {TEACHER: "teacher", STUDENT: "student"}),
        ],
        charts=curves(folder),
        warnings=results["warnings"],
    )


def draw(folder: Path, picture: Path) -> None:
    plot(curves(folder), 3.2).savefig(picture, dpi=110)
    results = comparison(folder)
    print(f"{as_text(pairs(results))}\n\n{as_text(networks(results))}")


if __name__ == "__main__":
    draw_part(__doc__, draw)

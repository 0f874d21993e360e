"""Write one page of the finished parts of a demo, demo/report/index.html, and print their tables.

    python scripts/demo/demo_report.py demo

A part is finished when the folder has commands/PART.txt, which scripts/demo.sh writes last. demo_PART_report.py lists
the other files that a part reads.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import av
import demo_clips_report
import demo_diffusion_report
import demo_distillation_report
import demo_gan_report
import demo_panoramas_report
import demo_stages_report
import torch
from demo_page import as_text, exit_on_user_error
from markupsafe import Markup

from vae3d import __version__
from vae3d.errors import UserError
from vae3d.report.page import PAGE, Chapter, Report, write_page

PARTS = {
    "clips": demo_clips_report,
    "stages": demo_stages_report,
    "gan": demo_gan_report,
    "panoramas": demo_panoramas_report,
    "distillation": demo_distillation_report,
    "diffusion": demo_diffusion_report,
}
CHECKPOINTS = {  # part -> what it trained, in the order in which they are proposed for videos
    "clips": "clips_stage3",
    "stages": "stage3",
    "distillation": "taehv_tiny",
    "panoramas": "wan_tiny",
    "gan": "sd_vae_tiny",
}

TEXT = Markup("""
<p>scripts/demo.sh has trained these toy networks on a CPU and written this page. Toys show that the parts work
together, not how good they get: docs/results.md has figures of released weights.</p>
<p>Each chapter has a player, in which the original and all reconstructions move in step, the scores of every video, the
curves of the training, and the commands that made it all. Above a picture you choose what it shows: <i>error</i>
is what is wrong, <i>change</i> is what moves. Press <kbd>?</kbd> for the keys. {next}</p>
""")
NEXT = "The last chapter has the commands for your own videos."
OWN = Markup("""
<p>Your video through the toy; through TAEF2, a released autoencoder, which is downloaded once (5 MB); and a folder of
videos, with scores. Each command writes a page like this one and prints where it is. docs/look.md says what to look
for. To train or fine-tune for real, choose a row of the table <i>I have, I want, I take</i> in README.md.</p>
""")
COMMANDS = """\
source .venv/bin/activate
vae3d try my.mp4 {checkpoint}
vae3d try my.mp4
vae3d infer checkpoint={checkpoint} source=my_videos save_dir=out/mine report=true metrics=[psnr,ssim]
vae3d app {checkpoint} --videos my_videos
"""


def finished(folder: Path) -> dict[str, str]:
    """Commands of each finished part. Raises UserError if no part is finished."""
    files = {part: folder / f"commands/{part}.txt" for part in PARTS}
    found = {part: file.read_text() for part, file in files.items() if file.is_file()}
    if not found:
        raise UserError(
            f"{folder} has no finished part of a demo; run scripts/demo.sh, which has the parts {', '.join(PARTS)}"
        )
    return found


def own_videos(folder: Path, parts: dict[str, str]) -> list[Chapter]:
    """What to do next with what the finished parts have trained; nothing if none codes videos or images."""
    trained = [run for part, run in CHECKPOINTS.items() if part in parts]
    if not trained:
        return []
    return [Chapter("Your own videos", OWN, commands=COMMANDS.format(checkpoint=folder / "runs" / trained[0]))]


def write_report(folder: Path) -> None:
    """Write folder/report/index.html and print its tables. Raises UserError if a file of a finished part is missing."""
    parts, page = finished(folder), folder / "report"
    chapters = [
        replace(PARTS[part].chapter(folder, page), commands=commands.strip()) for part, commands in parts.items()
    ]
    following = own_videos(folder, parts)
    facts = {
        "folder": str(folder.resolve()),
        "machine": f"{os.cpu_count()} CPU cores; the demo used {torch.get_num_threads()} threads",
        "versions": f"vae3d {__version__}, torch {torch.__version__}, av {av.__version__}",
    }
    text = TEXT.format(next=NEXT if following else "")
    write_page(page, Report("vae3d demo", [*chapters, *following], text, facts))
    for chapter in chapters:
        print(f"{chapter.title}\n")
        for table in chapter.tables:
            print(f"{as_text(table)}\n")
    print(f"page with moving pictures: {(page / PAGE).resolve()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    exit_on_user_error(lambda: write_report(folder))


if __name__ == "__main__":
    main()

"""Write one self-contained HTML page of the finished parts of a demo, and print their tables.

    python scripts/demo/demo_report.py demo

A part is finished when the folder has commands/PART.txt, which scripts/demo.sh writes last. demo_PART_report.py lists
the other files that a part reads.
"""

from __future__ import annotations

import argparse
import html
from pathlib import Path

import demo_diffusion_report
import demo_distillation_report
import demo_gan_report
import demo_panoramas_report
import demo_stages_report
from demo_page import exit_on_user_error

from vae3d.errors import UserError

PARTS = {
    "stages": demo_stages_report,
    "gan": demo_gan_report,
    "panoramas": demo_panoramas_report,
    "distillation": demo_distillation_report,
    "diffusion": demo_diffusion_report,
}

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>vae3d demo</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
  h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }}
  table {{ border-collapse: collapse }}
  td, th {{ padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right }}
  td:first-child, th:first-child {{ text-align: left }}
  .strip {{ display: grid; grid-template-columns: 8rem auto; gap: .3rem .6rem; align-items: center }}
  .strip span {{ color: #555; text-align: right }}
  img {{ max-width: 100%; image-rendering: pixelated }} pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }}
</style>
<h1>vae3d demo</h1>
<p>Toy networks, trained on a CPU. They show that the parts work together, not how good they get.</p>
{sections}
"""

COMMANDS = "<details><summary>Commands</summary><pre>{}</pre></details>\n"


def finished(folder: Path) -> dict[str, str]:
    """Commands of each finished part. Raises UserError if no part is finished."""
    files = {part: folder / f"commands/{part}.txt" for part in PARTS}
    found = {part: file.read_text() for part, file in files.items() if file.is_file()}
    if not found:
        raise UserError(
            f"{folder} has no finished part of a demo; run scripts/demo.sh, which has the parts {', '.join(PARTS)}"
        )
    return found


def write_report(folder: Path) -> None:
    """Write folder/report.html and print its tables. Raises UserError if a file of a finished part is missing."""
    parts = finished(folder)
    sections = [
        PARTS[part].section(folder) + COMMANDS.format(html.escape(commands)) for part, commands in parts.items()
    ]
    report = folder / "report.html"
    report.write_text(PAGE.format(sections="\n".join(sections)))
    for part in parts:
        print(f"{PARTS[part].tables(folder)}\n")
    print(f"report with pictures and curves: {report.resolve()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    exit_on_user_error(lambda: write_report(folder))


if __name__ == "__main__":
    main()

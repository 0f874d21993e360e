"""Write one self-contained HTML page about the finished parts of a demo, and print their tables of scores.

    python scripts/demo/demo_report.py demo

A part is finished once commands/PART.txt is in the folder, which scripts/demo.sh puts there last; what else of a part
is read stands in demo_PART_report.py.
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
<p>Toy networks, trained on a processor. They show that the parts work together, not what the parts can do.</p>
{sections}
"""

COMMANDS = "<details><summary>Commands</summary><pre>{}</pre></details>\n"


def finished(folder: Path) -> dict[str, str]:
    """Part -> its commands. Raises UserError if there is none."""
    files = {part: folder / f"commands/{part}.txt" for part in PARTS}
    found = {part: file.read_text() for part, file in files.items() if file.is_file()}
    if not found:
        raise UserError(f"{folder} has no finished part of a demo; scripts/demo.sh makes {', '.join(PARTS)}")
    return found


def write_report(folder: Path) -> None:
    """folder/report.html, and its tables to the console. Raises UserError if a file of a finished part is missing."""
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

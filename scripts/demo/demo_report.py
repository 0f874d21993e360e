"""Write one self-contained HTML page of the finished parts of a demo, and print their tables.

    python scripts/demo/demo_report.py demo

A part is finished when the folder has commands/PART.txt, which scripts/demo.sh writes last. demo_PART_report.py lists
the other files that a part reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import demo_clips_report
import demo_diffusion_report
import demo_distillation_report
import demo_gan_report
import demo_panoramas_report
import demo_stages_report
from demo_page import exit_on_user_error
from markupsafe import Markup

from vae3d.errors import UserError
from vae3d.report.html import render

PARTS = {
    "clips": demo_clips_report,
    "stages": demo_stages_report,
    "gan": demo_gan_report,
    "panoramas": demo_panoramas_report,
    "distillation": demo_distillation_report,
    "diffusion": demo_diffusion_report,
}

PAGE = """{% extends "page.html" %}
{% block style %}img { image-rendering: pixelated }{% endblock %}
{% block content %}
<p>Toy networks, trained on a CPU. They show that the parts work together, not how good they get.</p>
{% for section, commands in sections %}
{{ section }}
<details><summary>Commands</summary><pre>{{ commands }}</pre></details>
{% endfor %}
{% endblock %}
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


def write_report(folder: Path) -> None:
    """Write folder/report.html and print its tables. Raises UserError if a file of a finished part is missing."""
    parts = finished(folder)
    sections = [(Markup(PARTS[part].section(folder)), commands) for part, commands in parts.items()]
    report = folder / "report.html"
    report.write_text(render(PAGE, title="vae3d demo", sections=sections))
    for part in parts:
        print(f"{PARTS[part].tables(folder)}\n")
    print(f"report with pictures: {report.resolve()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    exit_on_user_error(lambda: write_report(folder))


if __name__ == "__main__":
    main()

"""docs/speed.svg, the chart of speed-ups in README.md, from docs/speed.json: python docs/make_speed_chart.py

Each entry quotes the page that has the figure with its command, machine and versions; tests/test_docs.py compares them.
Those with a `line` instead have the ratio of the last run in docs/networks.json, whose table is in docs/speed.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent
TEXT = "#7a7a7a"  # readable on white and on black
BAR, COUNTED = "#3f8fd2", "#b58b3c"


def entries() -> list[dict[str, Any]]:
    return json.loads((DOCS / "speed.json").read_text())


def runs() -> list[dict[str, Any]]:
    """Of scripts/benchmarks/bench_networks.py, the newest last."""
    return json.loads((DOCS / "networks.json").read_text())["runs"]


def ratio(entry: dict[str, Any]) -> float:
    if "line" in entry:
        return runs()[-1]["rows"][entry["line"]]["ratio"]
    return entry["ratio"] if "ratio" in entry else entry["before"] / entry["after"]


def draw(target: Path) -> None:
    rows = sorted(entries(), key=ratio)
    style = {"svg.hashsalt": "vae3d", "text.color": TEXT, "axes.edgecolor": TEXT, "font.size": 11}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.5, 0.38 * len(rows) + 0.5))
        colours = [COUNTED if "counted" in row["against"] else BAR for row in rows]
        axes.barh(range(len(rows)), [ratio(row) for row in rows], color=colours, height=0.6)
        for place, row in enumerate(rows):
            label = f"{ratio(row):.3g} x  {row['against']}"
            axes.text(ratio(row) + 0.15, place, label, va="center")
        axes.axvline(1, color=TEXT, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
        axes.tick_params(colors=TEXT, length=0)
        axes.set_xlim(0, 1.2 * ratio(rows[-1]) + 3)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.set_title("Times as fast as ... (one CPU thread)", loc="left", fontsize=12)
        figure.savefig(target, transparent=True, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(DOCS / "speed.svg")

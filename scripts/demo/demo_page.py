"""Shared by the chapters of the demo's page: reads results, makes tables and charts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image
from safetensors import safe_open

from vae3d.errors import UserError
from vae3d.report import text_table
from vae3d.report.page import PAGE, Chapter, Chart, Table, take_videos

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING_NOTE = "Time is that of the steps: without start, validation and checkpoints."


def exit_on_user_error(run: Callable[[], None]) -> None:
    """Call run(). On a UserError print its message and exit with status 2."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def draw_part(doc: str | None, draw: Callable[[Path, Path], None]) -> None:
    """Command line of one part alone: the demo's folder and the picture to write."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    exit_on_user_error(lambda: draw(args.folder, args.picture))


def existing(path: Path) -> Path:
    """The path. Raises UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run scripts/demo.sh, which writes it")
    return path


def read_json(path: Path) -> Any:
    return json.loads(existing(path).read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in existing(path).read_text().splitlines()]


def read_video(path: Path) -> np.ndarray:
    """All frames, [T, H, W, 3] uint8."""
    with av.open(str(existing(path))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def enlarged(frame: np.ndarray, times: int) -> Image.Image:
    image = Image.fromarray(frame)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def compared(scores: Path, page: Path, columns: Iterable[str]) -> Chapter:
    """The videos of the page of `vae3d eval` or `compare` in the folder `scores`, for the demo's page in `page`."""
    existing(scores / PAGE)
    return take_videos(scores, page, f"{scores.name}-", [*columns])


def score_table(
    title: str, out: Path, folders: Mapping[str, str], columns: Mapping[str, tuple[str, int]], note: str = ""
) -> Table:
    """Means of reconstructions. folders: label -> folder in out. columns: score -> header, digits."""

    def row(label: str, folder: str) -> list[str]:
        means = read_json(out / f"{folder}_eval/summary.json")["metrics"]
        return [label, *(f"{means[c]['mean']:.{n}f}" if c in means else "not fetched" for c, (_, n) in columns.items())]

    head = ["", *(header for header, _ in columns.values())]
    return Table(title, head, [row(label, folder) for label, folder in folders.items()], note)


def training_table(folder: Path, runs: Mapping[str, str]) -> Table:
    """What was trained, and how long it took. runs: name in folder/runs -> label."""
    rows = []
    for run, label in runs.items():
        path = folder / "runs" / run
        config = read_lines(path / "launches.jsonl")[-1]["config"]
        batch = config["data"]["batch_size"] * config["trainer"]["accumulate"]
        step, seconds = 0, 0.0
        for line in read_lines(path / "metrics.jsonl"):
            if "clips_per_second" in line and line["step"] > step:  # a run that was killed repeats steps
                seconds += (line["step"] - step) * batch / line["clips_per_second"]
                step = line["step"]
        rows.append([label, f"{parameters(path):,}", f"{step:,}", str(batch), duration(seconds), str(path)])
    return Table("Training", ["", "parameters", "steps", "clips per step", "time", "folder"], rows, TRAINING_NOTE)


def parameters(run: Path) -> int:
    """Number of weights in the newest export of a run. Raises UserError if there is none."""
    exports = sorted(run.glob("exports/*/model.safetensors"))
    with safe_open(existing(exports[-1] if exports else run / "exports"), "np") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def points(run: Path, key: str) -> list[tuple[int, float]]:
    """Steps and values of a run's metric. Raises UserError if the run has none."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if key in line]
    if not lines:
        raise UserError(
            f"{run / 'metrics.jsonl'} has no {key}: the run is not finished; continue it with scripts/demo.sh"
        )
    return [(line["step"], line[key]) for line in lines]


def points_of(folder: Path, runs: Mapping[str, str], key: str) -> dict[str, list[tuple[int, float]]]:
    """Label -> points. runs: name in folder/runs -> label."""
    return {label: points(folder / "runs" / run, key) for run, label in runs.items()}


def plot(charts: Sequence[Chart], height: float) -> Figure:
    """The charts side by side, for a picture."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(12, height))
    for axis, chart in zip(figure.subplots(1, len(charts)), charts, strict=True):
        for label, line in chart.series.items():
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=label)
        axis.set_title(chart.title, fontsize=9)
        axis.set_xlabel(chart.x)
        axis.set_yscale("log" if chart.log else "linear")
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def as_text(table: Table) -> str:
    return text_table(table.head, table.rows)

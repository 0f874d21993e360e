"""An evaluation as one HTML page: scores, histograms, curves over frames, worst and best clips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from vae3d.evaluation.pairs import PairReader
from vae3d.evaluation.score import Job
from vae3d.evaluation.store import VideoScore
from vae3d.evaluation.tables import metric_table
from vae3d.io import write_text
from vae3d.metrics.base import Better, goodness
from vae3d.pixels import over_grey, quantize
from vae3d.report import number
from vae3d.report.html import html_table, img, render, resize_to_width, subplots, svg

RANKED_BY = ("lpips_alex", "lpips_vgg", "psnr", "ssim")  # the first that was computed ranks the clips
CLIPS = 3  # number of best and of worst clips
FRAMES = 5  # per clip, the worst one included
WIDTH = 224  # pixels of a frame in the page
ERROR_GAIN = 4  # error maps show |original - reconstruction| times this
MAX_WARNINGS = 30
COLOR = "#4c78a8"

PAGE = Path(__file__).with_name("report.html").read_text()


def write_html(
    path: Path,
    summary: Mapping[str, Any],
    videos: Sequence[VideoScore],
    jobs: Sequence[Job],
    columns: Mapping[str, Better],
) -> None:
    """Write the page. summary: from summary.summarize. columns: metric -> which values are better."""
    by_name = {job.pair.name: job for job in jobs}
    columns = {c: better for c, better in columns.items() if any(_values(videos, c))}
    ranked_by, shown = _worst_and_best(videos, columns)
    warnings = [*summary["warnings"], *summary["unmatched"], *summary["failed"]]
    if (extra := len(warnings) - MAX_WARNINGS) > 0:
        warnings = [*warnings[:MAX_WARNINGS], f"... {extra} more in summary.json"]
    details = {key: summary[key] for key in ("preset", "protocol", "settings", "counts", "weights", "versions")}
    page = render(
        PAGE,
        title=f"Reconstruction quality: {Path(summary['generated_video_dir']).name}",
        summary=summary,
        warnings=warnings,
        table=html_table(*metric_table(summary)),
        histograms=_histograms(videos, columns),
        curves=_frame_curves(videos, columns),
        ranked_by=ranked_by,
        gain=ERROR_GAIN,
        clips=[_clip(video, by_name[video.name], ranked_by, columns) for video in shown],
        details=json.dumps(details, indent=2, default=str),
    )
    write_text(path, page)


def _values(videos: Sequence[VideoScore], column: str) -> list[float]:
    scores = (video.scores[column].value for video in videos if column in video.scores)
    return [value for value in scores if value is not None]


def _worst_and_best(videos: Sequence[VideoScore], columns: Mapping[str, Better]) -> tuple[str, list[VideoScore]]:
    """The metric that ranks the clips, and the clips to show: the worst first, the best last, each once."""
    directed = [column for column, better in columns.items() if better is not None]
    if not directed:
        return "name", list(videos[:CLIPS])
    by = next((column for column in RANKED_BY if column in directed), directed[0])
    scored = [video for video in videos if by in video.scores and video.scores[by].value is not None]
    order = sorted(scored, key=lambda video: goodness(video.scores[by].value, columns[by]))
    return by, order if len(order) <= 2 * CLIPS else [*order[:CLIPS], *order[-CLIPS:]]


def _histograms(videos: Sequence[VideoScore], columns: Mapping[str, Better]) -> Markup:
    if not columns:
        return Markup("<p>no metric of single videos</p>")
    figure, axes = subplots(len(columns), columns=3, width=4, height=2.6)
    for axis, column in zip(axes, columns, strict=True):
        values = _values(videos, column)
        axis.hist(values, bins=min(30, max(5, len(values) // 3)), color=COLOR)
        axis.axvline(float(np.mean(values)), color="#222", linewidth=1)
        axis.set_title(column, fontsize=10)
        axis.set_ylabel("videos", fontsize=8)
        axis.ticklabel_format(axis="x", useOffset=False)
    return svg(figure)


def _frame_curves(videos: Sequence[VideoScore], columns: Mapping[str, Better]) -> Markup:
    series = {c: [v.scores[c].frames for v in videos if c in v.scores and v.scores[c].frames] for c in columns}
    series = {column: frames for column, frames in series.items() if frames}
    if not series:
        return Markup("<p>no metric of single frames</p>")
    figure, axes = subplots(len(series), columns=3, width=4, height=2.6)
    for axis, (column, frames) in zip(axes, series.items(), strict=True):
        longest = max(map(len, frames))
        at_frame = [[values[t] for values in frames if t < len(values)] for t in range(longest)]
        low, high = zip(*(np.percentile(values, [5, 95]) for values in at_frame), strict=True)
        means = [float(np.mean(values)) for values in at_frame]
        axis.fill_between(range(longest), low, high, color=COLOR, alpha=0.25, linewidth=0)
        axis.plot(means, color=COLOR, marker="." if longest < 40 else None)
        axis.set_title(column, fontsize=10)
        axis.set_xlabel("frame", fontsize=8)
        axis.ticklabel_format(useOffset=False)
    return svg(figure)


def _clip(video: VideoScore, job: Job, by: str, columns: Mapping[str, Better]) -> dict[str, Any]:
    """Name, scores and rows of frames: original, reconstruction, error."""
    indices = _shown_frames(video, by, columns)
    with PairReader(job.pair, job.protocol) as reader:
        ref, rec = (over_grey(frames) if frames.shape[1] == 4 else frames for frames in reader.read(indices))
    return {
        "name": video.name,
        "scores": ", ".join(f"{c} {number(video.scores[c].value)}" for c in columns if c in video.scores),
        "frames": ", ".join(map(str, indices)),
        "rows": {
            "original": _frame_row(ref),
            "reconstruction": _frame_row(rec),
            Markup(f"error &times; {ERROR_GAIN}"): _frame_row(((ref - rec).abs() * ERROR_GAIN).clamp(0, 1)),
        },
    }


def _shown_frames(video: VideoScore, by: str, columns: Mapping[str, Better]) -> list[int]:
    """Evenly spread frames, of which the one nearest to the worst frame is replaced by it."""
    shown = np.linspace(0, video.info.frames - 1, min(FRAMES, video.info.frames)).round().astype(int).tolist()
    series = video.scores[by].frames if by in video.scores else []
    if series:
        worst = int(np.argmin([goodness(value, columns[by]) for value in series]))
        nearest = min(range(len(shown)), key=lambda i: abs(shown[i] - worst))
        shown[nearest] = worst
    return shown


def _frame_row(frames: Tensor) -> Markup:
    """[T, 3, H, W] in [0, 1], side by side."""
    pixels = quantize(frames, "unit").permute(0, 2, 3, 1).numpy()
    resized = [np.asarray(resize_to_width(Image.fromarray(frame), WIDTH)) for frame in pixels]
    row = np.concatenate(resized, axis=1)
    return img(Image.fromarray(row), format="JPEG", quality=92, subsampling=0)

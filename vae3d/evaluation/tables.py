"""Evaluation results as text and CSV."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vae3d.data.table.rows import QUOTED_CSV
from vae3d.evaluation.store import VideoScore
from vae3d.io import write_text
from vae3d.report import number, text_table
from vae3d.text import plural

MAX_VIDEOS = 20  # rows of a printed table
MAX_COLUMNS = 8  # with more metrics, the table has a row per metric


def set_table(summary: dict[str, Any]) -> str:
    """A row per video (at most MAX_VIDEOS) and one for the set; with many metrics, a row per metric."""
    columns = list(summary["metrics"])
    if len(columns) > MAX_COLUMNS:
        return text_table(*metric_table(summary))
    videos = summary["per_video"]
    rows: list[Sequence[str] | None] = [
        [video["name"], str(video["frames"]), *(number(video.get(column)) for column in columns)]
        for video in videos[:MAX_VIDEOS]
    ]
    if len(videos) > MAX_VIDEOS:
        rows.append([f"... {len(videos) - MAX_VIDEOS} more in per_video.csv", "", *("" for _ in columns)])
    metrics = summary["metrics"].values()
    rows += [None, [_mean_label(summary), str(summary["frames"]), *(number(m["mean"]) for m in metrics)]]
    if len(videos) > 1:
        show = _half_width if _averages_videos(summary) else _ends
        rows.append([f"  {_interval_label(summary)}", "", *(show(m.get("ci95")) for m in metrics)])
        rows.append(["  standard deviation", "", *(number(m.get("std")) for m in metrics)])
    return text_table(["video", "frames", *columns], rows)


def metric_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each metric, with an arrow to its better values, and its statistics."""
    rows = []
    for name, metric in summary["metrics"].items():
        arrow = {True: " ↑", False: " ↓", None: ""}[metric["higher_is_better"]]
        if "best_at" in metric:
            arrow = f" → {metric['best_at']:g}"
        values = [number(metric.get(key)) for key in ("std", "median", "p5", "p95")]
        rows.append([name + arrow, number(metric["mean"]), _ends(metric.get("ci95")), *values])
    head = [f"{plural(summary['videos'], 'video')}", _mean_label(summary), _interval_label(summary)]
    return [*head, "standard deviation", "median", "5 %", "95 %"], rows


def _mean_label(summary: Mapping[str, Any]) -> str:
    labels = {"videos": "mean over videos", "frames": "mean over frames", "batches": "mean over batches"}
    return labels.get(summary["preset"]["average"], "over all pixels or frames")


def _averages_videos(summary: Mapping[str, Any]) -> bool:
    return summary["preset"]["average"] == "videos"


def _interval_label(summary: Mapping[str, Any]) -> str:
    """Intervals are of the mean over videos, which need not be the mean that is shown."""
    return "95 % interval" if _averages_videos(summary) else "95 % interval over videos"


def _half_width(ends: Sequence[float | None] | None) -> str:
    return "-" if not ends or None in ends else f"±{(ends[1] - ends[0]) / 2:.4f}"


def _ends(ends: Sequence[float | None] | None) -> str:
    return "-" if not ends or None in ends else f"{ends[0]:.4f} to {ends[1]:.4f}"


def means_table(summaries: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: means of several reconstructions, a column each."""
    metrics = next(iter(summaries.values()))["metrics"]
    rows = [[name, *(number(s["metrics"][name]["mean"]) for s in summaries.values())] for name in metrics]
    return ["metric", *summaries], rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Paired differences, as summary.compare returns them; * marks those whose interval excludes zero."""
    lines = []
    for row in rows:
        difference, (low, high) = row["difference"], row["ci95"]
        significant = low is not None and (low > 0 or high < 0)
        size = abs(difference) or 1.0
        digits = min(8, max(4, 1 - math.floor(math.log10(size))))  # two of them are not 0
        ends = "-" if low is None else f"{low:+.{digits}f} to {high:+.{digits}f}"
        better = "-" if row["better_on"] is None else f"{row['better_on']} of {row['videos']}"
        name = f"{row['name']} - {row['against']}"
        lines.append([name, row["metric"], f"{difference:+.{digits}f}{'*' if significant else ' '}", ends, better])
    table = text_table(["reconstruction", "metric", "difference ", "95 % interval", "better on"], lines)
    return f"{table}\n* the interval excludes zero"


def write_per_video(path: Path, videos: Sequence[VideoScore]) -> None:
    """A row per video: its size, and value, minimum, maximum and standard deviation over frames of every metric."""
    rows = []
    for video in videos:
        info = video.info
        row: dict[str, Any] = {"name": video.name, "frames": info.frames, "height": info.height, "width": info.width}
        row |= {"fps": info.fps, "codec_ref": info.codecs[0], "codec_rec": info.codecs[1], "lossy": info.lossy}
        for column, score in video.scores.items():
            row[column] = score.value
            if score.frames:
                row |= {f"{column}_min": min(score.frames), f"{column}_max": max(score.frames)}
                row[f"{column}_std"] = statistics.pstdev(score.frames)
        rows.append(row | video.counts)
    write_text(path, pd.DataFrame(rows).to_csv(**QUOTED_CSV))


def write_per_frame(path: Path, videos: Sequence[VideoScore]) -> None:
    """A row per frame; metrics of two neighbouring frames are in the row of the first."""
    rows = []
    for video in videos:
        for frame in range(video.info.frames):
            values = {c: s.frames[frame] for c, s in video.scores.items() if frame < len(s.frames)}
            rows.append({"name": video.name, "frame": frame, **values})
    write_text(path, pd.DataFrame(rows).to_csv(**QUOTED_CSV))

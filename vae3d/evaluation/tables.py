"""Reports as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae3d.evaluation.store import VideoScore
from vae3d.io import naming, write_text
from vae3d.report.tables import number, text_table

SHOWN = 20  # videos that a printed table lists
WIDE = 8  # columns; with more, the table of a set has a line per metric instead


def set_table(summary: dict[str, Any]) -> str:
    """One line per video (the first of many), then the set; or, of many metrics, one line per metric."""
    columns = list(summary["metrics"])
    if len(columns) > WIDE:
        return _metric_table(summary)
    videos = summary["per_video"]
    rows: list[Sequence[str] | None] = [
        [video["name"], str(video["frames"]), *(number(video.get(column)) for column in columns)]
        for video in videos[:SHOWN]
    ]
    if len(videos) > SHOWN:
        rows.append([f"... {len(videos) - SHOWN} more in per_video.csv", "", *("" for _ in columns)])
    figures = summary["metrics"].values()
    rows += [None, [_mean_of(summary), str(summary["frames"]), *(number(f["mean"]) for f in figures)]]
    if len(videos) > 1:
        rows.append(["  95 % interval", "", *(_interval(f.get("ci95")) for f in figures)])
        rows.append(["  standard deviation", "", *(number(f.get("std")) for f in figures)])
    return text_table(["video", "frames", *columns], rows)


def _metric_table(summary: dict[str, Any]) -> str:
    keys = ("std", "median", "p5", "p95")
    rows = [
        [name, number(f["mean"]), _interval(f.get("ci95")), *(number(f.get(key)) for key in keys)]
        for name, f in summary["metrics"].items()
    ]
    head = [f"{summary['videos']} videos", _mean_of(summary), "95 % interval", "standard deviation", "median", "5 %"]
    return text_table([*head, "95 %"], rows)


def _mean_of(summary: dict[str, Any]) -> str:
    kinds = {"videos": "mean over videos", "frames": "mean over frames", "batches": "mean over batches"}
    return kinds.get(summary["preset"]["average"], "over all pixels or frames")


def _interval(ends: Sequence[float | None] | None) -> str:
    if not ends or None in ends:
        return "-"
    half = (ends[1] - ends[0]) / 2
    return f"±{half:.4f}"


def side_by_side(summaries: dict[str, dict[str, Any]]) -> str:
    """The means of several reconstructions, a column each."""
    metrics = next(iter(summaries.values()))["metrics"]
    rows = [[name, *(number(s["metrics"][name]["mean"]) for s in summaries.values())] for name in metrics]
    return text_table(["metric", *summaries], rows)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Paired differences with their intervals."""
    lines = []
    for row in rows:
        low, high = row["ci95"]
        sure = low is not None and (low > 0 or high < 0)
        ends = "-" if low is None else f"{low:+.4f} to {high:+.4f}"
        better = "-" if row["better_on"] is None else f"{row['better_on']} of {row['videos']}"
        name = f"{row['name']} - {row['against']}"
        lines.append([name, row["metric"], f"{row['difference']:+.4f}{'*' if sure else ' '}", ends, better])
    table = text_table(["reconstruction", "metric", "difference ", "95 % interval", "better on"], lines)
    return f"{table}\n* zero lies outside the interval"


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; numbers in full. Raises FileError."""
    with naming(path):
        write_text(path, json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def write_per_video(path: Path, videos: Sequence[VideoScore]) -> None:
    """A row per video: its facts, and value, least, greatest and standard deviation over frames of every metric."""
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
    _write_csv(path, rows)


def write_per_frame(path: Path, videos: Sequence[VideoScore]) -> None:
    """A row per frame; metrics of neighbouring frames stand at the earlier one."""
    rows = []
    for video in videos:
        for frame in range(video.info.frames):
            values = {c: s.frames[frame] for c, s in video.scores.items() if frame < len(s.frames)}
            rows.append({"name": video.name, "frame": frame, **values})
    _write_csv(path, rows)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    with naming(path):
        write_text(path, text.getvalue())

"""One self-contained page about an evaluation: figures, distributions, courses over time, best and worst clips."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from vae3d.evaluation.pairs import Pair, PairReader, Protocol
from vae3d.evaluation.store import VideoScore
from vae3d.evaluation.tables import number
from vae3d.io import naming, write_text
from vae3d.metrics.base import Better, goodness
from vae3d.pixels import quantize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANKED_BY = ("lpips_alex", "lpips_vgg", "psnr", "ssim")  # the first that was computed tells best from worst
CLIPS = 3  # best, and as many worst
FRAMES = 5  # of each clip, the worst one among them
WIDTH = 224  # pixels of a shown frame
ERROR_GAIN = 4  # error maps show |original - reconstruction| times this

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
  h1, h2, h3 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }} img, svg {{ max-width: 100%; height: auto }}
  table {{ border-collapse: collapse }} .warning {{ background: #fff4d6; padding: .3rem .8rem; margin: .3rem 0 }}
  td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
  td:first-child, th:first-child {{ text-align: left }}
  .strip {{ display: grid; grid-template-columns: 8rem auto; gap: .3rem .6rem; align-items: center }}
  .strip span {{ color: #555; text-align: right }} pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }}
</style>
<h1>{title}</h1>
<p>{facts}</p>
{warnings}
<h2>Scores</h2>
{table}
<p>&uarr; higher is better, &darr; lower is better, &rarr; this value is best. The mean is formed as the preset says;
the other figures are of the videos' values, the interval by resampling videos.</p>
<h2>Distribution over videos</h2>
{distributions}
<h2>Over the frames</h2>
<p>Mean of all videos that are long enough, and the range of nine tenths of them.</p>
{courses}
<h2>Worst and best clips by {ranked_by}</h2>
<p>Error maps show the absolute difference, {gain} times amplified. Frame numbers count the compared frames.</p>
{clips}
<h2>How it was computed</h2>
<pre>{details}</pre>
"""


def write_html(
    path: Path,
    summary: Mapping[str, Any],
    videos: Sequence[VideoScore],
    pairs: Mapping[str, Pair],
    protocol: Protocol,
    columns: Mapping[str, Better],
) -> None:
    """summary: of summary.summarize. pairs: by name. columns: result -> what is better."""
    columns = {c: better for c, better in columns.items() if any(_values(videos, c))}
    ranked_by, order = _ranking(videos, columns)
    details = {key: summary[key] for key in ("preset", "protocol", "settings", "counts", "weights", "versions")}
    facts = f"{summary['videos']} videos, {summary['frames']} frames. Original: {summary['real_video_dir']}"
    page = PAGE.format(
        title=html.escape(f"Reconstruction quality: {Path(summary['generated_video_dir']).name}"),
        facts=html.escape(facts),
        warnings="\n".join(f'<p class="warning">{html.escape(w)}</p>' for w in _warnings(summary)),
        table=_table(summary["metrics"]),
        distributions=_distributions(videos, columns),
        courses=_courses(videos, columns),
        ranked_by=html.escape(ranked_by),
        gain=ERROR_GAIN,
        clips="\n".join(_clip(video, pairs[video.name], protocol, ranked_by, columns) for video in order),
        details=html.escape(json.dumps(details, indent=2, default=str)),
    )
    with naming(path):
        write_text(path, page)


def _warnings(summary: Mapping[str, Any], most: int = 30) -> list[str]:
    found = [*summary["warnings"], *summary["unmatched"], *summary["failed"]]
    return [*found[:most], f"... {len(found) - most} more in summary.json"] if len(found) > most else found


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    keys = ("mean", "std", "median", "p5", "p95")
    head = ["metric", "mean", "standard deviation", "median", "5 %", "95 %", "95 % interval of the mean"]
    rows = []
    for column, figures in metrics.items():
        arrow = {True: " ↑", False: " ↓", None: ""}[figures["higher_is_better"]]
        if "best_at" in figures:
            arrow = f" → {figures['best_at']:g}"
        low, high = figures.get("ci95") or (None, None)
        interval = "-" if low is None else f"{low:.4f} to {high:.4f}"
        rows.append([column + arrow, *(number(figures.get(key)) for key in keys), interval])
    cells = ["".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) for tag, row in _tagged(head, rows)]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _tagged(head: list[str], rows: list[list[str]]) -> list[tuple[str, list[str]]]:
    return [("th", head), *(("td", row) for row in rows)]


def _values(videos: Sequence[VideoScore], column: str) -> list[float]:
    scores = (video.scores[column].value for video in videos if column in video.scores)
    return [value for value in scores if value is not None]


def _ranking(videos: Sequence[VideoScore], columns: Mapping[str, Better]) -> tuple[str, list[VideoScore]]:
    """The column that ranks, and the clips to show: the worst first, the best last, each once."""
    judged = [column for column, better in columns.items() if better is not None]
    if not judged:
        return "name", list(videos[:CLIPS])
    by = next((column for column in RANKED_BY if column in judged), judged[0])
    scored = [video for video in videos if by in video.scores and video.scores[by].value is not None]
    order = sorted(scored, key=lambda video: goodness(video.scores[by].value, columns[by]))
    return by, order if len(order) <= 2 * CLIPS else [*order[:CLIPS], *order[-CLIPS:]]


def _panels(count: int) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure  # slow to import

    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(4 * across, 2.6 * down), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def _svg(figure: Any) -> str:
    import matplotlib  # slow to import

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vae3d"}):  # the same ids, and so the same file, every time
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _distributions(videos: Sequence[VideoScore], columns: Mapping[str, Better]) -> str:
    if not columns:
        return "<p>no metric of single videos</p>"
    figure, axes = _panels(len(columns))
    for axis, column in zip(axes, columns, strict=False):
        values = _values(videos, column)
        axis.hist(values, bins=min(30, max(5, len(values) // 3)), color="#4c78a8")
        axis.axvline(float(np.mean(values)), color="#222", linewidth=1)
        axis.set_title(column, fontsize=10)
        axis.set_ylabel("videos", fontsize=8)
        axis.ticklabel_format(axis="x", useOffset=False)
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    return _svg(figure)


def _courses(videos: Sequence[VideoScore], columns: Mapping[str, Better]) -> str:
    series = {c: [v.scores[c].frames for v in videos if c in v.scores and v.scores[c].frames] for c in columns}
    series = {column: frames for column, frames in series.items() if frames}
    if not series:
        return "<p>no metric of single frames</p>"
    figure, axes = _panels(len(series))
    for axis, (column, frames) in zip(axes, series.items(), strict=False):
        longest = max(map(len, frames))
        at_frame = [[values[t] for values in frames if t < len(values)] for t in range(longest)]
        low, high = zip(*(np.percentile(values, [5, 95]) for values in at_frame), strict=True)
        axis.fill_between(range(longest), low, high, color="#4c78a8", alpha=0.25, linewidth=0)
        axis.plot(
            [float(np.mean(values)) for values in at_frame], color="#4c78a8", marker="." if longest < 40 else None
        )
        axis.set_title(column, fontsize=10)
        axis.set_xlabel("frame", fontsize=8)
        axis.ticklabel_format(useOffset=False)
    for axis in axes[len(series) :]:
        axis.set_axis_off()
    return _svg(figure)


def _clip(video: VideoScore, pair: Pair, protocol: Protocol, by: str, columns: Mapping[str, Better]) -> str:
    """Rows of frames: original, reconstruction, error."""
    places = _shown_frames(video, by, columns)
    with PairReader(pair, protocol) as reader:
        ref, rec = reader.read(places)
    rows = {
        "original": ref,
        "reconstruction": rec,
        f"error &times; {ERROR_GAIN}": ((ref - rec).abs() * ERROR_GAIN).clamp(0, 1),
    }
    cells = "\n".join(f"<span>{label}</span>{_strip(frames)}" for label, frames in rows.items())
    scores = [f"{c} {number(video.scores[c].value)}" for c in columns if c in video.scores]
    title = f"{html.escape(video.name)}</h3><p>{html.escape(', '.join(scores))}; frames {', '.join(map(str, places))}"
    return f'<h3>{title}</p><div class="strip">{cells}</div>'


def _shown_frames(video: VideoScore, by: str, columns: Mapping[str, Better]) -> list[int]:
    even = np.linspace(0, video.info.frames - 1, min(FRAMES, video.info.frames)).round().astype(int).tolist()
    series = video.scores[by].frames if by in video.scores else []
    if not series:
        return even
    worst = int(np.argmin([goodness(value, columns[by]) for value in series]))
    nearest = min(range(len(even)), key=lambda i: abs(even[i] - worst))
    even[nearest] = worst
    return even


def _strip(frames: Tensor) -> str:
    pixels = quantize(frames, "unit").permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(frame) for frame in pixels]
    height = max(1, round(images[0].height * WIDTH / images[0].width))
    scale = Image.Resampling.NEAREST if images[0].width < WIDTH else Image.Resampling.LANCZOS
    row = np.concatenate([np.asarray(image.resize((WIDTH, height), scale)) for image in images], axis=1)
    file = io.BytesIO()
    Image.fromarray(row).save(file, format="JPEG", quality=92, subsampling=0)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'

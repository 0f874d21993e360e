"""Summarise scores: means, spread, confidence intervals, paired comparisons."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from scipy.special import stdtrit

from vae3d import __version__
from vae3d.evaluation.pairs import Protocol
from vae3d.evaluation.store import VideoScore, read_features
from vae3d.metrics import MetricError, MetricSet
from vae3d.metrics.base import Better, Nearest, goodness
from vae3d.metrics.distribution import SetMetric
from vae3d.metrics.presets import PRESETS, average
from vae3d.pretrained import weights

PACKAGES = ("torch", "torchvision", "av", "numpy", "lpips", "opencv-python-headless")


def summarize(
    videos: Sequence[VideoScore], metrics: MetricSet, protocol: Protocol, preset: str = "default", batch_size: int = 1
) -> dict[str, Any]:
    """The content of summary.json. videos: sorted by name.

    Raises MetricError for scores that the preset's tool cannot average.
    """
    columns, warnings = {}, []
    for metric in metrics:
        if isinstance(metric, SetMetric):
            value, count, extra = metric.combine(read_features(video.features[metric.name]) for video in videos)
            columns[metric.name] = {"mean": value, "samples": count, "higher_is_better": False}
            warnings += extra
            continue
        for column, better in metric.columns.items():
            columns[column] = {**_column(videos, column, preset, batch_size), **direction(better)}
    counts = Counter()
    for video in videos:
        counts.update(video.counts)
    frames = sum(video.info.frames for video in videos)
    if frames and counts.get("identical_frames") == frames:
        warnings.append("all pairs are identical; check that --rec is not the original")
    lossy = [video.name for video in videos if video.info.lossy]
    if lossy:
        warnings.append(
            f"{len(lossy)} of {len(videos)} pairs have a lossy codec, which costs up to several dB; use vae3d infer "
            "codec=lossless, or score in vae3d infer by metrics=[...]"
        )
    with_alpha = [video.name for video in videos if video.info.alpha]
    if with_alpha and not any(metric.alpha for metric in metrics):
        warnings.append(
            f"{len(with_alpha)} of {len(videos)} pairs have alpha, which is not scored itself: the colours are, over "
            "mid-grey; add --metric alpha_psnr alpha_ssim"
        )
    upscaled = [video for video in videos if video.info.upscaled_from is not None]
    if upscaled:
        first = upscaled[0].info
        there, here = ("x".join(map(str, size)) for size in (first.upscaled_from, (first.height, first.width)))
        warnings.append(
            f"{len(upscaled)} of {len(videos)} pairs are upscaled before scoring ({upscaled[0].name}: {there}, scored "
            f"at {here}): that smooths errors, and SSIM and others look better than at the size of the files; leave "
            "out --resolution and --resize"
        )
    return {
        "metrics": columns,
        "videos": len(videos),
        "frames": frames,
        "counts": counts,
        "absent": metrics.skipped,
        "lossy_input": bool(lossy),
        "upscaled_input": bool(upscaled),
        "background_of_alpha": "mid-grey (0.5)" if with_alpha else None,
        "preset": {"name": preset, "source": PRESETS[preset].source, "average": PRESETS[preset].average}
        | ({"batch_size": batch_size} if PRESETS[preset].average == "batches" else {}),
        "protocol": vars(protocol),
        "settings": {metric.name: metric.settings() for metric in metrics if metric.settings()},
        "weights": {
            name: {file.name: weights.sha256(file) for file in files} for name, files in metrics.files.items() if files
        },
        "versions": {"vae3d": __version__, "python": sys.version.split()[0]}
        | {package: version(package) for package in PACKAGES},
        "warnings": [*(w for video in videos for w in video.info.warnings), *warnings],
        "per_video": [_video(video) for video in videos],
    }


def direction(better: Better) -> dict[str, Any]:
    """Which values are better, for summary.json."""
    if isinstance(better, Nearest):
        return {"higher_is_better": None, "best_at": better.target}
    return {"higher_is_better": better}


def _column(videos: Sequence[VideoScore], column: str, preset: str, batch_size: int) -> dict[str, Any]:
    """Statistics of a metric: `mean` as the preset defines it, the others over per-video values."""
    scores = [video.scores[column] for video in videos]
    values = [score.value for score in scores if score.value is not None]
    if not values:
        return {"mean": None, "undefined": len(scores)}
    frames = [value for score in scores for value in score.frames]
    low, high = interval(values)
    return {
        "mean": average(PRESETS[preset], column, scores, batch_size),
        "video_mean": statistics.fmean(values),
        "frame_mean": statistics.fmean(frames) if frames else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "p5": float(np.percentile(values, 5)),
        "p95": float(np.percentile(values, 95)),
        "ci95": [low, high],
        "undefined": len(scores) - len(values),
    }


def _video(video: VideoScore) -> dict[str, Any]:
    info = video.info
    row = {"name": video.name, "frames": info.frames, "height": info.height, "width": info.width, "fps": info.fps}
    row |= {"codecs": list(info.codecs), "lossy": info.lossy}
    return row | {column: score.value for column, score in video.scores.items()} | video.counts


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean, Student's t; (None, None) for one value."""
    if len(values) < 2:
        return None, None
    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def compare(results: dict[str, Sequence[VideoScore]], columns: dict[str, Better]) -> list[dict[str, Any]]:
    """Paired differences of every reconstruction to the first, over the videos with both values.

    results: name of the reconstruction -> its videos. Raises what require_common raises.
    """
    require_common({name: {video.name for video in videos} for name, videos in results.items()})
    (first, base), *others = results.items()
    rows = []
    for name, videos in others:
        own = {video.name: video for video in videos}
        pairs = [(video, own[video.name]) for video in base if video.name in own]
        for column, better in columns.items():
            scores = [(a.scores[column].value, b.scores[column].value) for a, b in pairs if column in a.scores]
            both = [pair for pair in scores if None not in pair]
            gaps = [there - here for here, there in both]
            if not gaps or (better is None and not any(gaps)):  # metrics of the original alone do not differ
                continue
            wins = None
            if better is not None:
                wins = sum(goodness(there, better) > goodness(here, better) for here, there in both)
            row = {"name": name, "against": first, "metric": column, "difference": statistics.fmean(gaps)}
            rows.append(row | {"ci95": list(interval(gaps)), "better_on": wins, "videos": len(gaps)})
    return rows


def require_common(videos: Mapping[str, Collection[str]]) -> None:
    """Raises MetricError for a reconstruction without a video of the first. videos: reconstruction -> their names."""
    (first, base), *others = videos.items()
    for name, own in others:
        if set(base).isdisjoint(own):
            raise MetricError(f"{name} and {first} have no video in common, so they cannot be compared")


def unequal_sets(videos: Mapping[str, Collection[str]]) -> list[str]:
    """A warning if reconstructions were scored on different videos. videos: reconstruction -> names of its videos."""
    names = set().union(*videos.values())
    if all(len(own) == len(names) for own in videos.values()):
        return []
    counts = ", ".join(f"{rec} {len(own)}" for rec, own in videos.items())
    return [
        f"not all reconstructions have scores of all {len(names)} videos ({counts}): each mean is over its own videos, "
        "each difference over those that both have"
    ]

"""Scoring pairs of videos: each is decoded once for all metrics, and only a few frames are in memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from vae3d import __version__, weights
from vae3d.evaluation.pairs import Pair, PairInfo, Protocol, read_pair
from vae3d.metrics import Metric, MetricError

SUSPICIOUS_PSNR = 10.0  # dB; below it a pair is probably not one


@dataclass
class VideoScore:
    """frames: metric -> score of every compared frame."""

    name: str
    info: PairInfo
    frames: dict[str, list[float]]

    def mean(self, metric: str) -> float:
        return math.fsum(self.frames[metric]) / len(self.frames[metric])

    def pooled_psnr(self) -> float:
        """PSNR in dB of the mean squared error over the whole video, as other tools report it."""
        errors = [10 ** (-psnr / 10) for psnr in self.frames["psnr"]]
        return -10 * math.log10(math.fsum(errors) / len(errors))


@torch.inference_mode()
def score_pair(pair: Pair, metrics: Sequence[Metric], protocol: Protocol, device: torch.device | str) -> VideoScore:
    """Raises PairError, MediaError or MetricError, each naming what is wrong."""
    for metric in metrics:
        metric.reset()
    info, chunks = read_pair(pair, protocol)
    try:
        for ref, rec in chunks:
            for metric in metrics:
                metric.update(ref.to(device), rec.to(device))
        scores = VideoScore(pair.name, info, {metric.name: metric.result() for metric in metrics})
    except MetricError as error:
        raise MetricError(f"{pair.name}: {error}") from None
    info.warnings += _doubts(scores)
    return scores


def _doubts(scores: VideoScore) -> list[str]:
    psnr = scores.frames.get("psnr", [])
    if sum(value < SUSPICIOUS_PSNR for value in psnr) > len(psnr) / 2:
        return [f"{scores.name}: PSNR is below {SUSPICIOUS_PSNR:g} dB on most frames; are the two a pair?"]
    return []


def summarize(scores: Sequence[VideoScore], metrics: Sequence[Metric], protocol: Protocol) -> dict[str, Any]:
    """Everything a report holds. `mean` is the mean over videos of each video's mean over frames."""
    summary: dict[str, Any] = {}
    for metric in metrics:
        means = [video.mean(metric.name) for video in scores]
        every = [value for video in scores for value in video.frames[metric.name]]
        summary[metric.name] = {
            "mean": math.fsum(means) / len(means),
            "std": statistics.stdev(means) if len(means) > 1 else None,
            "median": statistics.median(means),
            "frame_mean": math.fsum(every) / len(every),
        }
    identical = sum(all(value == 100.0 for value in video.frames["psnr"]) for video in scores if "psnr" in video.frames)
    return {
        "metrics": summary,
        "videos": len(scores),
        "frames": sum(video.info.frames for video in scores),
        "identical_videos": identical,
        "lossy_input": any(video.info.lossy for video in scores),
        "protocol": vars(protocol),
        "weights": {metric.name: weights.sha256(metric.find_weights()) for metric in metrics if metric.needs_weights},
        "versions": {name: version(name) for name in ("torch", "av")} | {"vae3d": __version__},
        "per_video": [
            {
                "name": video.name,
                "frames": video.info.frames,
                "height": video.info.height,
                "width": video.info.width,
                "codecs": list(video.info.codecs),
                **{metric.name: video.mean(metric.name) for metric in metrics},
                **({"psnr_video": video.pooled_psnr()} if "psnr" in video.frames else {}),
            }
            for video in scores
        ],
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as text: one line per video, then the mean."""
    names = list(summary["metrics"])
    width = max([len(video["name"]) for video in summary["per_video"]] + [len("standard deviation")])
    head = "video".ljust(width) + "  frames" + "".join(name.rjust(11) for name in names)
    lines = [head, "-" * len(head)]
    for video in summary["per_video"]:
        cells = "".join(f"{video[name]:11.4f}" for name in names)
        lines.append(f"{video['name'].ljust(width)}{video['frames']:8d}{cells}")
    lines.append("-" * len(head))
    means = "".join(f"{summary['metrics'][name]['mean']:11.4f}" for name in names)
    lines.append("mean over videos".ljust(width) + f"{summary['frames']:8d}" + means)
    deviations = [summary["metrics"][name]["std"] for name in names]
    if None not in deviations:
        lines.append("standard deviation".ljust(width) + " " * 8 + "".join(f"{d:11.4f}" for d in deviations))
    return "\n".join(lines)

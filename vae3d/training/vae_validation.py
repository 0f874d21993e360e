"""Validation of an autoencoder: reconstruction quality on held-out clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import nn

from vae3d.data.depth import depth_of, to_metres
from vae3d.inference.pictures import (
    ERROR_LABEL,
    displayable,
    enlarged,
    error_maps,
    latent_colours,
    scorable,
    side_by_side,
    table,
)
from vae3d.metrics import MetricSet, VideoResult
from vae3d.metrics.depth import depth_errors
from vae3d.metrics.distribution import SetMetric
from vae3d.metrics.frame import decibel
from vae3d.metrics.panorama import roll_consistency
from vae3d.pixels import NotFiniteError, as_unit, to_uint8
from vae3d.training.runlog import RunLog
from vae3d.types import ClipBatch

PANELS = ("original", "latent", "reconstruction")
BETTER = {
    "roll_psnr": True,
    "abs_rel": False,
    "delta1": True,
    "alpha_psnr": True,
    "other_psnr": True,
}  # scores beside the metrics': whether higher is better


@dataclass
class ValidatedClip:
    """index: among the held-out clips. panels: PANELS, [3, T, H, W, 3] uint8, of the first few clips. scores: those
    that are not computed on 8-bit frames."""

    index: int
    name: str
    result: VideoResult
    panels: np.ndarray | None
    scores: dict[str, float]


def mean_scores(metrics: MetricSet, clips: Sequence[ValidatedClip]) -> dict[str, float]:
    """Column -> mean over the clips; for metrics of sets of clips also the number of samples."""
    results = [clip.result for clip in clips]
    scores = metrics.aggregate(results)
    scores |= {name: fmean(clip.scores[name] for clip in clips) for name in clips[0].scores}
    scores |= {f"{m.name}_samples": m.num_samples(results) for m in metrics if isinstance(m, SetMetric)}
    return {column: value for column, value in scores.items() if value is not None}


def log_clips(log: RunLog, clips: Sequence[ValidatedClip], step: int) -> None:
    """Show clips with panels, and the error: all images as rows of one picture, each video by itself."""
    images = {}
    for clip in clips:
        if clip.panels is None:
            continue
        errors = error_maps(clip.panels[0], clip.panels[-1])
        panels = dict(zip((*PANELS, ERROR_LABEL), (*clip.panels, errors), strict=True))
        name = f"{clip.index} {clip.name}"
        if len(errors) == 1:
            images[name] = [enlarged(panel)[0] for panel in panels.values()]
        else:
            log.frames(f"val_clips/{name}", np.concatenate([*side_by_side(panels, name)]), step)
    if images:
        log.frames("val_clips/images", table(images, [*PANELS, ERROR_LABEL])[None], step)


def channel_scores(ref: np.ndarray, rec: np.ndarray) -> dict[str, float]:
    """PSNR in dB of the channels after the first three of frames [T, H, W, C] uint8, the mean over frames: `alpha_psnr`
    of the fourth of four, as the metric of that name; `other_psnr` of all from the fourth on of more."""
    channels = ref.shape[3]
    if channels <= 3:
        return {}
    errors = np.square((ref[..., 3:].astype(np.float64) - rec[..., 3:]) / 255).mean((1, 2, 3))
    return {"alpha_psnr" if channels == 4 else "other_psnr": fmean(decibel(error) for error in errors.tolist())}


@torch.no_grad()
def validate(
    model: nn.Module,
    clips: Sequence[ClipBatch],
    metrics: MetricSet,
    device: torch.device,
    panels: int,
    *,
    roll: bool = False,
    depth: str | None = None,
) -> list[ValidatedClip]:
    """Reconstruct clips from the posterior's mode and score them as 8-bit pixels, like those of a file.

    Metrics see RGBA as MetricSet.update says, of other channels the colours (pixels.as_rgb); see also channel_scores.
    panels: number of clips to keep for display. roll: also score how well the reconstruction of a rotated panorama
    matches the rotated reconstruction (`roll_psnr`). depth: mapping of depth clips, for AbsRel and delta1 in metres.
    """
    metrics.reset()  # a validation that failed may have left a clip
    done = []
    for clip in clips:
        clip = clip.to(device)
        out = model(clip.video, sample=False)
        before = to_uint8(clip.video[0], clip.paths[0])
        after = to_uint8(out.video[0], f"reconstruction of {clip.paths[0]}")
        metrics.update(*(as_unit(scorable(frames), device) for frames in (before, after)))
        index, shown = int(clip.positions), None
        if index < panels:
            latent = latent_colours(out.z[0], before.shape[:3])
            shown = np.stack([displayable(before), latent, displayable(after)])
        scores = {"roll_psnr": roll_consistency(model, clip.video)} if roll else {}
        scores |= channel_scores(before, after)
        if depth is not None:
            metres = (to_metres(depth_of(video.float()), clip.depth_bounds, depth) for video in (clip.video, out.video))
            scores |= depth_errors(*metres, clip.valid)
        if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise NotFiniteError(f"{', '.join(bad)} is NaN or infinite", f"reconstruction of {clip.paths[0]}")
        done.append(ValidatedClip(index, Path(clip.paths[0]).stem, metrics.result(), shown, scores))
    return done

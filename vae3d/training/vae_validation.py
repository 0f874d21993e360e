"""Validation of an autoencoder: reconstruction quality on held-out clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import nn

from vae3d.data.decoding.depth import depth_of, to_metres
from vae3d.inference.pictures import ERROR_LABEL, error_maps, latent_colours, scorable, strip
from vae3d.metrics import MetricSet, VideoResult
from vae3d.metrics.depth import depth_errors
from vae3d.metrics.distribution import SetMetric
from vae3d.metrics.frame import decibel
from vae3d.metrics.panorama import roll_consistency
from vae3d.pixels import NotFiniteError, as_unit, displayable, to_uint8
from vae3d.report import score_names
from vae3d.training.runlog import RunLog, short
from vae3d.types import ClipBatch

SPATIAL = "2D VAE alone"  # the frames through the 2D VAE inside the model, which the temporal VAE cannot exceed
BETTER = {
    "roll_psnr": True,
    "abs_rel": False,
    "delta1": True,
    "alpha_psnr": True,
    "other_psnr": True,
}  # scores beside the metrics': whether higher is better


@dataclass
class ValidatedClip:
    """index: among the held-out clips. scores: those that are not computed on 8-bit frames.

    panels: of the first few clips: original, latent, SPATIAL where there is one, reconstruction, [T, H, W, 3] uint8.
    spatial: scores of SPATIAL."""

    index: int
    name: str
    result: VideoResult
    panels: dict[str, np.ndarray] | None
    scores: dict[str, float]
    spatial: dict[str, float] = field(default_factory=dict)


def mean_scores(metrics: MetricSet, clips: Sequence[ValidatedClip]) -> dict[str, float]:
    """Column -> mean over the clips; for metrics of sets of clips also the number of samples."""
    results = [clip.result for clip in clips]
    scores = metrics.aggregate(results)
    scores |= {name: fmean(clip.scores[name] for clip in clips) for name in clips[0].scores}
    scores |= {f"{m.name}_samples": m.num_samples(results) for m in metrics if isinstance(m, SetMetric)}
    return {column: value for column, value in scores.items() if value is not None}


def group_scores(
    metrics: MetricSet, clips: Sequence[ValidatedClip], groups: Sequence[tuple[str, ...]]
) -> dict[str, float]:
    """val_GROUP/COLUMN -> mean over the clips of a source or a size. groups: of each held-out clip, by its index.

    Distances between sets, which depend on the number of clips, are left out.
    """
    members: dict[str, list[ValidatedClip]] = {}
    for clip in clips:
        for group in groups[clip.index] if groups else ():
            members.setdefault(group, []).append(clip)
    of_clips = metrics.subset([m.name for m in metrics if not isinstance(m, SetMetric)])
    return {
        f"val_{group}/{column}": value
        for group in sorted(members)
        for column, value in mean_scores(of_clips, members[group]).items()
    }


def log_clips(log: RunLog, clips: Sequence[ValidatedClip], step: int) -> None:
    """Show each clip that has panels by itself, as an image or a video: each reconstruction above its error."""
    for clip in clips:
        if clip.panels is None or not log.main:
            continue
        original, latent, *reconstructions = clip.panels.items()
        errors = [(ERROR_LABEL, error_maps(original[1], video)) for _, video in reconstructions]
        scores = scores_text(values_of(clip.result) | clip.scores)
        caption = [f"{clip.index} {clip.name}, step {step}", scores]
        if clip.spatial:
            caption.append(f"{SPATIAL}: {scores_text(clip.spatial)}")
        picture = strip([[original, *reconstructions], [latent, *errors]], caption)
        log.frames(f"val_clips/{clip.index}_{clip.name}", picture, step, caption=scores)


def values_of(result: VideoResult) -> dict[str, float]:
    """Column -> score, without scores that are undefined or of sets of clips."""
    return {column: score.value for column, score in result.scores.items() if score.value is not None}


def scores_text(scores: Mapping[str, float]) -> str:
    values = {f"val/{name}": value for name, value in scores.items()}
    return ", ".join(f"{name.removeprefix('val/')} {short(values[name])}" for name in score_names([values]))


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
    panels: number of clips to keep for display; of models with a 2D VAE inside, it is shown and scored alone on them.
    roll: also score how well the reconstruction of a rotated panorama matches the rotated reconstruction (`roll_psnr`).
    depth: mapping of depth clips, for AbsRel and delta1 in metres.
    """
    done = []
    for clip in clips:
        clip = clip.to(device)
        out = model(clip.video, sample=False)
        before = to_uint8(clip.video[0], clip.paths[0])
        after = to_uint8(out.video[0], f"reconstruction of {clip.paths[0]}")
        result = metrics.score([(as_unit(scorable(before), device), as_unit(scorable(after), device))])
        index = int(clip.positions)
        shown, spatial = None, {}
        if index < panels:
            shown = {"original": displayable(before), "latent": latent_colours(out.z[0], before.shape[:3])}
            if out.spatial is not None:
                frames = model.decode_spatial(out.spatial.latent)[..., : before.shape[1], : before.shape[2]]
                alone = to_uint8(frames[0], f"{SPATIAL}: {clip.paths[0]}")
                of_clips = metrics.subset([m.name for m in metrics if not isinstance(m, SetMetric)])
                both = as_unit(scorable(before), device), as_unit(scorable(alone), device)
                spatial = values_of(of_clips.score([both]))
                shown[SPATIAL] = displayable(alone)
            shown["reconstruction"] = displayable(after)
        scores = {"roll_psnr": roll_consistency(model, clip.video)} if roll else {}
        scores |= channel_scores(before, after)
        if depth is not None:
            metres = (to_metres(depth_of(video.float()), clip.depth_bounds, depth) for video in (clip.video, out.video))
            scores |= depth_errors(*metres, clip.valid)
        if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise NotFiniteError(f"{', '.join(bad)} is NaN or infinite", f"reconstruction of {clip.paths[0]}")
        done.append(ValidatedClip(index, Path(clip.paths[0]).stem, result, shown, scores, spatial))
    return done

"""Reconstruction quality on held-out clips, while training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from vae3d import distributed
from vae3d.data.depth import depth_of, to_metres
from vae3d.inference.consistency import roll_consistency
from vae3d.inference.pictures import grid, latent_colours
from vae3d.metrics import MetricSet, VideoResult
from vae3d.metrics.depth import abs_rel, delta1
from vae3d.metrics.distribution import SetMetric
from vae3d.metrics.registry import resolve
from vae3d.pixels import NotFiniteError, PixelError, as_unit, to_uint8
from vae3d.training.freeze import set_mode
from vae3d.training.memory import attempted
from vae3d.types import Clip

if TYPE_CHECKING:
    from vae3d.training.vae_trainer import Trainer


@dataclass
class ValidatedClip:
    """place: among the held-out clips. panels: target, latent and reconstruction, [3, T, H, W, 3] uint8, of the first
    few clips. more: scores that are not of pairs of 8-bit frames."""

    place: int
    name: str
    result: VideoResult
    panels: np.ndarray | None
    more: dict[str, float]


def metrics_due(trainer: Trainer) -> MetricSet:
    """The metrics of this step: without those of validation.slow_metrics, except where it is their turn."""
    settings, step = trainer.config.validation, trainer.step
    last = step == trainer.config.trainer.max_steps
    if last or (settings.slow_metrics_every and step % settings.slow_metrics_every == 0):
        return trainer.metrics
    return trainer.metrics.subset(resolve(settings.metrics))


def validate_together(trainer: Trainer, metrics: MetricSet) -> list[ValidatedClip]:
    """All ranks' held-out clips, in their order; none, with a warning, if on a rank memory ran out or the model's
    pixels of a clip are NaN."""
    settings, network = trainer.config.validation, trainer.network
    network.eval()
    with trainer.ema.applied():
        try:
            mine, reason = attempted(
                lambda: validate(
                    network,
                    trainer.data.held_out,
                    metrics,
                    trainer.device,
                    settings.videos,
                    roll=settings.roll,
                    depth=trainer.config.data.depth.mapping,
                )
            )
            reason = reason and f"{reason}; lower validation.frames"
        except PixelError as error:
            mine, reason = None, str(error)
            metrics.reset()
    set_mode(network, trainer.config.stage.train)
    if not distributed.all_ranks_ok(reason is None, trainer.device):
        why = reason or "on another rank"
        trainer.log.warn(f"validation failed at step {trainer.step}: {why}; it counts for no best checkpoint")
        return []
    return sorted(gather_object(mine), key=lambda clip: clip.place)


def report(trainer: Trainer, metrics: MetricSet, everyone: Sequence[ValidatedClip]) -> dict[str, float]:
    """Log the means over the clips and show some of them; the means."""
    if not everyone:
        return {}
    results = [clip.result for clip in everyone]
    scores = metrics.aggregate(results)
    scores |= {name: fmean(clip.more[name] for clip in everyone) for name in everyone[0].more}
    scores |= {f"{m.name}_samples": m.num_samples(results) for m in metrics if isinstance(m, SetMetric)}
    means = {f"val/{column}": value for column, value in scores.items() if value is not None}
    trainer.log.scalars({**means, "val_clips": len(everyone)}, trainer.step)
    _show(trainer, [clip for clip in everyone if clip.panels is not None])
    return means


def _show(trainer: Trainer, clips: Sequence[ValidatedClip]) -> None:
    """Images as rows of one picture; every video by itself, its latent and reconstruction below."""
    images = [clip.panels[:, 0] for clip in clips if clip.panels.shape[1] == 1]
    if images:
        trainer.log.image("val/target | latent | reconstruction", grid(images), trainer.step)
    for clip in clips:
        if clip.panels.shape[1] > 1:
            name = f"original above latent above reconstruction {clip.place}: {clip.name}"
            trainer.log.video(name, np.concatenate(clip.panels, axis=1), 8, trainer.step)


@torch.no_grad()
def validate(
    model: nn.Module,
    clips: Sequence[Clip],
    metrics: MetricSet,
    device: torch.device,
    pictures: int,
    *,
    roll: bool = False,
    depth: str | None = None,
) -> list[ValidatedClip]:
    """Reconstruct clips from the posterior's mode and score them as 8-bit pixels, as files would hold them.

    roll: also how far the reconstruction of a turned panorama is the turned reconstruction, `roll_psnr`. depth: the
    mapping of clips that are depth maps, for AbsRel and delta1 in metres.
    """
    done = []
    for clip in clips:
        clip = clip.to(device)
        out = model(clip.video, sample=False)
        ref, rec = to_uint8(clip.video[0], clip.paths[0]), to_uint8(out.video[0], f"reconstruction of {clip.paths[0]}")
        metrics.update(as_unit(ref, device), as_unit(rec, device))
        place = int(clip.positions)
        panels = np.stack([ref, latent_colours(out.z[0], ref.shape[:3]), rec]) if place < pictures else None
        more = {"roll_psnr": roll_consistency(model, clip.video)} if roll else {}
        more |= _depth_errors(clip, out.video, depth) if depth is not None else {}
        if bad := [name for name, value in more.items() if not math.isfinite(value)]:
            raise NotFiniteError(f"{', '.join(bad)} is NaN or infinite", f"reconstruction of {clip.paths[0]}")
        done.append(ValidatedClip(place, Path(clip.paths[0]).stem, metrics.result(), panels, more))
    return done


def _depth_errors(clip: Clip, rec: Tensor, mapping: str) -> dict[str, float]:
    ref, rec = (to_metres(depth_of(video.float()), clip.depth_bounds, mapping) for video in (clip.video, rec))
    return {"abs_rel": float(abs_rel(ref, rec, clip.valid)), "delta1": float(delta1(ref, rec, clip.valid))}

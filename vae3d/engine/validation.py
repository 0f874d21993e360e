"""Reconstruction quality on held-out clips, while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from vae3d import ranks
from vae3d.data.depth import depth_of, to_metres
from vae3d.engine.freeze import set_mode
from vae3d.engine.memory import attempted
from vae3d.inference.consistency import roll_consistency
from vae3d.inference.video import as_unit, to_uint8
from vae3d.metrics import MetricSet, VideoResult
from vae3d.metrics.depth import abs_rel, delta1
from vae3d.types import Clip

if TYPE_CHECKING:
    from vae3d.engine.trainer import Trainer


@dataclass
class ValidatedClip:
    """place: among the held-out clips. picture: original above reconstruction, [T, 2H, W, 3] uint8, of the first few
    clips. more: scores that are not of pairs of 8-bit frames."""

    place: int
    name: str
    result: VideoResult
    picture: np.ndarray | None
    more: dict[str, float]


def validate_together(trainer: Trainer) -> list[ValidatedClip]:
    """All ranks' held-out clips, in their order; none, with a warning, if memory ran out on a rank."""
    settings, network = trainer.config.validation, trainer.network
    network.eval()
    with trainer.ema.applied():
        mine, fault = attempted(
            lambda: validate(
                network,
                trainer.data.held_out,
                trainer.metrics,
                trainer.device,
                settings.videos,
                roll=settings.roll,
                depth=trainer.config.data.depth.mapping,
            )
        )
    set_mode(network, trainer.config.stage.train)
    if not ranks.everyone(fault is None, trainer.device):
        why = fault or "on another rank"
        trainer.log.warn(f"no validation at step {trainer.step}, for want of memory: {why}; lower validation.frames")
        return []
    return sorted(gather_object(mine), key=lambda clip: clip.place)


def report(trainer: Trainer, everyone: Sequence[ValidatedClip]) -> dict[str, float]:
    """Log the means over the clips and show some of them; the means."""
    if not everyone:
        return {}
    scores = trainer.metrics.over([clip.result for clip in everyone])
    scores |= {name: fmean(clip.more[name] for clip in everyone) for name in everyone[0].more}
    means = {f"val/{column}": value for column, value in scores.items() if value is not None}
    trainer.log.scalars({**means, "val_clips": len(everyone)}, trainer.step)
    for clip in everyone:
        if clip.picture is not None:
            name = f"original above reconstruction {clip.place}: {clip.name}"
            trainer.log.video(name, clip.picture, 8, trainer.step)
    return means


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
        ref, rec = to_uint8(clip.video[0]), to_uint8(out.video[0])
        metrics.update(as_unit(ref, device), as_unit(rec, device))
        place = int(clip.positions)
        picture = np.concatenate([ref, rec], axis=1) if place < pictures else None
        more = {"roll_psnr": roll_consistency(model, clip.video)} if roll else {}
        more |= _depth_errors(clip, out.video, depth) if depth is not None else {}
        done.append(ValidatedClip(place, Path(clip.paths[0]).stem, metrics.result(), picture, more))
    return done


def _depth_errors(clip: Clip, rec: Tensor, mapping: str) -> dict[str, float]:
    ref, rec = (to_metres(depth_of(video.float()), clip.depth_bounds, mapping) for video in (clip.video, rec))
    return {"abs_rel": float(abs_rel(ref, rec, clip.valid)), "delta1": float(delta1(ref, rec, clip.valid))}

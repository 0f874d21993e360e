"""Reconstruction quality on held-out clips, while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vae3d.inference.video import as_unit, to_uint8
from vae3d.metrics import MetricSet, VideoResult
from vae3d.types import Clip


@dataclass
class ValidatedClip:
    """place: among the held-out clips. picture: original above reconstruction, [T, 2H, W, 3] uint8, of the first few
    clips."""

    place: int
    name: str
    result: VideoResult
    picture: np.ndarray | None


@torch.no_grad()
def validate(
    model: nn.Module, clips: Sequence[Clip], metrics: MetricSet, device: torch.device, pictures: int
) -> list[ValidatedClip]:
    """Reconstruct clips from the posterior's mode and score them as 8-bit pixels, as files would hold them."""
    done = []
    for clip in clips:
        clip = clip.to(device)
        out = model(clip.video, sample=False)
        ref, rec = to_uint8(clip.video[0]), to_uint8(out.video[0])
        metrics.update(as_unit(ref, device), as_unit(rec, device))
        place = int(clip.positions)
        picture = np.concatenate([ref, rec], axis=1) if place < pictures else None
        done.append(ValidatedClip(place, Path(clip.paths[0]).stem, metrics.result(), picture))
    return done

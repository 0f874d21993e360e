"""The mean and standard deviation of an autoencoder's latents: measured on clips, and written into a checkpoint.

A diffusion model needs latents of about zero mean and unit variance. What a trained autoencoder gives is another scale
with every run (SD 0.18215, SDXL 0.13025, FLUX 0.3611), so it is measured, never copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vae3d.checkpoints.formats import Checkpoint
from vae3d.data.clips import ClipSettings
from vae3d.data.loader import still_clip
from vae3d.data.media import MediaError
from vae3d.data.segments import bounds_of
from vae3d.errors import UserError
from vae3d.models.base import latent_space
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.layers.normalized import LatentNormMixin
from vae3d.models.spatial import SpatialVAE
from vae3d.precision import no_tf32
from vae3d.running_stats import RunningStats
from vae3d.types import Clip

WIDEST = 0.1  # how far a channel's mean may be from 0, and its deviation from 1, where latents are diffused


class ScaleError(UserError):
    """Latents whose scale cannot be measured."""


@dataclass(frozen=True)
class MeasuredScale:
    """Of raw latents: mean and standard deviation (of the population) of each channel, [C] fp64, over `clips` clips of
    `size` (T, H, W), or None if they are of several."""

    clips: int
    size: tuple[int, int, int] | None
    mean: Tensor
    std: Tensor

    def over_channels(self) -> tuple[float, float]:
        """Mean and standard deviation of all values of all channels."""
        mean = self.mean.mean()
        variance = (self.std.square() + (self.mean - mean).square()).mean()
        return float(mean), float(variance.sqrt())

    def facts(self) -> dict[str, Any]:
        """What a reader of a scale should know, for model.yaml."""
        told = {"clips": self.clips, "frames_height_width": self.size and list(self.size)}
        return told | {"mean": self.mean.tolist(), "std": self.std.tolist()}


def off_scale(means: Sequence[float], stds: Sequence[float]) -> list[int]:
    """Channels of normalised latents, with these means and deviations, that are not of about mean 0 and deviation 1, or
    NaN."""
    pairs = enumerate(zip(means, stds, strict=True))
    return [channel for channel, (mean, std) in pairs if not (abs(mean) <= WIDEST and abs(std - 1) <= WIDEST)]


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be given a scale; None if it can."""
    if isinstance(model, DiffusersVAE):
        return f"a {model.kind} is of another library, whose config holds its scale"
    if latent_space(model) != "raw":
        return "its latents are those that a diffusion model sees; the VAE that they come from has the scale"
    return None


@no_tf32()
@torch.no_grad()
def measure(model: nn.Module, clips: Iterable[Clip], seed: int = 0) -> MeasuredScale:
    """Encode clips one after another, in the model's precision, and sample from their posteriors.

    Samples, because they are what a diffusion model is trained on, and what latent-diffusion takes (`scale_by_std`,
    ldm/models/diffusion/ddpm.py; of its first batch alone). seed: with each clip's position, of the samples.
    Raises ScaleError without clips, and for latents that are not finite.
    """
    device = next(model.parameters()).device
    stats, count, sizes = RunningStats(), 0, set()
    for clip in clips:
        clip = clip.to(device)
        z = model.encode(clip.video).sample(clip.generators(seed, device))
        if not z.isfinite().all():
            raise ScaleError("the latents are not finite; do the weights hold NaN?")
        stats.update_channels(z.cpu())
        count += len(z)
        sizes.add(tuple(clip.video.shape[2:]))
    if not count:
        raise ScaleError("the scale of the latents cannot be measured: there is no clip that can be read")
    return MeasuredScale(count, sizes.pop() if len(sizes) == 1 else None, stats.mean, stats.variance.sqrt())


def spread_clips(
    table: pd.DataFrame, settings: ClipSettings, frames: int, count: int, errors: list[tuple[str, str]]
) -> Iterator[Clip]:
    """A clip of `frames` frames of each of `count` rows, evenly spread over those that are long enough (tables are
    often sorted by class), always the same: see data.loader.still_clip. errors: gets (path, reason) of files that fail.
    """
    lengths = settings.length(table["num_frames"].to_numpy(), table["fps"].to_numpy())
    enough, bounds = np.flatnonzero(lengths >= frames), bounds_of(table)
    places = np.linspace(0, len(enough) - 1, min(count, len(enough))).round().astype(int)
    for row in enough[places]:
        try:
            yield still_clip(table["path"].iloc[row], bounds[row], int(row), settings, frames)
        except MediaError as error:
            errors.append((error.path, error.reason))


def rescaled(
    checkpoint: Checkpoint,
    model: nn.Module,
    measured: MeasuredScale,
    *,
    shift: bool = False,
    per_channel: bool = False,
) -> Checkpoint:
    """The checkpoint of `model` with a configuration whose `normalize` gives unit variance on what was measured.

    Of a SpatialVAE one scaling_factor for all channels, 1 / std; shift: also shift_factor, the mean, which SD and SDXL
    leave at 0; per_channel: both, of each channel. Of all others `shift` and `scale`, the mean and standard deviation
    of each channel.
    Raises ScaleError if these do not vary.
    """
    if isinstance(model, SpatialVAE) and per_channel:
        stds = measured.std.tolist()
        _check_not_constant(stds)
        told = {"scaling_factor": [1 / std for std in stds], "shift_factor": measured.mean.tolist()}
        return replace(checkpoint, config=checkpoint.config | told)
    if isinstance(model, SpatialVAE):
        mean, std = measured.over_channels()
        _check_not_constant([std])
        told = {"scaling_factor": 1 / std} | ({"shift_factor": mean} if shift else {})
        return replace(checkpoint, config=checkpoint.config | told)
    assert isinstance(model, LatentNormMixin)
    factors = {"shift": measured.mean.tolist(), "scale": measured.std.tolist()}
    _check_not_constant(factors["scale"])
    kept = {  # OpenSoraVAE has them among its weights
        name: torch.tensor(values, dtype=torch.float32)[None, :, None, None, None]
        for name, values in factors.items()
        if name in checkpoint.state
    }
    return replace(checkpoint, config=checkpoint.config | factors, state={**checkpoint.state, **kept})


def _check_not_constant(stds: list[float]) -> None:
    constant = [str(channel) for channel, std in enumerate(stds) if not std > 0]
    if constant:
        raise ScaleError(f"latents of channel {', '.join(constant)} do not vary, and cannot be scaled to unit variance")

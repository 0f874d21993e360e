"""Measure the mean and standard deviation of an autoencoder's latents, and write them into a checkpoint.

A diffusion model needs latents with about zero mean and unit variance. The scale of an autoencoder's latents differs
from run to run (SD 0.18215, SDXL 0.13025, FLUX 0.3611), so it is measured, never copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vae3d.arguments import DEVIATIONS
from vae3d.checkpoints.formats import Checkpoint
from vae3d.data.batches.clips import ClipSettings, Stream
from vae3d.data.batches.held_out import validation_clip
from vae3d.data.batches.selection import clip_lengths
from vae3d.data.batches.streaming import StreamingData, first_clips
from vae3d.data.loader import TrainingData
from vae3d.data.media import MediaError
from vae3d.data.table.file_table import FileTable, as_file_table
from vae3d.errors import UserError
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder, latent_space
from vae3d.models.spatial import SpatialVAE
from vae3d.precision import no_tf32
from vae3d.running_stats import RunningStats
from vae3d.text import plural
from vae3d.types import ClipBatch

TOLERANCE = 0.1  # of a channel's mean (from 0) and standard deviation (from 1), for diffusion


class ScaleError(UserError):
    """The scale of the latents is wrong, or cannot be measured or set."""


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation (of the population) of latents, per channel, [C] fp64.

    clips: number measured. size: (T, H, W) of all clips, None if it varies.
    """

    clips: int
    mean: Tensor
    std: Tensor
    size: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, stats: RunningStats, clips: int, size: tuple[int, int, int] | None = None) -> LatentStats:
        """From sums over all latent positions. clips, size: as the fields."""
        return cls(clips, stats.mean.cpu(), stats.variance.sqrt().cpu(), size)

    def over_channels(self) -> tuple[float, float]:
        """Mean and standard deviation of all values of all channels."""
        mean = self.mean.mean()
        variance = (self.std.square() + (self.mean - mean).square()).mean()
        return float(mean), float(variance.sqrt())

    def rms(self) -> float:
        """Root mean square of all values of all channels."""
        return math.hypot(*self.over_channels())

    def facts(self) -> dict[str, Any]:
        """The measurement as plain values, for model.yaml."""
        return {
            "clips": self.clips,
            "frames_height_width": self.size and list(self.size),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    def __str__(self) -> str:
        means, stds = (", ".join(f"{value:.3f}" for value in values.tolist()) for values in (self.mean, self.std))
        return f"over {plural(self.clips, 'latent')}, per channel\n  mean {means}\n  std  {stds}"


def off_scale(means: Sequence[float], stds: Sequence[float]) -> list[int]:
    """Channels of normalised latents whose mean is not about 0, or whose standard deviation is not about 1, or NaN."""
    pairs = enumerate(zip(means, stds, strict=True))
    return [channel for channel, (mean, std) in pairs if not (abs(mean) <= TOLERANCE and abs(std - 1) <= TOLERANCE)]


def check_normalised(stats: LatentStats, hint: str) -> None:
    """Raises ScaleError, with the statistics and `hint`, the command that fixes them, if they are off."""
    if outside := off_scale(stats.mean.tolist(), stats.std.tolist()):
        raise ScaleError(
            f"latents of channel {', '.join(map(str, outside))} do not have mean 0 and standard deviation 1 "
            f"(within {TOLERANCE} each), as diffusion needs; {stats}\n{hint}"
        )


def unscalable_reason(model: nn.Module) -> str | None:
    """Why no scale can be set on a model; None if it can."""
    if isinstance(model, DiffusersVAE):
        return f"a {model.kind} runs in diffusers, whose config holds its scale"
    if latent_space(model) != "raw":
        return "its latents are already normalised, for a diffusion model; set the scale of the VAE they come from"
    return None


@no_tf32()
@torch.no_grad()
def measure(
    model: nn.Module,
    clips: Iterable[ClipBatch],
    seed: int = 0,
    *,
    by_pixels: bool = False,
    of_means: bool = False,
) -> LatentStats:
    """Encode clips one by one, in the model's precision, and measure samples of their posteriors.

    A diffusion model is trained on samples, and latent-diffusion measures them too (`scale_by_std`,
    ldm/models/diffusion/ddpm.py, on its first batch only). seed: for the samples, with each clip's index.
    of_means: measure the posteriors' means instead, for a diffusion model that is trained on them.
    by_pixels: `std` is then inversely proportional to each channel's effect on the decoded pixels, so that equal errors
    of normalised latents change the pixels equally; their variance is 1 over all channels.
    Raises ScaleError without clips, and for latents that are not finite.
    """
    device = next(model.parameters()).device
    stats, count, sizes, effect = RunningStats(), 0, set(), torch.zeros(())
    noise = torch.Generator(device).manual_seed(seed)
    for clip in clips:
        clip = clip.to(device)
        posterior = model.encode(clip.video)
        z = posterior.mean if of_means else posterior.sample(clip.generators(seed, device))
        if not z.isfinite().all():
            raise ScaleError("the latents are not finite; do the weights hold NaN?")
        stats.update_channels(z.cpu())
        if by_pixels:
            effect = effect + pixel_effect(model.decode, z, noise).cpu()
        count += len(z)
        sizes.add(tuple(clip.video.shape[2:]))
    if not count:
        raise ScaleError("the scale of the latents cannot be measured: no clip could be read")
    measured = LatentStats.of(stats, count, sizes.pop() if len(sizes) == 1 else None)
    if by_pixels:
        counts = measured.std * effect.sqrt()  # of each channel, in pixels
        measured = replace(measured, std=counts.square().mean().sqrt() / effect.sqrt())
    return measured


def pixel_effect(decode: Callable[[Tensor], Tensor], z: Tensor, generator: torch.Generator) -> Tensor:
    """How much each channel of latents [B, C, t, h, w] changes the decoded pixels: [C] fp64.

    The mean over latents of the squared derivatives of all pixels, estimated by one backward pass of unit noise.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        pixels = decode(z)
        noise = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=pixels.dtype)
        (gradient,) = torch.autograd.grad(pixels, z, noise)
    return gradient.double().square().mean((0, 2, 3, 4))


def spread_clips(
    table: pd.DataFrame | FileTable, settings: ClipSettings, frames: int, count: int, errors: list[tuple[str, str]]
) -> Iterator[ClipBatch]:
    """Yield one clip of `frames` frames from each of `count` files, the same every time (see validation_clip).

    The files are spread evenly over the long enough rows of the table, since tables are often sorted by class.
    (path, reason) of files that fail is appended to `errors`.
    """
    table = as_file_table(table)
    rows = np.flatnonzero(clip_lengths(table, settings) >= frames)
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    for row in rows[chosen]:
        try:
            yield validation_clip(table.path(row), table.bounds(row), int(row), settings, frames)
        except MediaError as error:
            errors.append((error.path, error.reason))


def longest_clips(data: TrainingData | StreamingData, count: int, errors: list[tuple[str, str]]) -> Iterator[ClipBatch]:
    """spread_clips of training data, with as many frames as training clips have at most. Of several streams: those of
    the largest clips; of a streaming source: its first clips."""
    if isinstance(data, StreamingData):
        clips, failed = first_clips(data.stream, data.settings, data.schedule.frames.all()[-1], count)
        errors += failed
        return iter(clips)

    def longest(stream: Stream) -> int:
        return [n for n in stream.schedule.frames.all() if len(stream.schedule.with_at_least(n))][-1]

    def pixels(stream: Stream) -> int:
        return longest(stream) * stream.settings.height * stream.settings.width

    stream = max(data.streams, key=pixels)
    rows = stream.schedule.rows
    table = stream.table if rows is None else as_file_table(stream.table).select(rows)
    return spread_clips(table, stream.settings, longest(stream), count, errors)


def rescaled(
    checkpoint: Checkpoint,
    model: nn.Module,
    measured: LatentStats,
    *,
    shift: bool = False,
    per_channel: bool = False,
) -> Checkpoint:
    """The checkpoint with the measured scale in its configuration: `normalize` then gives unit variance.

    A SpatialVAE gets scaling_factor = 1 / std of all channels; with `shift` also shift_factor = the mean, which is 0 in
    SD and SDXL; with `per_channel` both per channel. Other models get latents_mean and latents_std, per channel.
    Raises ScaleError for latents that do not vary, or, measured by pixels, do not reach them.
    """
    one_factor = isinstance(model, SpatialVAE) and not per_channel
    if one_factor:
        means, stds = ([value] for value in measured.over_channels())
    else:
        means, stds = measured.mean.tolist(), measured.std.tolist()
    if constant := [str(channel) for channel, std in enumerate(stds) if not DEVIATIONS.allows(std)]:
        raise ScaleError(
            f"latents of channel {', '.join(constant)} do not vary, or do not reach the pixels, and cannot be scaled "
            "to unit variance"
        )
    if isinstance(model, SpatialVAE):
        factors = {"scaling_factor": [1 / std for std in stds], "shift_factor": means}
        if one_factor:
            factors = {name: value for name, (value,) in factors.items() if shift or name == "scaling_factor"}
        return replace(checkpoint, config=checkpoint.config | factors)
    assert isinstance(model, VideoAutoencoder)
    factors = {"latents_mean": means, "latents_std": stds}
    buffers = {  # an OpenSoraVAE has them among its weights
        name: torch.tensor(values, dtype=torch.float32)[None, :, None, None, None]
        for name, values in factors.items()
        if name in checkpoint.state
    }
    return replace(checkpoint, config=checkpoint.config | factors, state={**checkpoint.state, **buffers})

"""The best linear code of a temporal VAE's frames, with which its shortcuts can start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.inference.scale import pixel_effect
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.temporal import TemporalVAE
from vae3d.precision import no_tf32
from vae3d.running_stats import RunningStats
from vae3d.seeding import seed_of
from vae3d.training.freeze import eval_mode
from vae3d.types import ClipBatch

FLOOR = 1e-6  # of the largest variance: directions in which the clips do not vary


@no_tf32()
@torch.no_grad()
def fit_shortcut(model: OpenSoraVAE, clips: Iterable[ClipBatch], seed: int = 0) -> str:
    """Set the temporal VAE's shortcuts to the linear code that loses least of the pixels, and say how much it loses.

    A principal component analysis of the `stride` 2D latents behind each temporal latent, centred, with each channel
    scaled by its effect on the decoded pixels. The temporal latents then have mean 0 and variance 1. seed: of the
    noise that measures the effect. Raises UserError without clips, or for latents that are not finite.
    """
    temporal = model.temporal_vae
    device = temporal.shortcut_in.weight.device
    generator = torch.Generator(device).manual_seed(seed_of(seed, "linear code"))
    stats, effect, count = RunningStats(), torch.zeros(temporal.in_channels, dtype=torch.float64), 0
    with eval_mode(model):
        for clip in clips:
            latent = model.encode_spatial(clip.to(device).video)
            for chunk in latent.split(model.micro_frames or latent.shape[2], 2):
                stats.update_channels(temporal.frame_groups(chunk).cpu())
            middle = latent[:, :, latent.shape[2] // 2, None]
            effect += pixel_effect(model.decode_spatial, middle, generator).cpu()
            count += 1
    if not count:
        raise UserError("the shortcut cannot be fitted: no clip could be read")
    if not (stats.scatter.isfinite().all() and effect.isfinite().all()):
        raise UserError("the shortcut cannot be fitted: latents or pixels are not finite; do the weights hold NaN?")
    kept = set_linear_code(temporal, stats, effect.sqrt())
    return f"shortcut fitted to {count} clips: its latents keep {kept:.2%} of the variance, as it counts in pixels"


@torch.no_grad()
def set_linear_code(temporal: TemporalVAE, stats: RunningStats, scale: Tensor) -> float:
    """Write the principal components of frame groups [C * stride] into the shortcuts; returns the share they keep.

    scale: [C], of each channel before the analysis.
    """
    scale = scale.repeat_interleave(temporal.stride)
    variances, vectors = torch.linalg.eigh(scale[:, None] * stats.scatter / stats.count * scale)
    variances, vectors = variances.flip(0), vectors.flip(1)
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)  # eigh leaves the sign open
    count = min(temporal.latent_channels, len(variances))
    deviations = variances[:count].clamp(min=FLOOR * variances[0]).sqrt()
    inward, outward = temporal.shortcut_in, temporal.shortcut_out
    for parameter in (*inward.parameters(), *outward.parameters()):
        parameter.zero_()
    code = (vectors[:, :count] / deviations).T * scale
    back = vectors[:, :count] * deviations / scale[:, None]
    inward.weight[:count] = code[..., None, None, None].to(inward.weight)
    inward.bias[:count] = -(code @ stats.mean).to(inward.bias)
    outward.weight[:, :count] = back[..., None, None, None].to(outward.weight)
    outward.bias.copy_(stats.mean)
    return float(variances[:count].sum() / variances.sum())

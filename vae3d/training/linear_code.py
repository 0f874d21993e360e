"""Fit the shortcuts of a spatial or temporal VAE to clips: the best linear code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.latents.scale import pixel_effect
from vae3d.models.layers.linear_code import set_linear_code
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.spatial import SpatialVAE
from vae3d.precision import no_tf32
from vae3d.running_stats import RunningStats
from vae3d.seeding import seed_of
from vae3d.text import plural
from vae3d.training.freeze import eval_mode
from vae3d.types import ClipBatch

FLOOR = 1e-6  # of the largest variance: directions in which the clips do not vary


@no_tf32()
@torch.no_grad()
def fit_shortcut(model: SpatialVAE | OpenSoraVAE, clips: Iterable[ClipBatch], seed: int = 0) -> str:
    """Set a model's shortcuts to the linear code that loses least of the pixels, and say how much it loses.

    A principal component analysis, centred, of the patches of pixels behind a SpatialVAE's latents, or of the 2D
    latents behind a TemporalVAE's, where each channel is scaled by its effect on the decoded pixels. The latents then
    have mean 0 and variance 1. seed: of the noise that measures the effect.
    Raises UserError without clips, or for values that are not finite.
    """
    vae = model.temporal_vae if isinstance(model, OpenSoraVAE) else model
    device, count = vae.shortcut_in.weight.device, 0
    generator = torch.Generator(device).manual_seed(seed_of(seed, "linear code"))
    stats, effect = RunningStats(), torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        for clip in clips:
            video = clip.to(device).video
            if isinstance(model, OpenSoraVAE):
                latent = model.encode_spatial(video)
                for chunk in latent.split(model.micro_frames or latent.shape[2], 2):
                    stats.update_channels(vae.frame_groups(chunk).cpu())
                middle = latent[:, :, latent.shape[2] // 2, None]
                effect = effect + pixel_effect(model.decode_spatial, middle, generator).cpu()
            else:
                stats.update_channels(vae.patches(video).cpu())
            count += 1
    if not count:
        raise UserError("the shortcut cannot be fitted: no clip could be read")
    if not (stats.scatter.isfinite().all() and effect.isfinite().all()):
        raise UserError("the shortcut cannot be fitted: latents or pixels are not finite; do the weights hold NaN?")
    scale = (
        effect.sqrt().repeat_interleave(vae.stride) if isinstance(model, OpenSoraVAE) else torch.ones_like(stats.mean)
    )
    kept = set_principal_components(vae.shortcut_in, vae.shortcut_out, stats, scale)
    fitted = f"shortcut fitted to {plural(count, 'clip')}"
    return f"{fitted}: its latents keep {kept:.2%} of the variance, as it counts in pixels"


def set_principal_components(inward: nn.Module, outward: nn.Module, stats: RunningStats, scale: Tensor) -> float:
    """Write principal components into shortcuts; returns the share of the variance that they keep.

    stats: of the shortcuts' n inputs. scale: [n], of each input before the analysis.
    """
    variances, vectors = torch.linalg.eigh(scale[:, None] * stats.scatter / stats.count * scale)
    variances, vectors = variances.flip(0), vectors.flip(1)
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)  # eigh leaves the sign open
    deviations = variances.clamp(min=FLOOR * variances[0]).sqrt()
    code, back = (vectors / deviations).T * scale, vectors * deviations / scale[:, None]
    set_linear_code(inward, outward, code, back, stats.mean)
    return float(variances[: len(inward.weight)].sum() / variances.sum())

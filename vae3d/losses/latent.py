"""Losses on latents: the posterior's KL, and the 2D latents inside a two-stage autoencoder."""

from __future__ import annotations

import torch

from vae3d.losses.objective import ErrorMap, Term, numel_per_frame
from vae3d.types import ClipBatch, Reconstruction, SpatialPath


class KL(Term):
    """KL(posterior || N(0, 1)) in nats. reduction=sum sums over a clip, not a frame (Open-Sora v1.2 `losses.py`).

    latent-diffusion's weight of 1e-6 is for a sum beside summed terms. Beside averaged terms, for images of
    N = 3 x H x W elements with n latent elements, it corresponds to 1e-6 / N of the sum (5.1e-12 at 256 pixels) or
    1e-6 * n / N of the mean (2.1e-8 for f8c4, of any size); 1e-6 of the sum is then N times too much.
    `loss_mean/kl` is always in nats per latent element.
    """

    needs_pixels = False
    needs_posterior = True

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap | None:
        if out.posterior is None:
            return None
        kl = out.posterior.kl_map().float()
        return ErrorMap(kl, kl[0].numel())


class LatentL1(Term):
    """|reconstructed - encoded| 2D latents, which train the temporal VAE in Open-Sora's stages 1 and 2.

    The target is detached: otherwise a trained 2D encoder would make its latents easier to reconstruct.
    """

    needs_pixels = False
    norm = staticmethod(torch.abs)

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap:
        path = _two_stage(out)
        target = path.latent.detach().float()
        return ErrorMap(self.norm(path.latent_rec.float() - target), numel_per_frame(target))


class LatentMSE(LatentL1):
    """(reconstructed - encoded)^2 of 2D latents: LatentL1 for a model that starts near its optimum.

    With a linear shortcut most errors are small and around zero, where the gradient of an L1 norm averages out.
    """

    norm = staticmethod(torch.square)


class Identity(Term):
    """|temporal latent - 2D latent| of single images, to keep the two latent spaces alike.

    use_image_identity_loss in Open-Sora v1.2 `train_vae.py`. Does not apply to clips of several frames.
    Raises ValueError if the two latents have different channels.
    """

    needs_pixels = False

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap | None:
        path = _two_stage(out)
        if batch.video.shape[2] > 1:
            return None
        if path.latent.shape != out.z.shape:
            raise ValueError(
                f"the identity loss compares 2D latents of {path.latent.shape[1]} channels with temporal latents of "
                f"{out.z.shape[1]}; make them equal, or use a loss without identity"
            )
        target = path.latent.detach().float()
        return ErrorMap(torch.abs(out.z.float() - target), numel_per_frame(target))


def _two_stage(out: Reconstruction) -> SpatialPath:
    if out.spatial is None:
        raise ValueError("latent and identity losses need a model with a 2D VAE inside, such as model=temporal_vae")
    return out.spatial

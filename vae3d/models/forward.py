"""Parts of VideoAutoencoder.forward that the models share."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vae3d.models.interface import VideoAutoencoder
from vae3d.pixels import check_video
from vae3d.seeding import Generators, randn_like, uniform
from vae3d.types import Delta, Posterior, Reconstruction


def reconstruct(
    model: VideoAutoencoder,
    video: Tensor,
    *,
    latents: Tensor | None = None,
    encode: bool = False,
    sample: bool = True,
    pixels: bool = True,
    generator: Generators = None,
    noise: float = 0.0,
) -> Reconstruction:
    """VideoAutoencoder.forward for a model that encodes and decodes in one stage."""
    check_video(video, values=False)
    frames, height, width = video.shape[2:]
    posterior = model.encode(video) if encode or latents is None else None
    z = choose_latents(posterior, latents, sample, generator)
    rec = model.decode(add_latent_noise(z, noise, generator), frames)[..., :height, :width] if pixels else None
    return Reconstruction(rec, posterior, z)


def choose_latents(
    posterior: Posterior | Delta | None, latents: Tensor | None, sample: bool, generator: Generators
) -> Tensor:
    """The given latents, or else the posterior's sample or mode."""
    if latents is not None:
        return latents
    return posterior.sample(generator) if sample else posterior.mode()


def add_latent_noise(z: Tensor, noise: float, generator: Generators) -> Tensor:
    """z + sigma * std(z) * eps for latents z [B, C, t, h, w], where eps is standard normal.

    sigma is uniform in [0, noise], one draw per clip, as for the decoders of RAE (arXiv 2510.11690, `noise_tau` in
    bytetriper/RAE) and LTX-Video (arXiv 2501.00103). std(z) is computed per clip, so that `noise` does not depend on
    the scale of the latents. Gradients pass through std(z): otherwise the encoder could enlarge its latents to drown
    the noise.
    """
    if not noise:
        return z
    sigma = noise * uniform(len(z), z.device, generator)
    std = z.float().flatten(1).std(1, correction=0)
    return z + (sigma * std).view(-1, 1, 1, 1, 1) * randn_like(z, generator)


def attach_decoder(out: Reconstruction, model: VideoAutoencoder) -> Reconstruction:
    """Set out.decode, with which loss terms decode other latents."""
    return replace(out, decode=lambda z, video: model(video, latents=z).video)

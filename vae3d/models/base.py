"""What every video autoencoder of this project offers to training, inference and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

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
    """VideoAutoencoder.forward of a model that encodes and decodes in one stage."""
    check_video(video, values=False)
    frames, height, width = video.shape[2:]
    posterior = model.encode(video) if encode or latents is None else None
    z = latents_of(posterior, latents, sample, generator)
    rec = model.decode(add_latent_noise(z, noise, generator), frames)[..., :height, :width] if pixels else None
    return Reconstruction(rec, posterior, z)


def latents_of(
    posterior: Posterior | Delta | None, latents: Tensor | None, sample: bool, generator: Generators
) -> Tensor:
    """The latents of a forward pass: those that were given, or else the posterior's."""
    if latents is not None:
        return latents
    return posterior.sample(generator) if sample else posterior.mode()


def add_latent_noise(z: Tensor, noise: float, generator: Generators) -> Tensor:
    """What the decoder gets of latents [B, C, t, h, w]: z + sigma * std(z) * eps.

    sigma is drawn for every clip, uniformly from [0, noise], as for the decoders of RAE (arXiv 2510.11690, `noise_tau`
    in bytetriper/RAE) and LTX-Video (arXiv 2501.00103); eps is standard normal. std(z), of each clip's own latents,
    gives `noise` the same meaning for latents of any scale. Gradients pass through it, so that the encoder does not
    enlarge its latents to drown the noise.
    """
    if not noise:
        return z
    each = (-1, 1, 1, 1, 1)
    sigma = noise * uniform(len(z), z.device, generator)
    deviation = z.float().flatten(1).std(1, correction=0)
    return z + (sigma * deviation).view(each) * randn_like(z, generator)


def attach_decoder(out: Reconstruction, model: VideoAutoencoder) -> Reconstruction:
    """The same with `decode`: what `model` makes of other latents."""
    return replace(out, decode=lambda z, video: model(video, latents=z).video)


def share_frames(a: VideoAutoencoder, b: VideoAutoencoder, frames: int, height: int, width: int) -> bool:
    """Whether both take clips of this size without adding frames, to latents of one shape."""
    whole = a.frames_valid(frames) and b.frames_valid(frames)
    return whole and a.latent_shape(frames, height, width) == b.latent_shape(frames, height, width)


def nearest_frames(frames: int, fits: Callable[[int], bool]) -> list[int]:
    """Up to four frame counts nearest to `frames` that fit, ascending."""
    return sorted(sorted(filter(fits, range(1, frames + 36)), key=lambda n: abs(n - frames))[:4])


def latent_space(model: nn.Module) -> str:
    """Whether a model's latents are a VAE's own (raw) or those that a diffusion model sees (normalized)."""
    return getattr(model, "latent", "raw")


def convert_latents(z: Tensor, source: nn.Module, target: nn.Module) -> Tensor:
    """Latents of `source` as `target` has them; the one whose latents are raw knows their mean and deviation."""
    if latent_space(source) == latent_space(target):
        return z
    return source.normalize(z) if latent_space(source) == "raw" else target.denormalize(z)

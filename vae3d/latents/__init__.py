"""What lies between an autoencoder and a diffusion model."""

from vae3d.latents.codec import LatentCodec

__all__ = ["LatentCodec"]

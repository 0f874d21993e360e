"""Latents of an autoencoder: codec, cache, statistics, scale, probes."""

from vae3d.latents.codec import LatentCodec

__all__ = ["LatentCodec"]

"""Diffusion models on the latents of a VAE: networks, processes, guidance, sampling."""

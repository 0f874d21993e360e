"""What lies between an autoencoder and a diffusion model."""

"""Train a diffusion model on latents with python, torchrun or accelerate launch; see docs/latents.md.

    python scripts/train_latent_diffusion.py vae.path=runs/sd_vae_gan cache=latents/photos labels=auto
    torchrun --nproc-per-node=8 scripts/train_latent_diffusion.py vae.path=Wan2.1_VAE.pth data=video_csv \\
        data.source.path=videos.csv data.frames.min=17 data.frames.max=17 denoiser=video_transformer

The same command resumes a run. Settings: vae3d/config/diffusion.py (DiffusionConfig).
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train-diffusion", *sys.argv[1:]]))

"""Encode a data set into a latent cache with python or torchrun; see docs/latents.md.

    python scripts/encode_latents.py checkpoint=runs/sd_vae_gan source=photos cache=latents/photos height=256 width=256
    torchrun --nproc-per-node=8 scripts/encode_latents.py checkpoint=Wan2.1_VAE.pth source=videos.csv \\
        cache=latents/videos height=480 width=832 frames=81 fps=16 clips=all precision=bf16

The same command resumes, also with another number of processes; started again meanwhile, it helps. With --shard 3/64 it
is the third of 64 array jobs. Settings: vae3d/config/latents.py (EncodeConfig).
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["encode", *sys.argv[1:]]))

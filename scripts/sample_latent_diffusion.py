"""Draw samples from a latent diffusion model with python or torchrun; see docs/latents.md.

    python scripts/sample_latent_diffusion.py checkpoint=runs/ldm-unet-flow out=samples count=64 guidance=2
    python scripts/sample_latent_diffusion.py checkpoint=runs/ldm-unet-ddpm out=samples classes=[cat,dog] method=ddim

Writes OUT/grid.png (or .mp4), OUT/000000_cat.png, ... and, for images, OUT/samples_64x64x64x3.npz in the format of
openai/guided-diffusion's evaluator: arr_0 uint8 NHWC and, with classes, arr_1. A sample depends on its index, its
class and the seed, not on its batch. Settings: vae3d/config/diffusion.py (SampleConfig).
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["sample", *sys.argv[1:]]))

"""Reconstruct videos and images: python or torchrun; see docs/score.md.

    python infer.py checkpoint=runs/opensora_stage3 source=videos.csv save_dir=out/stage3 metrics=[psnr,ssim]
    python infer.py checkpoint=runs/taehv_wan_best teacher=Wan2.1_VAE.pth source=videos.csv save_dir=out/tiny

Writes out/stage3_ori, _rec and, of two-stage models, _spatial; with a teacher _compare, see docs/taehv.md. Settings:
InferConfig in vae3d/config/schema.py.
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["infer", *sys.argv[1:]]))

"""Reconstruct videos and images with python or torchrun; see docs/score.md.

    vae3d infer checkpoint=runs/opensora_stage3 source=videos.csv save_dir=out/stage3 metrics=[psnr,ssim]

Writes out/stage3_ori, out/stage3_rec and, for two-stage models, out/stage3_spatial. The same command resumes.
Settings: vae3d/config/schema.py (InferConfig).
"""

import sys

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
from vae3d.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["infer", *sys.argv[1:]]))

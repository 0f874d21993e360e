"""Score a reconstruction, or any two videos of one size: metrics in ten lines."""

from __future__ import annotations

import argparse

import vae3d

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("original", help="a video")
parser.add_argument("reconstruction", help="a video of the same size and length")
parser.add_argument("--metrics", nargs="+", default=["psnr", "ssim", "flicker"], help="docs/score.md lists all")
args = parser.parse_args()

# %% Files are read chunk by chunk. Tensors, [B, 3, T, H, W] in [-1, 1], work, too.
scores = vae3d.score(args.original, args.reconstruction, args.metrics)
for name, value in scores.items():
    print(f"{name:16} {value:.4f}" if value is not None else f"{name:16} undefined")

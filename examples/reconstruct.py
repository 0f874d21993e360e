"""Reconstruct a video and score it, in ten lines: python examples/reconstruct.py CHECKPOINT in.mp4 out.mp4"""

from __future__ import annotations

import sys

import vae3d

checkpoint, source, target = sys.argv[1:]
model = vae3d.load(checkpoint)
vae3d.reconstruct(model, source, target, codec="lossless")  # chunk by chunk, in bounded memory
for name, value in vae3d.score(source, target, ["psnr", "ssim"]).items():
    print(f"{name}: {value:.3f}")

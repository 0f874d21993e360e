"""Reconstruct a video with an autoencoder, chunk by chunk, whatever its length."""

from __future__ import annotations

import argparse

import vae3d

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint", help="a run, an export, published weights, or owner/name on the Hugging Face hub")
parser.add_argument("source", help="a video")
parser.add_argument("target", help="the .mp4 to write")
args = parser.parse_args()

# %% The model, in eval mode, fp32. On a GPU: model.to("cuda")
model = vae3d.from_pretrained(args.checkpoint)
print(f"{type(model).__name__}: {model.spec.channels} channels at 1/{model.spec.space_stride} of the size")

# %% File in, file out. codec="lossless" keeps every pixel; "h264", the default, is smaller.
vae3d.reconstruct(model, args.source, args.target, codec="lossless", progress=True)
print(vae3d.score(args.source, args.target, ["psnr", "ssim"]))

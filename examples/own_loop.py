"""Train an autoencoder in your own loop, without configuration files."""

from __future__ import annotations

import argparse

import torch

import vae3d

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("video", help="a video to train on")
parser.add_argument("out", help="folder for the trained model")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

# %% A model with random weights and a video, [1, 3, T, 32, 32] in [-1, 1]
torch.manual_seed(0)
model = vae3d.build("taesd", "model.variant=taesd").train()
video = vae3d.read_video(args.video, height=32, width=32).frames
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# %% The loop. A model takes any number of frames and any size, and returns the same.
for step in range(args.steps):
    start = int(torch.randint(video.shape[2] - 3, ()))
    clip = video[:, :, start : start + 4]
    rec = model(clip).video
    loss = (rec - clip).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step}  loss {loss.item():.4f}")

# %% Save. vae3d.load(out) opens it.
vae3d.save(model.eval(), args.out)

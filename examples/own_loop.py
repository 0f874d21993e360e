"""Train an autoencoder in your own loop, without configuration files: python examples/own_loop.py video.mp4 OUT"""

from __future__ import annotations

import sys

import torch

import vae3d

source, out = sys.argv[1:]
torch.manual_seed(0)
model = vae3d.build("taesd", "model.variant=taesd").train()
video = vae3d.read_video(source, height=32, width=32).frames
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(20):
    start = int(torch.randint(video.shape[2] - 3, ()))
    clip = video[:, :, start : start + 4]
    rec = model(clip)  # any number of frames and any size in, the same out
    assert rec.video is not None
    loss = (rec.video - clip).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step}  loss {loss.item():.4f}")

vae3d.save(model.eval(), out)  # vae3d.load(out) opens it

"""Encode a video to normalised latents, as a diffusion model takes them, and decode them again:
python examples/latents.py CHECKPOINT video.mp4"""

from __future__ import annotations

import sys

import vae3d

checkpoint, source = sys.argv[1:]
codec = vae3d.open_codec(checkpoint)
video = vae3d.read_video(source)
z = codec.encode(video.frames)
print(f"{tuple(video.frames.shape)} -> {tuple(z.shape)}, mean {z.mean():.2f}, standard deviation {z.std():.2f}")
rec = codec.decode(z, video.frames.shape[2])
print(vae3d.score(video.frames, rec.clamp(-1, 1)))

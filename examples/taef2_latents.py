"""Encode videos into a cache of TAEF2's latents, read it back, decode it.

Any other autoencoder works alike. TAEF2's weights: vae3d fetch-weights taef2_encoder.pth taef2_decoder.pth --dest DIR
"""

from __future__ import annotations

import argparse

import vae3d
from vae3d.commands import encode
from vae3d.config.latents import EncodeConfig
from vae3d.latents.cache import LatentCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="taef2_encoder.pth, beside taef2_decoder.pth; or another autoencoder")
parser.add_argument("source", help="a video, a folder of videos, or a table with the column path")
parser.add_argument("cache", help="folder to write")
parser.add_argument("--frames", type=int, default=17, help="of a clip")
parser.add_argument("--size", type=int, default=256, help="height and width of a clip in pixels")
args = parser.parse_args()

# %% Encode. The same call resumes; vae3d encode does it on several GPUs.
config = EncodeConfig(checkpoint=args.checkpoint, source=args.source, cache=args.cache, clips="all", workers=0)
config.frames, config.height, config.width = args.frames, args.size, args.size
encode.run(config)

# %% Read back: a data set of normalised latents, [C, t, h, w], with about mean 0 and standard deviation 1
codec = vae3d.open_codec(args.checkpoint)
cache = LatentCache(args.cache, codec)
z, label, key = cache[0]
print(f"{len(cache)} clips; the first is {key}: {tuple(z.shape)}, mean {z.mean():.2f}, deviation {z.std():.2f}")

# %% Decode, here the first clip as it is; a diffusion model would have drawn z
clip = codec.decode(z[None], num_frames=args.frames)
vae3d.write_video(f"{args.cache}/first.mp4", clip, fps=24)
print(f"{args.cache}/first.mp4: {tuple(clip.shape)}")

"""Count the memory of the Wan2.1 VAE without running it, and check that a longer stream needs no more.

    python scripts/benchmarks/count_wan_memory.py
    python scripts/benchmarks/count_wan_memory.py --stream 10000 --channels 16   # decodes 10,000 frames of 64 x 64

Uses fake tensors: shapes only. Training is forward, L1 loss and backward of one fp32 clip with all gradients, without
weights and optimizer state. The peak is of all live tensors.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vae3d
from vae3d.argparse_types import positive_int
from vae3d.training.memory import PeakMemory

CLIPS = ((5, 128, 256), (17, 256, 256), (33, 256, 256), (5, 512, 1024))
VARIANTS = {
    "whole": {},
    "whole, checkpointed": {"gradient_checkpointing": True},
    "2 latents per chunk, checkpointed": {"gradient_checkpointing": True, "chunk_latents": 2},
    "decoder only, checkpointed": {"gradient_checkpointing": True},
}


def training(clip: tuple[int, int, int], build: Callable[[], nn.Module], decoder_only: bool = False) -> tuple[int, int]:
    """Bytes kept for backward, and peak bytes."""
    with FakeTensorMode():
        model = build()
        if decoder_only:
            for module in model.trainable_parts()["encoder"]:
                module.requires_grad_(False)
        video = torch.zeros(1, 3, *clip)
        with PeakMemory([*model.parameters(), video]) as memory:
            loss = (model(video, sample=False).video - video).abs().mean()
            kept = memory.live
            loss.backward()
    return kept, memory.peak


def wan(**settings: object) -> nn.Module:
    changes = {"gradient_checkpointing": False} | settings
    return vae3d.build("wan", *(f"model.{key}={value}" for key, value in changes.items()))


def table() -> None:
    print(f"{'training, fp32, GiB':36}" + "".join(f"{f'{t} x {h} x {w}':>20}" for t, h, w in CLIPS))
    print(f"{'':36}" + f"{'kept / peak':>20}" * len(CLIPS))
    for name, settings in VARIANTS.items():
        cells = [training(clip, lambda s=settings: wan(**s), name.startswith("decoder")) for clip in CLIPS]
        print(f"{name:36}" + "".join(f"{f'{kept / 2**30:.2f} / {peak / 2**30:.2f}':>20}" for kept, peak in cells))
    print(f"\n{'streaming decode, GiB':36}" + "".join(f"{f'{k} latents':>12}" for k in (1, 2, 4, 8)))
    model = wan()
    for height, width in ((480, 832), (720, 1280)):
        sizes = [model.chunk_memory(k, height, width) / 2**30 for k in (1, 2, 4, 8)]
        print(f"{f'{height} x {width}, fp32 (bf16: half)':36}" + "".join(f"{size:12.1f}" for size in sizes))


@torch.inference_mode()
def stream(frames: int, channels: int) -> None:
    """Decode a stream chunk by chunk and print the memory of this process."""
    model = wan(channels=channels, chunk_latents=2)
    latents, cache = model.latent_frames(frames), None
    size = model.spec.channels, 2, 8, 8
    done = 0
    for number in range(0, latents, 2):
        video, cache = model.decode_chunk(torch.randn(1, *size), cache)
        done += video.shape[2]
        if number & (number - 1) == 0 or number + 2 >= latents:  # powers of two, and the end
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(f"{done:8} frames decoded, peak of the process {peak:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", type=positive_int, metavar="FRAMES", help="decode a stream of 64 x 64 instead")
    parser.add_argument("--channels", type=positive_int, default=96, help="width of the streamed network (96)")
    args = parser.parse_args()
    if args.stream:
        stream(args.stream, args.channels)
    else:
        table()


if __name__ == "__main__":
    main()

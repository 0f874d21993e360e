"""Peak memory and operations of coding large frames in tiles, against whole frames.

    python scripts/benchmarks/count_tiles.py --size 2048
    python scripts/benchmarks/count_tiles.py --models taesd --run cpu     # also runs them, with random weights

Uses meta tensors: shapes only. The peak is of all live tensors of a GPU in fp32, without weights and input, and without
what libraries allocate themselves. --run adds seconds (on a CPU, of the process), and the largest difference to whole
frames, relative to the largest value.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vae3d
from vae3d.argparse_types import positive_int
from vae3d.training.memory import PeakMemory

# name -> arguments of vae3d.build; frames; overlap of tiles, None for exact ones
MODELS = {
    "taehv": (("taehv", "model.variant=taew2_1"), 5, None),
    "wan": (("wan",), 5, None),
    "taesd": (("taesd", "model.variant=taesd"), 1, None),
    "taef2": (("taesd", "model.variant=taef2"), 1, None),
    "sd_vae": (("sd_vae",), 1, 64),
}


def count(step: Callable[[Tensor], object], x: Tensor, apart: list[Tensor]) -> str:
    """MiB and GFLOP of step(x); a multiplication and an addition are two."""
    with PeakMemory(apart) as memory:
        step(x)
    with FlopCounterMode(display=False) as operations:
        step(x)
    return f"{memory.peak / 2**20:.0f} | {operations.get_total_flops() / 1e9:.0f}"


def measure(step: Callable[[Tensor], Any], x: Tensor, device: torch.device) -> tuple[Any, float]:
    """step(x), and its seconds."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    out = step(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return out, clock() - start


@torch.no_grad()  # inference mode hides operations from the counters
def rows(name: str, size: int, tiles: list[int | None], device: torch.device | None) -> Iterator[str]:
    """Of the table, for a model."""
    arguments, frames, overlap = MODELS[name]
    with torch.device("meta"):
        model = vae3d.build(*arguments)
    video = torch.empty(1, 3, frames, size, size, device="meta")
    if device is not None:
        real = vae3d.build(*arguments).to(device)
        clip = torch.rand(video.shape, device=device) * 2 - 1
    whole: list[Tensor] = []
    for tile in tiles:
        model.set_tiles(tile, overlap if tile else None)
        z = model.encode(video).mode()
        apart = [*model.parameters(), *model.buffers(), video, z]
        text = f"| {name} | {frames} | {model.tiling or 'whole frames'} "
        text += f"| {count(model.encode, video, apart)} | {count(model.decode, z, apart)} |"
        if device is not None:
            real.set_tiles(tile, overlap if tile else None)
            posterior, encoding = measure(real.encode, clip, device)
            latents = posterior.mode()
            pixels, decoding = measure(real.decode, whole[0] if whole else latents, device)
            whole = whole or [latents, pixels]
            pairs = zip(whole, (latents, pixels), strict=True)
            text += f" {encoding:.1f} | {decoding:.1f} | "
            text += " | ".join(f"{((b - a).abs().max() / a.abs().max()).item():.0e}" for a, b in pairs) + " |"
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive_int, default=512, help="height and width of the frames (512)")
    parser.add_argument("--tiles", type=positive_int, nargs="+", default=[256, 128])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--run", metavar="DEVICE", help="also run them")
    args = parser.parse_args()
    columns = ["model", "frames", "coded in", "encode, MiB", "GFLOP", "decode, MiB", "GFLOP"]
    columns += ["encode, s", "decode, s", "latents differ by", "pixels differ by"] if args.run else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in args.models:
        for row in rows(name, args.size, [None, *args.tiles], args.run and torch.device(args.run)):
            print(row, flush=True)


if __name__ == "__main__":
    main()

"""Peak memory and time of coding large frames in tiles, against whole frames, with random weights.

    python scripts/benchmarks/bench_tiles.py --size 1024 --device cuda

Prints a table in Markdown. Time on a CPU is that of the process, so that other processes do not count; on a GPU it is
measured from outside. The last columns are the largest difference of latents and pixels from those of whole frames,
relative to their largest value.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import vae3d
from vae3d.inference.cost import timed

# name -> arguments of vae3d.build; frames; overlap of tiles, None for exact ones
MODELS = {
    "TAEHV (taew2_1)": (("taehv", "model.variant=taew2_1"), 5, None),
    "TAESD (taesd)": (("taesd", "model.variant=taesd"), 1, None),
    "TAEF2 (taef2)": (("taesd", "model.variant=taef2"), 1, None),
    "SD VAE": (("sd_vae",), 1, 64),
}


def difference(tiled: Tensor, whole: Tensor) -> str:
    return f"{((tiled - whole).abs().max() / whole.abs().max()).item():.0e}"


def measure(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, list[str]]:
    """What it returns, and its peak memory in MiB and seconds, as text."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    gc.collect()
    results: list[Tensor] = []
    seconds, memory = timed(lambda: results.append(run()), device, 1, clock)
    return results[-1], [f"{1024 * memory:.0f}", f"{seconds:.2f}"]


@torch.inference_mode()
def rows(name: str, size: int, tiles: list[int], device: torch.device) -> Iterator[list[str]]:
    """Of the table, for a model."""
    arguments, frames, overlap = MODELS[name]
    torch.manual_seed(0)
    model = vae3d.build(*arguments).to(device)
    video = torch.rand(1, 3, frames, size, size, device=device) * 2 - 1
    z, encoding = measure(lambda: model.encode(video).mode(), device)
    pixels, decoding = measure(lambda: model.decode(z, frames), device)
    yield [name, str(frames), "whole frames", *encoding, *decoding, "", ""]
    for tile in tiles:
        model.set_tiles(tile, overlap)
        tiled_z, encoding = measure(lambda: model.encode(video).mode(), device)
        tiled_pixels, decoding = measure(lambda: model.decode(z, frames), device)
        errors = [difference(tiled_z, z), difference(tiled_pixels, pixels)]
        yield [name, str(frames), str(model.tiling), *encoding, *decoding, *errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="height and width of the frames (512)")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print("| model | frames | coded in | encode, MiB | s | decode, MiB | s | latents | pixels |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for row in rows(name, args.size, args.tiles, torch.device(args.device)):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

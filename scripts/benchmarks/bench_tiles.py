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
from collections.abc import Callable

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


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def difference(tiled: Tensor, whole: Tensor) -> str:
    return f"{((tiled - whole).abs().max() / whole.abs().max()).item():.0e}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="height and width of the frames (512)")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print("| model | frames | coded in | encode, MiB | s | decode, MiB | s | latents | pixels |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        arguments, frames, overlap = MODELS[name]
        torch.manual_seed(0)
        model = vae3d.build(*arguments).to(device)
        video = torch.rand(1, 3, frames, args.size, args.size, device=device) * 2 - 1
        z, pixels = None, None
        for tile in (None, *args.tiles):
            model.set_tiles(tile, overlap if tile else None)
            cells = [name, str(frames), str(model.tiling or "whole frames")]
            outputs = []
            for run in (lambda: model.encode(video).mode(), lambda: model.decode(z, frames)):
                outputs.append(run())
                z = outputs[0] if z is None else z
                gc.collect()
                _, memory = timed(run, device)
                cells += [f"{1024 * memory:.0f}", f"{seconds(run, device):.2f}"]
            if pixels is None:
                pixels = outputs[1]
            cells += [difference(outputs[0], z), difference(outputs[1], pixels)] if tile else ["", ""]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

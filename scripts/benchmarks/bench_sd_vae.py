"""Measure speed and peak memory of training steps of the SD VAE with its GAN, eager and compiled (trainer.compile).

    python scripts/benchmarks/bench_sd_vae.py --device cuda
    python scripts/benchmarks/bench_sd_vae.py --device cuda data.height=512 data.width=512 data.batch_size=32
    python scripts/benchmarks/bench_sd_vae.py --device cpu --steps 3 model.channels=[32,32,64,64] data.height=64 \\
        data.width=64

Further arguments are settings of train.py, added to RECIPE in count_sd_vae_memory.py: batch 8 in 8 micro-batches of one
256-pixel image, with every loss and the discriminator on. Images and weights, LPIPS's too, are random, which does not
change the cost. Times are medians of synchronised clocks after two warm-up steps, which compile and allocate; their
time is printed too. Memory is torch's peak (GPU only), without the CUDA context.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from count_sd_vae_memory import composed, micro_batch
from torch import nn

from vae3d.argparse_types import positive_int
from vae3d.commands.step_cost import TrainingStep
from vae3d.config.schema import TrainConfig
from vae3d.models.compiled import compile_blocks
from vae3d.precision import as_device
from vae3d.schedules import ALL_ON
from vae3d.training.memory import GIB


def give_weights(network: nn.Module, device: torch.device) -> None:
    """Replace parameters that are loaded from a file by random ones that keep the scale of activations."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            scale = (2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.0
            setattr(module, name, nn.Parameter(torch.randn(p.shape) * scale, requires_grad=False))
    network.to(device)


def measure(config: TrainConfig, device: torch.device, steps: int) -> tuple[float, float, float]:
    """Seconds of a step, seconds of the two warm-up steps, peak GiB."""
    torch.manual_seed(0)
    step = TrainingStep(config, device)
    for network in step.loss_networks:
        give_weights(network, device)
    if config.trainer.compile:
        compile_blocks(step.model)
    step.prepare()
    batch = step.noise(micro_batch(config))

    def seconds() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(config.trainer.accumulate):
            step.passes(batch)
        step.adversary.sync_remaining(ALL_ON, config.trainer.accumulate)
        step.update()
        _wait(device)
        return time.perf_counter() - start

    first = seconds() + seconds()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")
    return statistics.median(times), first, peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=positive_int, default=20, help="timed steps (20)")
    parser.add_argument("settings", nargs="*", help="settings of train.py, such as data.height=512")
    args = parser.parse_intermixed_args(argv)
    device = as_device(args.device)
    print(f"{'':10}{'ms a step':>12}{'images/s':>12}{'peak GiB':>14}{'first two steps':>18}")
    for mode, setting in (("eager", "trainer.compile=false"), ("compiled", "trainer.compile=true")):
        config = composed([*args.settings, setting])
        seconds, first, peak = measure(config, device, args.steps)
        images = config.data.batch_size / seconds
        print(f"{mode:10}{1000 * seconds:12.1f}{images:12.1f}{peak:14.2f}{first:16.1f} s", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

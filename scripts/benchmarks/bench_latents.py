"""Measure speed and peak memory of latent diffusion, and how far a device's samples are from the CPU's.

    python scripts/benchmarks/bench_latents.py --device cuda
    python scripts/benchmarks/bench_latents.py --device cuda --denoiser transformer --latent 16 9 60 104 --batch 4
    python scripts/benchmarks/bench_latents.py --device cpu --denoiser unet --latent 4 1 16 16 --batch 4 --steps 3 \\
        width=32

Without --denoiser it measures the UNet on image latents and the transformer on clip latents. Further arguments are
settings of denoiser.*. Each row is a training step of rectified flow with AdamW and a sampling step with guidance, in
fp32 or bf16. Weights and latents are random, which does not change the cost. Times are medians of synchronised clocks
after two warm-up steps. Memory is torch's peak (GPU only). The last column is the root mean square difference between
the device's samples (10 steps, same seed and weights) and those of the CPU in fp32, in latent deviations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import yaml
from torch import nn

from vae3d.argparse_types import positive_int
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.build import build_network, build_process
from vae3d.diffusion.processes import training_losses
from vae3d.diffusion.sampling import sample_latents
from vae3d.diffusion.transformer import VideoTransformer
from vae3d.diffusion.unet import LatentUNet
from vae3d.diffusion.wan import WanTransformer
from vae3d.models.registry import target_of
from vae3d.precision import as_device

NETWORKS = {"unet": LatentUNet, "transformer": VideoTransformer, "wan": WanTransformer}
CASES = {"unet": ((4, 1, 32, 32), 64), "transformer": ((16, 5, 32, 32), 16)}  # latents, batch
CLASSES, COMPARED, GIB = 10, 2, 2**30
PROCESS = build_process({"_target_": "vae3d.diffusion.flow.RectifiedFlow"})


def network_of(kind: str, latent: Sequence[int], settings: dict[str, Any]) -> nn.Module:
    """A network with random weights; zero-initialised layers would hide all differences."""
    torch.manual_seed(0)
    network = build_network({"_target_": target_of(NETWORKS[kind]), "num_classes": CLASSES, **settings}, latent)
    for p in network.parameters():
        nn.init.normal_(p, std=0.02) if not p.any() else None
    return network


def samples(network: nn.Module, latent: Sequence[int], count: int, steps: int, device: torch.device) -> torch.Tensor:
    sampling, labels = Sampling(steps, guidance=1.5), [i % CLASSES for i in range(count)]
    return sample_latents(
        network, PROCESS, latent, sampling, seed=0, indices=range(count), labels=labels, batch_size=count, device=device
    )


def timed(run: Callable[[], object], device: torch.device, times: int) -> tuple[float, float]:
    """Median seconds and peak GiB."""

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - start

    _ = once(), once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(once() for _ in range(times))
    return seconds, torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def row(kind: str, latent: Sequence[int], batch: int, precision: str, args: argparse.Namespace) -> str:
    device = as_device(args.device)
    settings = yaml.safe_load("\n".join(setting.replace("=", ": ", 1) for setting in args.settings)) or {}
    network = network_of(kind, latent, settings)
    reference = samples(network, latent, COMPARED, 10, torch.device("cpu"))
    network.to(device)
    z = torch.randn(batch, *latent, device=device)
    labels = torch.arange(batch, device=device) % CLASSES
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        apart = (samples(network, latent, COMPARED, 10, device).cpu() - reference).square().mean().sqrt()
        sampling, _ = timed(lambda: samples(network, latent, batch, 1, device), device, args.steps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = training_losses(network, PROCESS, z, generators, labels)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak = timed(step, device, args.steps)
    name = f"{kind} {' x '.join(map(str, latent))}, batch {batch}"
    training = f"{1000 * seconds:12.1f}{batch / seconds:12.1f}{peak:8.2f}"
    return f"{name:36}{precision:>6}{training}{1000 * sampling:14.1f}{apart:10.1e}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--denoiser", choices=("unet", "transformer", "wan"))
    parser.add_argument("--latent", type=positive_int, nargs=4, metavar=("C", "T", "H", "W"))
    parser.add_argument("--batch", type=positive_int)
    parser.add_argument("--steps", type=positive_int, default=20, help="timed steps (20)")
    parser.add_argument("settings", nargs="*", help="settings of denoiser.*, such as width=768")
    args = parser.parse_intermixed_args(argv)
    if (args.denoiser is None) != (args.latent is None):
        parser.error("--denoiser and --latent go together")
    cases = {args.denoiser: (args.latent, args.batch or 16)} if args.denoiser else CASES
    columns = f"{'training: ms':>12}{'latents/s':>12}{'GiB':>8}{'sampling: ms':>14}{'from CPU':>10}"
    print(f"{'':36}{'':6}{columns}")
    for kind, (latent, batch) in cases.items():
        for precision in ("fp32", "bf16"):
            print(row(kind, tuple(latent), args.batch or batch, precision, args), flush=True)


if __name__ == "__main__":
    main()

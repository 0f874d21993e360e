"""What a run will need, in lines for debug=dry: memory, time and disk, from what step_cost.py counts on shapes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import psutil
import torch
import torch.nn.functional as F

from vae3d import loading
from vae3d.commands.step_cost import Needs, StepCost, bytes_of, fake_tensors
from vae3d.diffusion.processes import training_losses
from vae3d.distributed import reduction_elements
from vae3d.precision import DTYPES, autocast
from vae3d.text import plural, significant
from vae3d.training.memory import GIB
from vae3d.training.runlog import duration

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import TrainConfig
    from vae3d.diffusion.data import LatentData
    from vae3d.diffusion.processes import Process

MIN_SHOWN = 2**20 // 20  # bytes
GPU_TFLOPS = 100  # per second, of which hours on a GPU are multiples


def diffusion_needs(
    config: DiffusionConfig, process: Process, data: LatentData, micro_batch: int, size: tuple[int, int, int]
) -> Needs:
    """Of the training of a diffusion model on latents of clips of `size`; the autoencoder does not train."""
    with fake_tensors():
        network = loading.instantiate(config.denoiser)
        for p in network.parameters():
            p.grad = torch.zeros_like(p)  # of the micro-batch before: counted as gradients
        with StepCost([p.grad for p in network.parameters()]) as cost:
            z = torch.randn(micro_batch, *data.codec.latent_shape(*size))
            labels = torch.zeros(micro_batch, dtype=torch.int64) if network.num_classes else None
            draws = [torch.Generator() for _ in range(micro_batch)]
            with autocast(z.device, config.trainer.precision):
                losses = training_losses(network, process, z, draws, labels)
            losses["loss"].mean().backward()
        weights = bytes_of(network.parameters())
    rates = len(config.trainer.ema.rates)
    decodes = config.cache is None or config.validation.every
    stays = {"weights": weights, "gradients": weights, "AdamW": 2 * weights}
    host = {}
    (host if config.trainer.ema.device == "cpu" else stays)["EMA"] = rates * weights
    if data.schedule.world_size > 1:
        buffer = reduction_elements([*network.parameters()])
        stays["averaging over ranks"] = buffer * DTYPES[config.trainer.reduce_dtype].itemsize
    stays["autoencoder"] = bytes_of(data.codec.model.parameters()) if decodes else 0
    return Needs(
        stays, {"forward and backward": cost.peak}, cost.flops, (3 + rates) * weights, rates * weights, host=host
    )


def clips_text(clips: int, frames: int) -> str:
    return plural(clips, "image") if frames == 1 else f"{plural(clips, 'clip')} of {frames} frames"


def estimates(
    config: TrainConfig | DiffusionConfig,
    needs: Needs,
    clips: str,
    share: float,
    ranks: int,
    batch_bytes: int,
    workers: int,
) -> list[str]:
    """Lines on memory, time and disk.

    clips: what `needs` is counted on, in words. share: of the mean step's pixels in those of such a step. batch_bytes:
    of one batch that a worker reads ahead.
    """
    trainer = config.trainer
    stays = ", ".join(f"{name} {amount(value)}" for name, value in needs.stays.items() if value > MIN_SHOWN)
    here, ahead = psutil.Process().memory_info().rss, workers * config.data.prefetch * batch_bytes
    host = [f"this process now {amount(here)}"]
    if workers:
        host.append(f"batches that {plural(workers, 'worker')} read{'s' * (workers == 1)} ahead {amount(ahead)}")
    host += [f"{name} {amount(value)}" for name, value in needs.host.items() if value]
    if needs.replay:
        host.append(f"Seraena's replay {amount(needs.replay)}")
    copied = needs.state if trainer.async_mode == "async" and trainer.save_every else 0
    if copied:
        host.append(f"a copy of the checkpoint while it is written, on the first rank, {amount(copied)}")
    step_flops = needs.flops * trainer.accumulate * share
    whole, cpu = step_flops * trainer.max_steps, cpu_flops()
    on_host = here + ahead + sum(needs.host.values()) + needs.replay + copied
    return [
        f"estimates, counted on the shapes of {clips}, forward and backward, with every loss on; not measured:",
        f"  memory of the device, per rank: {amount(needs.memory)} = {stays}, on top in a step "
        f"{amount(max(needs.parts.values()))}; on a GPU add about 1 GiB for CUDA itself",
        f"  memory of the host, per rank: {amount(on_host)} = {', '.join(host)}; without a GPU the above comes on top",
        f"  time: {significant(step_flops / 1e12)} TFLOP per step and rank: for {plural(trainer.max_steps, 'step')} "
        f"{duration(whole / 1e12 / GPU_TFLOPS)} on a GPU that reaches {GPU_TFLOPS} TFLOP/s, {duration(whole / cpu)} on "
        f"this CPU, where a convolution reaches {cpu / 1e12:.2g}; reading, validation and waiting come on top",
        f"  disk: {disk(config, needs, ranks)}",
    ]


def disk(config: TrainConfig | DiffusionConfig, needs: Needs, ranks: int) -> str:
    """What the run's checkpoints and exports take at most."""
    if not config.trainer.save_every:
        return "no checkpoints, since trainer.save_every=0"
    saves, kept, each, best = disk_needs(config, needs, ranks)
    kept = min(kept + 1, saves)  # one more while it is written
    replay = f" with Seraena's replay of {plural(ranks, 'rank')}" if needs.replay else ""
    published = " + published weights" if each > needs.state + ranks * needs.replay + needs.export else ""
    return (
        f"{amount(kept * each + best)} at most: {kept} x (checkpoint {amount(needs.state + ranks * needs.replay)}"
        f"{replay} + export {amount(needs.export)}{published}){', and the best export' if best else ''}"
    )


def disk_needs(config: TrainConfig | DiffusionConfig, needs: Needs, ranks: int) -> tuple[int, int, int, int]:
    """How often the run saves, how many checkpoints stay, and bytes of each with its exports and of the best export.

    The training state under a published name is a link.
    """
    trainer = config.trainer
    saves = math.ceil(trainer.max_steps / trainer.save_every)
    kept = min(saves, max(2, trainer.keep)) if trainer.keep else saves
    publish, best = getattr(trainer, "publish", None), getattr(trainer, "best", None)
    exports = 2 if publish is not None and publish.prefix else 1
    return saves, kept, needs.state + ranks * needs.replay + exports * needs.export, needs.export if best else 0


def amount(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.95 * GIB else f"{size / 2**20:.1f} MiB"


def cpu_flops() -> float:
    """FLOPs per second of a convolution on this process's threads."""
    x, weight = torch.rand(1, 64, 64, 64), torch.rand(64, 64, 3, 3)
    one = 2 * x.numel() * 64 * 9
    with torch.inference_mode():
        F.conv2d(x, weight, padding=1)
        start, runs = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < 0.1:
            F.conv2d(x, weight, padding=1)
            runs += 1
    return runs * one / seconds

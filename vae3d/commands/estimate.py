"""What a run will need, for debug=dry: counted on fake tensors, which have shapes but no memory, and so on no GPU.

One clip of the longest goes forward and backward with every loss on, then two. That gives the peak of memory and the
floating-point operations of any number of clips. Files on disk follow from the numbers of parameters.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import flop_registry

from vae3d import loading
from vae3d.adversarial.base import NoAdversary
from vae3d.checkpoints.formats import read_checkpoint
from vae3d.commands import train
from vae3d.commands.summary import frame_counts
from vae3d.diffusion.processes import training_losses
from vae3d.models.interface import attach_decoder
from vae3d.precision import DTYPES
from vae3d.schedules import ALL_ON
from vae3d.training.freeze import set_mode, train_parts
from vae3d.training.memory import GIB, PeakMemory
from vae3d.training.runlog import duration
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import TrainConfig
    from vae3d.data.batch_schedule import BatchSchedule
    from vae3d.diffusion.data import LatentData
    from vae3d.diffusion.processes import Process

GPU_TFLOPS = 100  # per second, of which hours on a GPU are multiples
FP32 = 4  # bytes


@dataclass
class Needs:
    """stays: bytes that a rank's device holds from step to step, by item. activations: bytes on top, at most. flops: of
    a micro-batch of the longest clips, forward and backward. state, export: bytes of a checkpoint and of an export.
    note: what is not counted."""

    stays: dict[str, int]
    activations: int
    flops: float
    state: int
    export: int
    note: str = ""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """New tensors have no memory. Modules stay on the CPU, since parameters without memory cannot be moved."""
    move = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module
    try:
        with FakeTensorMode():
            yield
    finally:
        nn.Module.to = move


def give_shapes(network: nn.Module) -> None:
    """Replace parameters and buffers on the meta device, such as LPIPS's before their file is loaded, by fake ones."""
    for module in network.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            if p.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(p.shape), requires_grad=False))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def vae_needs(config: TrainConfig, micro_batch: int) -> Needs:
    """Of the training of an autoencoder on `micro_batch` clips at a time."""
    frames, data = frame_counts(config.data).all()[-1], config.data
    dtype = None if config.trainer.precision == "fp32" else DTYPES[config.trainer.precision]
    teacher = None
    if config.teacher.path is not None:
        with torch.device("meta"):
            teacher = loading.build_from_checkpoint(read_checkpoint(config.teacher.path))
    with fake_tensors():
        model = loading.instantiate(config.model)
        if config.stage.no_micro_batching and hasattr(model, "micro_frames"):
            model.micro_frames = None
        train_parts(model, config.stage.train)
        set_mode(model, config.stage.train)
        objective = train.build_objective(config.loss)
        in_loss = [t.term.network for t in objective.terms.values() if hasattr(t.term, "network")]
        for network in in_loss:
            give_shapes(network)
        adversary = loading.instantiate(config.adversary)
        adversary.load(model, torch.device("cpu"), config.run.seed, 0)
        if teacher is not None:
            give_shapes(teacher)
        distillation = train.build_distillation(config, teacher, model)
        student = model if distillation is None else distillation.wrap_student(model, frames)
        uncounted: set[str] = set()

        def passes(clips: int) -> None:
            video = torch.rand(clips, model.pixel_channels, frames, data.height, data.width) * 2 - 1
            batch = ClipBatch(video, torch.arange(clips), ["noise"] * clips)
            clip, settings = batch, {"pixels": objective.needs_pixels}
            if distillation is not None:
                clip = distillation.compute_targets(batch)
                settings |= {"latents": clip.targets.z, "encode": objective.needs_posterior}
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                out = student(video, **settings)
            out = attach_decoder(out, model)
            loss, _ = objective(clip, out, ALL_ON)
            adversarial, _ = adversary.generator_loss(clip, out, loss, ALL_ON)
            (loss + adversarial).backward()
            del loss, adversarial
            if isinstance(adversary, NoAdversary):
                return
            try:
                adversary.discriminator_loss(clip, out, ALL_ON)[0].backward()
            except DataDependentOutputException:  # Seraena draws how many pairs it replays
                uncounted.add("the discriminator's own pass is not counted: its size is drawn at random")

        critic = [] if isinstance(adversary, NoAdversary) else [*adversary.discriminator.parameters()]
        trained = [p for p in student.parameters() if p.requires_grad]
        activations, flops = count(passes, [*trained, *critic], micro_batch)
    weights, moving = size(model.parameters()), size(trained)
    ema = moving if config.trainer.ema.decay else 0
    shards = world_of(config) if config.trainer.strategy.name == "deepspeed" else 1
    anchor = weights if config.optim.proximal else 0
    stays = {
        "weights": weights,
        "gradients": moving // shards,
        "AdamW": 2 * moving // shards,
        "EMA": ema if config.trainer.ema.device == "model" else 0,
        "initial weights": anchor,
        "discriminator": 4 * size(critic),
        "loss networks": sum(size(network.parameters()) for network in in_loss),
        "teacher": 0 if teacher is None else count_of(teacher.parameters()) * DTYPES[config.teacher.precision].itemsize,
    }
    state = weights + 2 * moving + ema + anchor + 3 * size(critic)
    return Needs(stays, activations, flops, state, weights, "; ".join(uncounted))


def diffusion_needs(config: DiffusionConfig, process: Process, data: LatentData, micro_batch: int) -> Needs:
    """Of the training of a diffusion model on latents of the sampled clips' shape; the autoencoder does not train."""
    dtype = None if config.trainer.precision == "fp32" else DTYPES[config.trainer.precision]
    draws = [torch.Generator() for _ in range(2)]
    with fake_tensors():
        network = loading.instantiate(config.denoiser)

        def passes(clips: int) -> None:
            z = torch.randn(clips, *data.latent_shape)
            labels = torch.zeros(clips, dtype=torch.int64) if network.num_classes else None
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                losses = training_losses(network, process, z, draws[:clips], labels)
            losses["loss"].mean().backward()

        trained = [p for p in network.parameters() if p.requires_grad]
        activations, flops = count(passes, trained, micro_batch)
    weights, rates = size(network.parameters()), len(config.trainer.ema.rates)
    on_device = rates if config.trainer.ema.device == "model" else 0
    encoder = 0 if config.cache is not None and not config.validation.every else size(data.codec.model.parameters())
    stays = {"weights": weights, "gradients": weights, "AdamW": 2 * weights, "EMA": on_device * weights}
    return Needs(stays | {"autoencoder": encoder}, activations, flops, (3 + rates) * weights, rates * weights)


class StepCost(PeakMemory):
    """Memory, and floating-point operations: a multiply-add counts as 2. FlopCounterMode counts the same, but its
    hooks on modules keep tensors alive."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__(apart)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count(passes: Callable[[int], None], trained: Iterable[nn.Parameter], clips: int) -> tuple[int, int]:
    """Bytes at the peak, beside what was there before, and FLOPs. passes: forward and backward of a number of clips.

    More than two clips are extrapolated: large networks take seconds per clip.
    """
    trained = list(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)  # of an earlier micro-batch: counted as gradients
    costs = []
    for counted in range(1, min(clips, 2) + 1):
        with StepCost([p.grad for p in trained]) as cost:
            passes(counted)
        costs.append(cost)
    more = max(clips - 2, 0)
    return (
        costs[-1].peak + more * (costs[-1].peak - costs[0].peak),
        costs[-1].flops + more * (costs[-1].flops - costs[0].flops),
    )


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes in fp32."""
    return FP32 * count_of(tensors)


def count_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def world_of(config: Any) -> int:
    """Ranks of the run."""
    launcher = config.launcher
    return int(os.environ.get("WORLD_SIZE", launcher.nproc if launcher.name == "torchrun" else 1))


def estimates(
    config: TrainConfig | DiffusionConfig, needs: Needs, schedule: BatchSchedule, batch_bytes: int, workers: int
) -> list[str]:
    """Lines on memory, time and disk.

    batch_bytes: of one batch that a worker reads ahead.
    """
    trainer, frames = config.trainer, schedule.frames.all()[-1]
    clips = f"{schedule.micro_batch} clips of {frames} frames" if frames > 1 else f"{schedule.micro_batch} images"
    stays = ", ".join(f"{name} {amount(value)}" for name, value in needs.stays.items() if value)
    device = amount(sum(needs.stays.values()) + needs.activations)
    here, ahead = psutil.Process().memory_info().rss, workers * config.data.prefetch * batch_bytes
    steps = range(min(trainer.max_steps, 200))
    share = sum(map(schedule.frames_at, steps)) / len(steps) / frames
    step_flops = needs.flops * trainer.accumulate * share
    whole, cpu = step_flops * trainer.max_steps, cpu_flops()
    return [
        f"estimates, counted on the shapes of {clips}, forward and backward, with every loss on; not measured:",
        f"  memory of the device, per rank: {device} = {stays}, activations {amount(needs.activations)}; CUDA itself "
        "takes about 1 GiB more",
        f"  memory of the host, per rank: {amount(here + ahead)} = this process now {amount(here)}, batches that "
        f"{workers} workers read ahead {amount(ahead)}; without a GPU the above comes on top",
        f"  time: {step_flops / 1e12:.3g} TFLOP per step and rank: all {trainer.max_steps} steps take "
        f"{duration(whole / 1e12 / GPU_TFLOPS)} on a GPU that reaches {GPU_TFLOPS} TFLOP/s, {duration(whole / cpu)} on "
        f"this CPU, where a convolution reaches {cpu / 1e12:.2g}; reading, validation and waiting come on top",
        f"  disk: {disk(config, needs)}",
        *([f"  {needs.note}"] if needs.note else []),
    ]


def disk(config: TrainConfig | DiffusionConfig, needs: Needs) -> str:
    """What the run's checkpoints and exports take at most."""
    trainer = config.trainer
    if not trainer.save_every:
        return "no checkpoints, since trainer.save_every=0"
    saves = math.ceil(trainer.max_steps / trainer.save_every)
    kept = min(max(trainer.keep, 2) + 1, saves) if trainer.keep else saves  # one more while it is written
    best = getattr(trainer, "best", None) is not None
    total = kept * (needs.state + needs.export) + best * needs.export
    return (
        f"{amount(total)} at most: {kept} x (checkpoint {amount(needs.state)} + export {amount(needs.export)})"
        f"{', and the best export' if best else ''}"
    )


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

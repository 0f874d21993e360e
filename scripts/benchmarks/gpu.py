"""Check and measure on one GPU what only a GPU can show, in under five minutes: OUT.json, and OUT.md for docs/speed.md.

    python scripts/benchmarks/gpu.py --out gpu
    python scripts/benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu # try it on a CPU: the same code, tiny
    python scripts/benchmarks/gpu.py --parts parity decode --budget 600 --out gpu

Nothing is read from the network: weights are random, clips are made here. Parts run in the order of their value, each
in its own share of --budget (seconds in all); a part that ends early leaves its time to the next ones, and cases that
do not fit are listed as left out. A case that fails does not stop the others; the JSON, written after every case, holds
its error, and the exit code is then 1.

parity    every model on the device and on the CPU: outputs and gradients, fp32 and bf16
streams   chunks against whole clips; compiled; as CUDA graphs
copies    micro-batches and results that are copied beside the computation, gradients summed in bf16
runs      training runs in fp32 and bf16, a resume, host-device synchronisations of a step
decode    frames per second and memory of decoding: eager, CUDA graphs, compiled
train     the same of training steps: eager and compiled (blocks)
reading   clips per second of PyAV, decord, torchcodec and torchcodec on the GPU (NVDEC)

--tiny shrinks everything to what a CPU does in minutes. Compiled code is then traced, but run as it is.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bench_sd_vae import give_weights  # noqa: E402
from count_sd_vae_memory import composed, micro_batch  # noqa: E402

import vae3d  # noqa: E402
from tests import tiny  # noqa: E402
from vae3d import distributed  # noqa: E402
from vae3d.argparse_types import positive_int  # noqa: E402
from vae3d.commands.step_cost import TrainingStep  # noqa: E402
from vae3d.commands.train import build_trainer  # noqa: E402
from vae3d.data.batches.clips import ClipSettings, read_clip  # noqa: E402
from vae3d.data.decoding.readers import check_reader, open_media  # noqa: E402
from vae3d.errors import UserError  # noqa: E402
from vae3d.io import write_json  # noqa: E402
from vae3d.models import compiled  # noqa: E402
from vae3d.models.cuda_graphs import graph_steps, rerun  # noqa: E402
from vae3d.models.taehv import TAEHV  # noqa: E402
from vae3d.models.wan import WanVAE  # noqa: E402
from vae3d.precision import as_device, autocast, no_tf32, slow_conv3d  # noqa: E402
from vae3d.schedules import ALL_ON  # noqa: E402
from vae3d.transfer import InputCopies, on_host  # noqa: E402

Row = dict[str, Any]
HIDDEN = ("frames_per_second", "memory_gib", "run_seconds", "seconds", "frames")  # of the table's last column
Case = tuple[str, Callable[[], Row]]
SIZES = {"256": (256, 256), "480p": (480, 832), "720p": (720, 1280)}
# The most that results may differ, relative to the norm. fp32: sums in another order, without TF32.
LIMITS = {("fp32", "output"): 1e-4, ("fp32", "gradient"): 1e-3, ("bf16", "output"): 0.2, ("bf16", "gradient"): 0.5}
CURVES = 0.1  # the most that the last losses of an fp32 and a bf16 run may differ, relatively


class OutOfTime(Exception):
    """A case did not end within its part's budget."""


@dataclass
class Bench:
    """Where and what to measure."""

    device: torch.device
    tiny: bool
    folder: Path  # for files that the cases make

    @property
    def steps(self) -> int:
        """Of a training run."""
        return 8 if self.tiny else 20

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def cost(self, run: Callable[[], object], least: float = 1.0) -> Row:
        """Seconds of the median run, and the peak GiB of torch's memory meanwhile, with weights; None on a CPU.

        After a warm-up, of at least three runs and of about `least` seconds of them; of fewer if they are long.
        """
        run()
        gpu, times = self.device.type == "cuda", []
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        while sum(times) < 4 * least and (len(times) < 3 or (sum(times) < least and not self.tiny)):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
        return {"run_seconds": statistics.median(times), "memory_gib": memory}


# ---- parity


def norm_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def passes(model: nn.Module, video: Tensor, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction of a clip, and the gradients of its error."""
    model.zero_grad(set_to_none=True)
    with autocast(video.device, precision):
        out = model(video, sample=False).video
    (out.float() - video).square().mean().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(bench: Bench, build: Callable[[], nn.Module], frames: int, side: int) -> Row:
    """Errors on the device against the CPU in fp32. Raises AssertionError beyond LIMITS."""
    torch.manual_seed(0)
    model = build().eval()
    video = torch.rand(1, model.pixel_channels, frames, side, side) * 2 - 1
    expected, expected_gradients = passes(model, video, "fp32")
    expected_gradients = {name: g.clone() for name, g in expected_gradients.items()}
    model.to(bench.device)
    row: Row = {}
    with no_tf32():
        for precision in ("fp32", "bf16"):
            out, gradients = passes(model, video.to(bench.device), precision)
            row[f"{precision}_output"] = norm_error(out, expected)
            whole = [
                torch.cat([g.flatten().cpu() for _, g in sorted(x.items())]) for x in (gradients, expected_gradients)
            ]
            row[f"{precision}_gradient"] = norm_error(*whole)
    for (precision, what), limit in LIMITS.items():
        error = row[f"{precision}_{what}"]
        assert error <= limit, f"{what} in {precision} differs by {error:.2g} of its norm, more than {limit:g}: {row}"
    return row


def parity(bench: Bench) -> list[Case]:
    cases: list[Case] = [
        (name, partial(compare, bench, partial(tiny.model, name), frames=5, side=32)) for name in tiny.MODEL
    ]
    if not bench.tiny:  # published widths
        full = {"taehv": 9, "sd_vae": 1, "wan": 5, "wan22": 5}
        cases += [
            (f"{name}, full", partial(compare, bench, partial(vae3d.build, name), n, 64)) for name, n in full.items()
        ]
    return cases


# ---- streams


@torch.inference_mode()
def stream_clip(model: nn.Module, video: Tensor) -> Tensor:
    stream = model.stream(*video.shape[-2:])
    start, parts = 0, []
    for length in stream.chunks(video.shape[2]):
        parts.append(stream(video[:, :, start : start + length + stream.lookahead]).video)
        start += length
    return torch.cat(parts, 2)


def set_mode(bench: Bench, model: nn.Module, mode: str) -> None:
    """eager, graphs, compiled or compiled + graphs."""
    if "compiled" in mode:
        compiled.compile_steps(model)
    if "graphs" in mode:
        graph_steps(model, rerun if bench.device.type == "cpu" else None)


def compare_streams(bench: Bench, name: str, mode: str) -> Row:
    torch._dynamo.reset()
    model = tiny.model(name).to(bench.device)
    side = 4 * model.spec.space_stride
    videos = [torch.rand(1, 3, frames, side, side, device=bench.device) * 2 - 1 for frames in (21, 14)]
    worst = 0.0
    with no_tf32(), torch.inference_mode():
        whole = [model(video, sample=False).video for video in videos]
        model.chunk_latents = 2
        set_mode(bench, model, mode)
        for video, expected in zip(videos, whole, strict=True):
            worst = max(worst, norm_error(stream_clip(model, video), expected))
    assert worst <= LIMITS["fp32", "output"], f"a stream differs from the whole clip by {worst:.2g} of its norm"
    return {"fp32_output": worst}


def streams(bench: Bench) -> list[Case]:
    modes = ("eager", "graphs", "compiled", "compiled + graphs")
    return [(f"{n}, {mode}", partial(compare_streams, bench, n, mode)) for mode in modes for n in ("wan", "taehv")]


# ---- copies beside the computation


def work(x: Tensor, rounds: int) -> Tensor:
    """Something that takes the device a while, and gives the same bits every time."""
    x = x.float() / 255
    for _ in range(rounds):
        x = torch.sin(x) + 0.5 * x.square()
    return x


def compare_times(bench: Bench, plain: Callable[[], list[Tensor]], beside: Callable[[], list[Tensor]]) -> Row:
    """Seconds of both. Raises AssertionError if their results differ."""
    for number, (found, expected) in enumerate(zip(beside(), plain(), strict=True)):
        assert torch.equal(found, expected), f"result {number} differs: copied too late, or its memory was used again"
    seconds = {name: bench.cost(run, 0.3)["run_seconds"] for name, run in (("plain", plain), ("beside", beside))}
    return {f"{name}_seconds": value for name, value in seconds.items()}


def copied_inputs(bench: Bench) -> Row:
    side, rounds = (32, 2) if bench.tiny else (512, 40)
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randint(256, (2, 3, 9, side, side), dtype=torch.uint8, generator=generator)] for _ in range(12)]
    if bench.device.type == "cuda":
        batches = [[values.pin_memory()] for (values,) in batches]

    def copy(batch: list[Tensor]) -> list[Tensor]:
        return [batch[0].to(bench.device, non_blocking=True)]

    def plain() -> list[Tensor]:
        return [work(values.to(bench.device), rounds).sum((0, 2, 3, 4)).cpu() for (values,) in batches]

    def beside() -> list[Tensor]:
        inputs, sums = InputCopies(bench.device, copy), []
        for (values,) in inputs.each(batches):
            sums.append(work(values, rounds).sum((0, 2, 3, 4)))
            del values
        return [value.cpu() for value in sums]

    return compare_times(bench, plain, beside)


def copied_results(bench: Bench) -> Row:
    """Chunks of frames, each of which the host then works on, as a writer does."""
    side, rounds, chunks = (32, 2, 4) if bench.tiny else (512, 60, 8)

    def decoded() -> Iterator[Tensor]:
        for chunk in range(chunks):
            x = torch.full((8, side, side, 3), float(chunk), device=bench.device)
            yield work(x + torch.arange(side, device=bench.device)[:, None], rounds).mul(255).to(torch.uint8)

    def written(frames: Tensor) -> Tensor:
        compressed = zlib.compress(frames[:1].numpy().tobytes(), 1)
        return torch.tensor([len(compressed), *frames.sum((1, 2, 3)).tolist()])

    return compare_times(
        bench,
        lambda: [written(frames.cpu()) for frames in decoded()],
        lambda: [written(frames) for frames in on_host(decoded(), bench.device)],
    )


def copied_reconstruction(bench: Bench) -> Row:
    """vae3d.reconstruct, against the chunks of its stream one after another."""
    model = tiny.model("wan").to(bench.device)
    model.chunk_latents = 2
    video = torch.rand(1, 3, 41, 64, 64) * 2 - 1
    expected = stream_clip(model, video.to(bench.device)).clamp(-1, 1)
    error = norm_error(vae3d.reconstruct(model, video), expected)
    assert error <= LIMITS["fp32", "output"], f"a reconstruction differs from its stream by {error:.2g} of its norm"
    return {"fp32_output": error}


def summed_gradients(bench: Bench) -> Row:
    """all_reduce_mean of one rank, by NCCL on a GPU: in fp32 exact, in bf16 rounded once. Also the timeout is set."""
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with patch.object(distributed, "is_distributed", return_value=True):
            given = [torch.randn(n, device=bench.device) for n in (1000, 30, 7)]
            for dtype in (torch.float32, torch.bfloat16):
                buffer = distributed.reduction_buffer(given, dtype)
                found = [tensor.clone() for tensor in given]
                distributed.all_reduce_mean(found, buffer, dtype)
                for tensor, gradient in zip(found, given, strict=True):
                    assert torch.equal(tensor, gradient.to(dtype).float()), f"gradients summed in {dtype} differ"
            distributed.shorten_timeout(timedelta(minutes=5))
    finally:
        dist.destroy_process_group()
    return {"backend": backend}


def copies(bench: Bench) -> list[Case]:
    return [
        ("micro-batches", partial(copied_inputs, bench)),
        ("results", partial(copied_results, bench)),
        ("reconstruct", partial(copied_reconstruction, bench)),
        ("summed gradients", partial(summed_gradients, bench)),
    ]


# ---- training runs


class CountReads(TorchFunctionMode):
    """Counts where values of tensors are read, which on a GPU waits for it. For CPUs."""

    READS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__)
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


@contextmanager
def count_waits(bench: Bench) -> Iterator[Callable[[], int]]:
    """Counts how often the host waits for the GPU, by torch's own sync debug mode; on a CPU by CountReads."""
    if bench.device.type == "cpu":
        with CountReads() as mode:
            yield lambda: mode.count
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def clips(bench: Bench) -> Path:
    """A table of small videos, made once."""
    table = bench.folder / "clips.csv"
    if not table.exists():
        names = [f"{i}.mp4" for i in range(4)]
        for i, name in enumerate(names):
            tiny.write_video(bench.folder / name, tiny.frames(12, seed=i))
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["path"], *([name] for name in names)])
    return table


def train_run(bench: Bench, folder: Path, model: str, *settings: str, count: bool = False) -> Row:
    """Losses by step of a tiny run; with `count`, also the waits of each of its last steps."""
    frames = [f"data.frames.{bound}={5 if model == 'wan' else 1}" for bound in ("min", "max")]
    size = ["data.height=32", "data.width=32", *frames]
    losses = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "loss.reduction=mean"]
    recipe = [f"model={model}", *losses, *tiny.MODEL[model], *tiny.TRAINING, *size, f"data.source.path={clips(bench)}"]
    steps = [f"trainer.max_steps={bench.steps}", f"trainer.save_every={bench.steps // 2}", "run.name=gpu"]
    trainer = build_trainer(composed([*steps, *settings], recipe), folder)
    waits: list[int] = []
    if count:
        step = trainer.train_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            with count_waits(bench) as waited:
                result = step(*args, **kwargs)
            waits.append(waited())
            return result

        trainer.train_step = counted
    trainer.fit()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"losses": {line["step"]: line["loss"] for line in lines if "loss" in line}, "waits": waits[-3:]}


def run_twice(bench: Bench, model: str) -> Row:
    """The curves of fp32 and bf16."""
    runs = {
        p: train_run(bench, bench.folder / f"{model}-{p}", model, f"trainer.precision={p}") for p in ("fp32", "bf16")
    }
    first, last = ({p: run["losses"][step] for p, run in runs.items()} for step in (1, bench.steps))
    assert all(math.isfinite(loss) for run in runs.values() for loss in run["losses"].values()), runs
    assert last["fp32"] < first["fp32"], f"the loss did not fall: {first['fp32']} to {last['fp32']}"
    difference = abs(last["bf16"] / last["fp32"] - 1)
    assert difference <= CURVES, f"the last losses of fp32 and bf16 differ by {difference:.1%}: {last}"
    return {"steps": bench.steps, "fp32_loss": last["fp32"], "bf16_loss": last["bf16"], "difference": difference}


def resumed(bench: Bench, model: str) -> Row:
    """A run from the checkpoint in its middle, against one without a break: bit for bit on a CPU."""
    whole, broken = bench.folder / f"{model}-whole", bench.folder / f"{model}-broken"
    losses = train_run(bench, whole, model)["losses"]
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / f"step-{bench.steps:07d}")
    found = train_run(bench, broken, model)["losses"]
    start = json.loads((broken / "launches.jsonl").read_text().splitlines()[-1])["step"]
    assert start == bench.steps // 2, f"resumed at step {start}"
    assert found.keys() == losses.keys(), f"steps {sorted(found)} instead of {sorted(losses)}"
    worst = max(abs(found[step] / losses[step] - 1) for step in losses)
    limit = 0.0 if bench.device.type == "cpu" else 1e-3  # cuDNN's backward may sum in another order each time
    assert worst <= limit, f"losses after the resume differ by {worst:.2g}"
    return {"steps": bench.steps, "difference": worst}


def count_run(bench: Bench, name: str, model: str, *settings: str) -> Row:
    run = train_run(bench, bench.folder / f"waits-{name}", model, *settings, "trainer.max_steps=6", count=True)
    return {"waits_per_step": max(run["waits"])}


def runs(bench: Bench) -> list[Case]:
    return [
        ("wan, fp32 and bf16", partial(run_twice, bench, "wan")),
        ("wan, resumed", partial(resumed, bench, "wan")),
        ("waits, wan", partial(count_run, bench, "plain", "wan")),
        ("waits, spatial with GAN", partial(count_run, bench, "gan", "spatial", *tiny.GAN)),
    ]


# ---- speed


def decode_speed(bench: Bench, name: str, size: tuple[int, int], latents: int, mode: str) -> Row:
    """Of the steady chunk of a stream, as infer.py precision=bf16 decodes it; of a batch of frames without a cache."""
    torch._dynamo.reset()
    with bench.device:  # random weights of large models are made faster there
        model = (tiny.model(name) if bench.tiny else vae3d.build(name)).to(bench.device)
    channels, _, height, width = model.latent_shape(1, *size)
    z = torch.randn(1, channels, latents, height, width, device=bench.device)
    state: dict[str, Any] = {"cache": None}
    start = time.perf_counter()
    with torch.inference_mode(), autocast(bench.device, "bf16"):
        set_mode(bench, model, mode)

        def run() -> Tensor:
            if isinstance(model, WanVAE | TAEHV):
                video, state["cache"] = model.decode_chunk(z, state["cache"])
                return video
            return model.decode(z)

        frames = [run() for _ in range(2)][-1].shape[2]
        bench.synchronize()
        first = time.perf_counter() - start
        cost = bench.cost(run)
    return {"frames_per_second": frames / cost["run_seconds"], **cost, "frames": frames, "first_seconds": first}


def decode(bench: Bench) -> list[Case]:
    """The compiler takes long: the sizes at which it may matter most come first. SD has no cache, and so no graphs."""
    sizes = {"tiny": (32, 32)} if bench.tiny else SIZES
    latents = {"wan": 2, "taehv": 4, "sd_vae": 8, "wan22": 2}
    wanted = [(mode, name, size) for mode in ("eager",) for name in ("wan", "taehv", "sd_vae") for size in sizes]
    by_value = [size for size in ("720p", "256", "480p", "tiny") if size in sizes]
    wanted += [("compiled", name, size) for size in by_value for name in ("taehv", "sd_vae", "wan")]
    wanted += [("graphs", name, size) for size in sizes for name in ("wan", "taehv")]
    wanted += [("eager", "wan22", size) for size in sizes]
    wanted += [("compiled + graphs", name, size) for size in sizes for name in ("taehv", "wan")]
    return [
        (f"{name} {size}, {mode}", partial(decode_speed, bench, name, sizes[size], latents[name], mode))
        for mode, name, size in wanted
    ]


def training_speed(bench: Bench, settings: Sequence[str], compile: bool) -> Row:
    """Of whole steps on noise: networks, losses, adversary, gradient clipping, optimizer, EMA."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = composed([*settings, "data.workers=0"], ["data.source.path=none"])
    step = TrainingStep(config, bench.device)
    for network in step.loss_networks:
        give_weights(network, bench.device)
    if compile:
        compiled.compile_blocks(step.model)
    step.prepare()
    clips_at_a_time = micro_batch(config)
    batch = step.noise(clips_at_a_time)

    def run() -> None:
        for _ in range(config.trainer.accumulate):
            step.passes(batch)
        step.adversary.sync_remaining(ALL_ON, config.trainer.accumulate)
        step.update()

    start = time.perf_counter()
    run()
    bench.synchronize()
    first = time.perf_counter() - start
    cost = bench.cost(run)
    frames = step.frames * clips_at_a_time * config.trainer.accumulate
    return {"frames_per_second": frames / cost["run_seconds"], **cost, "first_seconds": first}


def train(bench: Bench) -> list[Case]:
    """Per model: settings of train.py. Images with a GAN and LPIPS; clips of 17 frames."""
    bf16, both = "trainer.precision=bf16", ("data.frames.min", "data.frames.max")
    one = ["data.batch_size=1", "trainer.accumulate=1", bf16]
    long = [f"{bound}=17" for bound in both]
    recipes = {
        "sd_vae with GAN": ["experiment=sd_vae_gan", "data.batch_size=4", "trainer.accumulate=1", bf16],
        "wan": ["model=wan", "loss=recon_kl", "stage=finetune", "stage.init_from=random", *long, *one],
        "taehv": ["model=taehv", "model.variant=taew2_1", "loss=recon_kl", "stage=finetune",
                  "stage.init_from=random", *long, *one],
    }  # fmt: skip
    sizes = SIZES
    if bench.tiny:
        sizes = {"tiny": (32, 32)}
        small = {
            "sd_vae with GAN": [*tiny.MODEL["spatial"], *tiny.GAN[1:]],
            "wan": tiny.WAN,
            "taehv": tiny.MODEL["taehv"],
        }
        recipes = {name: [*recipe, *small[name], "loss=recon_kl"] for name, recipe in recipes.items()}
        recipes |= {name: [*recipes[name], *(f"{bound}=5" for bound in both)] for name in ("wan", "taehv")}
    return [
        (
            f"{name} {size}, {'compiled' if compile else 'eager'}",
            partial(
                training_speed,
                bench,
                [*settings, f"data.height={height}", f"data.width={width}", "run.name=gpu"],
                compile,
            ),
        )
        for compile in (False, True)
        for name, settings in recipes.items()
        for size, (height, width) in sizes.items()
    ]


# ---- reading


def long_video(bench: Bench) -> tuple[Path, int, int]:
    """A video, its number of frames, and the side to which clips of it are resized."""
    path, (count, height, width, side) = (
        bench.folder / "long.mp4",
        (24, 48, 64, 32) if bench.tiny else (96, 720, 1280, 256),
    )
    if not path.exists():
        tiny.write_video(path, tiny.frames(count, height, width), g="24")
    return path, count, side


def read_speed(bench: Bench, run: Callable[[Path, int, int], object], frames: int) -> Row:
    """Clips of `frames` frames at random times."""
    path, count, side = long_video(bench)
    rng = np.random.default_rng(0)

    def clip() -> None:
        run(path, int(rng.integers(count - frames)), side)

    seconds = bench.cost(clip)["run_seconds"]
    return {"clips_per_second": 1 / seconds, "frames_per_second": frames / seconds, "frames": frames}


def by_reader(bench: Bench, reader: str, frames: int) -> Row:
    def run(path: Path, start: int, side: int) -> None:
        opened = open_media(path, reader)
        read_clip(opened, path, ClipSettings(side, side), frames, (start + 0.5) / opened.info.num_frames)
        opened.close()

    return read_speed(bench, run, frames)


def unmeasured(reason: str) -> Row:
    return {"not_measured": reason}


def reading(bench: Bench) -> list[Case]:
    frames = 9 if bench.tiny else 17
    cases: list[Case] = [("pyav", partial(by_reader, bench, "pyav", frames))]
    for name, reader in {
        "decord": "decord",
        "torchcodec": "torchcodec",
        "torchcodec, NVDEC": "torchcodec_cuda",
    }.items():
        try:
            check_reader(reader)
        except UserError as error:
            cases.append((name, partial(unmeasured, str(error))))
        else:
            cases.append((name, partial(by_reader, bench, reader, frames)))
    return cases


# ---- all of it

# (what it returns cases of, its share of the budget); in the order of their value
PARTS: dict[str, tuple[Callable[[Bench], list[Case]], float]] = {
    "parity": (parity, 0.14),
    "streams": (streams, 0.10),
    "copies": (copies, 0.02),
    "runs": (runs, 0.14),
    "decode": (decode, 0.26),
    "train": (train, 0.27),
    "reading": (reading, 0.07),
}
BUDGET = 270  # seconds, which leaves some of five minutes for the start


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def environment(device: torch.device) -> Row:
    found: Row = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vae3d": vae3d.__version__,
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
            "warning": slow_conv3d(),
        }
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None  # the figures do not depend on it


def run_case(bench: Bench, run: Callable[[], Row], seconds: float) -> Row:
    """Its row, with its time, and its error if it failed."""
    start = time.perf_counter()
    try:
        with time_limit(seconds):
            row = run()
    except OutOfTime:
        row = {"left_out": f"stopped after {seconds:.0f} s"}
    except torch.OutOfMemoryError:
        row = {"out_of_memory": True}
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    row["seconds"] = time.perf_counter() - start
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def measure(bench: Bench, parts: Sequence[str], budget: float, save: Callable[[Row], None]) -> Row:
    """All parts. save: called after every case with what there is."""
    start, share = time.perf_counter(), sum(PARTS[name][1] for name in parts)
    report: Row = {"environment": environment(bench.device), "tiny": bench.tiny, "ok": True, "parts": {}}
    used = 0.0
    for name in parts:
        cases_of, weight = PARTS[name]
        used += weight / share
        end, begun = start + used * budget, time.perf_counter()
        part: Row = {"budget": end - begun, "rows": [], "left_out": []}
        report["parts"][name] = part
        print(f"{name}", flush=True)
        try:
            cases = cases_of(bench)
        except Exception:
            cases, part["error"] = [], traceback.format_exc()
            print(part["error"], flush=True)
        for case, run in cases:
            left = end - time.perf_counter()
            if left <= 0:
                part["left_out"].append(case)
                continue
            row = {"case": case, **run_case(bench, run, left)}
            part["rows"].append(row)
            print(f"  {case}: {figures(row)}", flush=True)
            part["seconds"] = time.perf_counter() - begun
            save(report)
        part["seconds"] = time.perf_counter() - begun
        failed = "error" in part or any("error" in row for row in part["rows"])
        report["ok"] = report["ok"] and not failed
        if part["left_out"]:
            print(f"  left out for lack of time: {', '.join(part['left_out'])}", flush=True)
        save(report)
    report["seconds"] = time.perf_counter() - start
    save(report)
    return report


def figures(row: Row) -> str:
    """A row's numbers in one line."""
    shown = []
    for key, value in row.items():
        if key in ("case", "traceback") or value is None:
            continue
        shown.append(
            f"{key.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        )
    return ", ".join(shown)


def table(report: Row) -> str:
    """Markdown: the machine, and one row per case."""
    machine = ", ".join(f"{key} {value}" for key, value in report["environment"].items() if value is not None)
    lines = [f"Measured by `python scripts/benchmarks/gpu.py`: {machine}.", ""]
    lines += ["| part | case | frames/s | memory, GiB | else |", "|---|---|---|---|---|"]
    for name, part in report["parts"].items():
        for row in part["rows"]:
            speed, memory = (row.get(key) for key in ("frames_per_second", "memory_gib"))
            rest = {k: v for k, v in row.items() if k not in HIDDEN}
            cells = ["" if speed is None else f"{speed:.1f}", "" if memory is None else f"{memory:.2f}", figures(rest)]
            cells = [cell.splitlines()[0].replace("|", "/") if cell else "" for cell in cells]
            lines.append(f"| {name} | {row['case']} | {' | '.join(cells)} |")
        lines += [f"| {name} | {case} | | | left out for lack of time |" for case in part["left_out"]]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny networks and clips, to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="by default all")
    parser.add_argument("--budget", type=positive_int, default=BUDGET, help=f"seconds in all ({BUDGET})")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="writes OUT.json and OUT.md (gpu)")
    args = parser.parse_args(argv)
    device = as_device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    backend = compiled.BACKEND
    if args.tiny:
        compiled.BACKEND = "eager"

    def save(report: Row) -> None:
        write_json(args.out.with_suffix(".json"), report)
        args.out.with_suffix(".md").write_text(table(report))

    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}  # training runs take a GPU where there is one
    try:
        with patch.dict(os.environ, hidden), tempfile.TemporaryDirectory() as folder:
            report = measure(Bench(device, args.tiny, Path(folder)), args.parts, args.budget, save)
    finally:
        compiled.BACKEND = backend
    print(f"{args.out.with_suffix('.json')}, {args.out.with_suffix('.md')}: {report['seconds']:.0f} s", flush=True)
    if not report["ok"]:
        print("error: some cases failed; their errors are in the JSON", file=sys.stderr)
    return int(not report["ok"])


if __name__ == "__main__":
    sys.exit(main())

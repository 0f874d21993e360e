"""Measure vae3d against other code and against the limit of this core: networks, and what stands around them.

    OMP_NUM_THREADS=1 python scripts/benchmarks/bench_networks.py --taehv taehv.py --opensora vae_temporal.py \\
        --out docs/networks.json --page docs/speed.md      # every line, on one idle core in a quarter of an hour
    python scripts/benchmarks/bench_networks.py --only Wan2.1 SD  # lines whose names contain one of these
    python scripts/benchmarks/bench_networks.py --quick           # tiny networks, to try the script

Both sides have the same random weights and input, run in turns in this process on one thread in fp32, and must agree:
their outputs, or in training the gradients of the first layer, through which all others pass, within ALLOWED of the
largest. Times are CPU seconds, medians; ratios are medians over pairs of runs. Checkpoints are the exception: they wait
for the disk, so their seconds are those of the clock.

The limit of a network is its operations, counted on fake tensors, at the best rate of any convolution in this run,
which is measured again before every network. A side's share of the limit is that of its own operations. MiB are the
peak of all tensors that operators allocate, without weights and input. Other lines name their limit.

Peers: diffusers; taehv.py of madebyollin/taehv and opensora/models/vae/vae_temporal.py of hpcaitech/Open-Sora v1.2,
which needs einops. Download these and read them first: they are imported. Without, their lines have no peer.

Writes a JSON after every line. Earlier runs in it stay, and the table has their ratios and shares beside the new ones.
The table is printed at the end; --page also puts it into a page, between its two marks. A line that fails is an error
in the table; the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib.util
import io
import operator
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from count_sd_vae_memory import composed  # noqa: E402
from gpu import environment  # noqa: E402

import vae3d  # noqa: E402
from tests import tiny  # noqa: E402
from vae3d.argparse_types import positive_int  # noqa: E402
from vae3d.checkpoints.wan import to_diffusers  # noqa: E402
from vae3d.commands.step_cost import StepCost  # noqa: E402
from vae3d.errors import UserError  # noqa: E402
from vae3d.io import read_json, write_json  # noqa: E402
from vae3d.models.taehv import VARIANTS  # noqa: E402
from vae3d.models.temporal import TemporalVAE  # noqa: E402

MARKS = ("<!-- networks -->", "<!-- /networks -->")  # in a page, around the table
# The most that results may differ, relative to the largest value. Gradients of ReLU and of clamping jump where rounding
# changes a sign.
ALLOWED = {"encode": 1e-4, "decode": 1e-4, "train": 1e-3}
Row = dict[str, Any]
Run = Callable[[], Any]


@dataclass(eq=False)  # by identity, to be a key
class Bench:
    """What all lines share."""

    quick: bool
    pairs: int | None  # of every line; None: its own number
    taehv: Path | None
    opensora: Path | None
    folder: Path  # for files that lines make
    rates: list[float] = field(default_factory=list)  # FLOP/s of the best convolution of each measurement

    @property
    def peak(self) -> float:
        return max(self.rates)


# ---- measuring


def cpu_seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def wall_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def child_seconds(command: Sequence[str]) -> float:
    """CPU seconds of a process, from its start to its exit."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of {shlex.join(command)}:\n{done.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_turns(
    sides: dict[str, Run], pairs: int, seconds: Callable[[Any], float] = cpu_seconds
) -> dict[str, list[float]]:
    """Seconds of every run of each side. Every other round goes backwards, so that none is always first."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(pairs):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            times[name].append(seconds(sides[name]))
    return times


def compared(times: dict[str, list[float]]) -> Row:
    """Medians of ours, peer and limit, as far as they are there, and their ratios."""
    ours, row = times["ours"], {"seconds": statistics.median(times["ours"]), "pairs": len(times["ours"])}
    if "peer" in times:
        ratios = [p / o for p, o in zip(times["peer"], ours, strict=True)]
        row |= {"peer_seconds": statistics.median(times["peer"]), "ratio": statistics.median(ratios), "ratios": ratios}
    if "limit" in times:
        limit = statistics.median(times["limit"])
        row |= {"limit_seconds": limit, "share": limit / row["seconds"]}
        row |= {"peer_share": limit / row["peer_seconds"]} if "peer" in times else {}
    return row


# channels, size of the frames, frames (0: images), of convolutions of 3 x 3 and 3 x 3 x 3. Large frames, and no padding
# in time: kernels skip taps on padding, which are counted as operations.
CONVOLUTIONS = ((128, 128, 0), (256, 64, 0), (64, 128, 0), (192, 64, 4))


@torch.no_grad()
def convolution_rate(bench: Bench, shapes: Sequence[tuple[int, int, int]] = CONVOLUTIONS) -> None:
    """Add the best FLOP/s of these convolutions, channels-last, of three runs each."""
    best = 0.0
    for channels, size, frames in shapes:
        size = size // 4 if bench.quick else size
        kind, padding = (nn.Conv3d, (0, 1, 1)) if frames else (nn.Conv2d, 1)
        layout = torch.channels_last_3d if frames else torch.channels_last
        conv = kind(channels, channels, 3, padding=padding).to(memory_format=layout)
        x = torch.randn(1, channels, *([frames] if frames else []), size, size).to(memory_format=layout)
        with StepCost([]) as cost:
            conv(x)
        best = max(best, cost.flops / min(cpu_seconds(lambda conv=conv, x=x: conv(x)) for _ in range(3)))
    bench.rates.append(best)


# ---- networks


@dataclass(frozen=True)
class Coder:
    """A side: how its network encodes pixels to the mean of the latents, and decodes latents. first: a weight of the
    first layer."""

    network: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    first: nn.Parameter


@dataclass(frozen=True)
class Networks:
    """latents: (frames, size) -> shape of the latents of a clip, without batch."""

    ours: Coder
    peer: Coder | None
    latents: Callable[[int, int], Sequence[int]]
    channels: int = 3

    @property
    def sides(self) -> dict[str, Coder]:
        """The peer first: what the first run costs beside the work is not ours."""
        return {"peer": self.peer, "ours": self.ours} if self.peer else {"ours": self.ours}


@dataclass(frozen=True)
class Case:
    """A line. work: encode, decode, or train: both with a squared error and backward. Frames of size x size."""

    build: Callable[[Bench], Networks]
    peer: str
    work: str
    frames: int
    size: int
    pairs: int = 3


def random_weights(model: nn.Module, gain: float) -> None:
    """Weights that keep the scale of activations, also of layers that start with zeros."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name:
                p.normal_(1.0, 0.1)
            elif p.ndim > 1:
                p.normal_(0.0, gain / p[0].numel() ** 0.5)


def wan(bench: Bench, model: str, channels: int, decoder_channels: int | None = None) -> Networks:
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging

    logging.set_verbosity_error()
    if bench.quick:
        channels, decoder_channels = 8, decoder_channels and 16
    settings = {"channels": channels, "decoder_channels": decoder_channels, "gradient_checkpointing": "false"}
    ours = vae3d.build(model, *(f"model.{key}={value}" for key, value in settings.items() if value is not None))
    random_weights(ours, 0.6)
    pixels = 3 * ours.patch**2
    peer = AutoencoderKLWan(
        base_dim=channels,
        decoder_base_dim=decoder_channels,
        z_dim=ours.spec.channels,
        is_residual=model == "wan22",
        in_channels=pixels,
        out_channels=pixels,
        patch_size=ours.patch if ours.patch > 1 else None,
    ).eval()
    peer.load_state_dict(to_diffusers(ours.state_dict()))
    return Networks(
        Coder(ours, lambda x: ours.encode(x).mean, lambda z: ours.decode(z).clamp(-1, 1), ours.encoder.conv1.weight),
        Coder(
            peer,
            lambda x: peer.encode(x).latent_dist.mean,
            lambda z: peer.decode(z).sample,  # clamps
            peer.encoder.conv_in.weight,
        ),
        lambda frames, size: ours.latent_shape(frames, size, size),
    )


def sd_vae(bench: Bench, channels_last: bool = False) -> Networks:
    """channels_last: of both; of ours without gradients, as `vae3d encode` runs it."""
    from diffusers import AutoencoderKL

    widths, groups = ([8, 8, 8, 8], 4) if bench.quick else ([128, 256, 512, 512], 32)
    changes = {"channels": str(widths).replace(" ", ""), "groups": groups, "gradient_checkpointing": "false"}
    ours = vae3d.build("sd_vae", *(f"model.{key}={value}" for key, value in changes.items()))
    peer = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=groups,
    ).eval()
    ours.module.load_state_dict(peer.state_dict())
    if channels_last:
        ours.requires_grad_(False)
        peer = peer.to(memory_format=torch.channels_last)
    return Networks(
        Coder(ours, lambda x: ours.encode(x).mean, ours.decode, ours.module.encoder.conv_in.weight),
        Coder(
            peer,
            lambda x: peer.encode(x[:, :, 0]).latent_dist.mean[:, :, None],
            lambda z: peer.decode(z[:, :, 0]).sample[:, :, None],
            peer.encoder.conv_in.weight,
        ),
        lambda frames, size: ours.latent_shape(frames, size, size),
    )


def opensora(bench: Bench) -> Networks:
    """The temporal VAE alone, on latents of the image VAE. Decodes all frames, also those that pad the clip."""
    channels, groups = (8, 4) if bench.quick else (128, 32)
    ours = TemporalVAE(channels=channels, groups=groups).eval()
    peer = None
    if bench.opensora:
        published = (
            import_opensora(bench.opensora)
            .VAE_Temporal(filters=channels, num_groups=groups, temporal_downsample=(False, True, True))
            .eval()
        )
        published.load_state_dict(ours.state_dict())
        stride = published.time_downsample_factor
        peer = Coder(
            published,
            published.encode,
            lambda z: published.decode(z, num_frames=stride * z.shape[2]),
            published.encoder.conv_in.conv.weight,
        )
    return Networks(
        Coder(ours, lambda x: ours.encode(x).mean, ours.decode, ours.encoder.conv_in.conv.weight),
        peer,
        lambda frames, size: (4, ours.latent_frames(frames), size, size),
        channels=4,
    )


def taehv(bench: Bench, variant: str, parallel: bool = True) -> Networks:
    """parallel: the whole clip at once; else latent by latent. Training is always at once."""
    kind, ours = VARIANTS[variant], vae3d.build("taehv", f"model.variant={variant}")
    random_weights(ours, 1.0)
    with torch.no_grad():  # most pixels in range, where clamping leaves a gradient
        raw, _ = ours.decode_chunk(torch.randn(1, ours.spec.channels, 2, 8, 8), None)
        ours.decoder[-1].weight.mul_(0.4 / raw.std())
    ours.chunk_latents = None if parallel else 1
    peer = None
    if bench.taehv:
        published = import_file(bench.taehv).TAEHV(
            None,
            encoder_time_downscale=kind.time_down,
            decoder_time_upscale=kind.time_up,
            patch_size=kind.patch,
            latent_channels=kind.latent_channels,
            arch_variant="super" if kind.decoder == "super" else None,
        )
        published.load_state_dict(ours.state_dict())
        options = {"parallel": parallel, "show_progress_bar": False}
        peer = Coder(  # its pixels are in [0, 1], its time is before the channels
            published,
            lambda x: published.encode_video((x / 2 + 0.5).transpose(1, 2).contiguous(), **options).transpose(1, 2),
            lambda z: 2 * published.decode_video(z.transpose(1, 2).contiguous(), **options).transpose(1, 2) - 1,
            published.encoder[0].weight,
        )
    return Networks(
        Coder(ours, lambda x: ours.encode(x).mean, lambda z: ours.decode(z).clamp(-1, 1), ours.encoder[0].weight),
        peer,
        lambda frames, size: ours.latent_shape(frames, size, size),
    )


@cache
def import_file(file: Path, name: str = "published") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def import_opensora(file: Path) -> ModuleType:
    """vae_temporal.py without the package around it: its registry, its loader, and the latents' distribution, of which
    the mean is taken."""
    package = "opensora.models.vae"
    members = {
        "opensora.registry": {"MODELS": Registry()},
        "opensora.utils.ckpt_utils": {"load_checkpoint": None},
        f"{package}.utils": {"DiagonalGaussianDistribution": lambda moments: moments.chunk(2, 1)[0]},
    }
    stubs = {name: ModuleType(name) for name in ("opensora", "opensora.utils", "opensora.models", package, *members)}
    for name, module in stubs.items():
        vars(module).update({"__path__": []} | members.get(name, {}))
    with patch.dict(sys.modules, stubs):
        return import_file(file, f"{package}.vae_temporal")


class Registry:
    """Of Open-Sora's models: leaves every class as it is."""

    def register_module(self, *_: object) -> Callable[[Any], Any]:
        return lambda registered: registered


@lru_cache(maxsize=1)  # neighbouring lines share their networks
def built(
    bench: Bench, build: Callable[[Bench], Networks]
) -> tuple[Networks, Networks, contextlib.AbstractContextManager[Any]]:
    """The networks, and again to count with, in a context: on fake tensors, since counting runs them once more."""
    torch.manual_seed(0)
    networks = build(bench)
    if bench.quick:
        return networks, networks, contextlib.nullcontext()
    with (
        patch.object(nn.Module, "to", lambda module, **_: module),
        FakeTensorMode() as mode,
    ):  # fake ones cannot be moved
        return networks, build(bench), mode


def network(bench: Bench, case: Case) -> Row:
    """Compare the results of both sides, and their times with each other and with the limit."""
    frames, size = (min(case.frames, 5), 32) if bench.quick else (case.frames, case.size)
    networks, fake, mode = built(bench, case.build)
    sides = jobs(networks, case.work, frames, size)
    results: dict[str, Tensor] = {}

    def keep(side: str) -> None:
        results[side] = sides[side]()

    convolution_rate(bench, CONVOLUTIONS[:2])
    with torch.set_grad_enabled(case.work == "train"):
        with mode:
            costs = {side: counted(run, fake.sides[side]) for side, run in jobs(fake, case.work, frames, size).items()}
        times = in_turns({side: partial(keep, side) for side in sides}, bench.pairs or case.pairs)
    row: Row = {"peer": case.peer if "peer" in sides else None, **compared(times)}
    for side, (flops, memory) in costs.items():
        prefix = "peer_" if side == "peer" else ""
        row |= {f"{prefix}flops": flops, f"{prefix}memory_mib": memory / 2**20}
    if "peer" in results:
        row["difference"] = difference(results["ours"], results["peer"], ALLOWED[case.work])
    return row


def jobs(networks: Networks, work: str, frames: int, size: int) -> dict[str, Callable[[], Tensor]]:
    """The same work by each side; returns what they must agree in."""
    video = torch.rand(1, networks.channels, frames, size, size) * 2 - 1
    z = torch.randn(1, *networks.latents(frames, size))

    def train(side: Coder) -> Tensor:
        side.network.zero_grad()
        decoded = side.decode(side.encode(video))
        (decoded - video[:, :, : decoded.shape[2]]).square().mean().backward()
        return side.first.grad.clone()

    def run(side: Coder) -> Tensor:
        if work == "train":
            return train(side)
        return side.encode(video) if work == "encode" else side.decode(z)

    return {name: partial(run, side) for name, side in networks.sides.items()}


def counted(run: Run, side: Coder) -> tuple[int, int]:
    """Floating-point operations, and peak bytes beside the weights."""
    with StepCost(side.network.parameters()) as cost:
        run()
    side.network.zero_grad()
    return cost.flops, cost.peak


def difference(ours: Tensor, peer: Tensor, allowed: float) -> float:
    """The largest, relative to the peer's largest value. Raises AssertionError above `allowed`."""
    if ours.shape != peer.shape:
        raise AssertionError(f"ours is {list(ours.shape)}, the peer's {list(peer.shape)}")
    found = float((ours - peer).abs().max() / peer.abs().max())
    if not found <= allowed:
        raise AssertionError(f"results differ by {found:.1e} of the largest, more than {allowed:g}")
    return found


# ---- around the networks


def training_loop(bench: Bench) -> Row:
    """A step of the trainer, and of a loop on Accelerate as diffusers' examples write it, less the same forward and
    backward passes, clipping and AdamW alone."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    from vae3d.commands.train import build_trainer
    from vae3d.types import ClipBatch

    recipe = toy_training(bench, "trainer.max_steps=1000000", "trainer.save_every=0", "trainer.log_every=10")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = build_trainer(composed([], recipe), bench.folder / "loop")
    batch = ClipBatch(torch.rand(2, 3, 1, 16, 16) * 2 - 1, torch.arange(2), ["a", "b"])
    copies = [deepcopy(trainer.network) for _ in range(2)]
    bare, other = ((model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)) for model in copies)
    accelerator, steps = Accelerator(), count()
    model, optimizer, schedule = accelerator.prepare(*other, torch.optim.lr_scheduler.ConstantLR(other[1]))
    ema, progress = EMAModel(model.parameters()), tqdm(disable=True)

    def loss_of(model: nn.Module) -> Tensor:
        return trainer.objective(batch, model(batch.video), 0)[0]

    def bare_step() -> None:
        model, optimizer = bare
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def accelerate_step() -> None:
        with accelerator.accumulate(model):
            loss = loss_of(model)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
            progress.update(1)
        logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0]}
        progress.set_postfix(**logs)
        accelerator.log(logs, step=next(steps))

    def our_step() -> None:
        result = trainer.train_step([batch])
        trainer.checkpointer.advance(saving=result.status.saving)
        trainer.log_validate_save(result)

    sides = {"bare": bare_step, "peer": accelerate_step, "ours": our_step}
    with contextlib.redirect_stdout(io.StringIO()):
        in_turns(sides, 3)  # warm-up
        times = in_turns(sides, 3 if bench.quick else 200)
        trainer.log.close(failed=False)
    beyond = {side: statistics.median(map(operator.sub, times[side], times["bare"])) for side in ("ours", "peer")}
    return {
        "peer": "Accelerate, as diffusers' examples",
        "seconds": beyond["ours"],
        "peer_seconds": beyond["peer"],
        "ratio": beyond["peer"] / beyond["ours"],
        "pairs": len(times["bare"]),
        "limit": f"0, beside a bare step of {1000 * statistics.median(times['bare']):.1f} ms",
    }


TOY = ("model=spatial", *tiny.MODEL["spatial"])


def toy_training(bench: Bench, *changes: str, model: Sequence[str] = TOY) -> list[str]:
    """Settings of a training on images of a video, which is made once."""
    table = bench.folder / "toy.csv"
    if not table.exists():
        tiny.write_video(bench.folder / "toy.mp4", tiny.frames(8))
        table.write_text("path\ntoy.mp4\n")
    recipe = ["stage=finetune", "stage.init_from=random", "loss=recon_kl", "data.frames.min=1", "data.frames.max=1"]
    return [*model, *recipe, *tiny.TRAINING, f"data.source.path={table}", "run.name=toy", *changes]


def latent_cache(bench: Bench, mode: str) -> Row:
    """An entry of 4 x 32 x 32 in random order: from the disk, normalised, and of a sample the noise drawn."""
    from tests.latents import caches
    from vae3d.latents.cache import LatentCache
    from vae3d.seeding import generator_of

    entries = 8 if bench.quick else 512
    folder = bench.folder / "latents"
    if not folder.exists():
        pictures, side = bench.folder / "pictures", 64
        pictures.mkdir()
        for i, picture in enumerate(tiny.frames(entries, side, side)):
            Image.fromarray(picture).save(pictures / f"{i}.png")
        with contextlib.redirect_stdout(io.StringIO()):
            caches.made(pictures, folder, height=side, width=side, shard_size=256, batch_size=8)
    dataset = LatentCache(folder, mode=mode)
    mean, std = dataset.latents_mean, dataset.latents_std
    everything = np.stack([np.stack([m.mean, m.std]) for m in map(dataset.moments, range(entries))])
    for i, moments in enumerate(everything):
        np.save(bench.folder / f"latent-{i}.npy", moments)
    np.save(bench.folder / "latents.npy", everything)
    memory = np.load(bench.folder / "latents.npy", mmap_mode="r")

    def draw(moments: np.ndarray, i: int) -> Tensor:
        entry = torch.from_numpy(moments)
        z = entry[0]
        if mode == "sample":
            z = z + entry[1] * torch.randn(z.shape, generator=generator_of(0, i, "noise"))
        return (z - mean) / std

    order = np.random.default_rng(0).permutation(entries).tolist()
    readers: dict[str, Callable[[int], Any]] = {
        "peer": lambda i: draw(np.load(bench.folder / f"latent-{i}.npy"), i),
        "ours": lambda i: dataset[i].z,
        "limit": lambda i: draw(np.array(memory[i]), i),
    }

    def every(read: Callable[[int], Any]) -> None:
        for i in order:
            read(i)

    times = in_turns({side: partial(every, read) for side, read in readers.items()}, 5)
    each = {side: [seconds / entries for seconds in column] for side, column in times.items()}
    return {"peer": "a .npy per entry", "limit": "one array in a memory map", **compared(each)}


STEP = """
import torch
model = torch.nn.Conv2d(3, 8, 3)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model(torch.rand(2, 3, 16, 16)).square().mean().backward()
optimizer.step()
"""


def start(bench: Bench) -> Row:
    """From the command to the exit after one step of a toy."""
    compileall.compile_dir(ROOT / "vae3d", quiet=1)
    recipe = toy_training(bench, "trainer.max_steps=1", "trainer.save_every=0", f"run.root={bench.folder}/toy")
    commands = {
        "peer": [sys.executable, "-c", f"import hydra, pandas, av, accelerate{STEP}"],
        "ours": [sys.executable, str(ROOT / "train.py"), *recipe],
        "limit": [sys.executable, "-c", STEP],
    }
    times = in_turns(commands, 1 if bench.quick else 2, child_seconds)
    return {"peer": "a step, torch, Hydra, pandas, PyAV, Accelerate", "limit": "a step, torch", **compared(times)}


def table_of_rows(bench: Bench, again: bool) -> Row:
    """Read, check and split a table of videos with their metadata; no file is opened. Large tables are read in several
    processes, and kept as they are prepared. again: read what was kept."""
    import pandas as pd

    from vae3d.data.batches.clips import ClipSettings
    from vae3d.data.loader import read_tables
    from vae3d.data.sources.open_source import open_source

    rows, file, caches = 1000 if bench.quick else 1_000_000, bench.folder / "videos.csv", count()
    with file.open("w") as lines:
        lines.write("path,num_frames,height,width,fps\n")
        lines.writelines(f"{name},{17 + i % 200},720,1280,24\n" for i, name in enumerate(video_names(rows)))

    def ours() -> None:
        cache = bench.folder / ("kept" if again else f"cache-{next(caches)}")
        with patch.dict(os.environ, {"VAE3D_CACHE": str(cache)}):
            tables = read_tables(open_source(file), ClipSettings(256, 256), num_val_files=8, max_broken=0.0)
        if len(tables.train) + len(tables.val) != rows:
            raise AssertionError(f"{len(tables.train)} and {len(tables.val)} of {rows} rows")

    if again:
        ours()
        return {"peer": None, "clock": "wall", **compared(in_turns({"ours": ours}, 3, wall_seconds))}
    times = in_turns({"ours": ours, "limit": lambda: pd.read_csv(file)}, 2, wall_seconds)
    return {"peer": None, "limit": "pandas.read_csv", "clock": "wall", **compared(times)}


def joined_paths(bench: Bench) -> Row:
    """The absolute paths of a table of relative ones."""
    from vae3d.data.table.rows import absolute_paths

    root, names = Path("/data/videos"), list(video_names(1000 if bench.quick else 1_000_000))
    if absolute_paths(root, names) != [str(root / name) for name in names]:
        raise AssertionError("the paths differ")
    sides = {
        "ours": lambda: absolute_paths(root, names),
        "peer": lambda: [str(root / name) for name in names],
        "limit": lambda: [f"/data/videos/{name}" for name in names],
    }
    return {"peer": "pathlib", "limit": "joined strings, unchecked", **compared(in_turns(sides, 3))}


def video_names(rows: int) -> Iterator[str]:
    return (f"videos/{i // 1000:04}/clip_{i:07}.mp4" for i in range(rows))


def checkpoint(bench: Bench, asynchronous: bool) -> Row:
    """How long training stands still for a checkpoint and an export of the SD VAE, 84 M parameters."""
    from vae3d.commands.train import build_trainer
    from vae3d.types import ClipBatch

    folder = bench.folder / ("asynchronous" if asynchronous else "at once")
    model = ("model=sd_vae", "model.gradient_checkpointing=false", *(tiny.MODEL["spatial"] if bench.quick else ()))
    changes = [f"trainer.async_mode={'async' if asynchronous else 'disabled'}", "trainer.keep=2"]
    recipe = toy_training(bench, "trainer.max_steps=1000", "trainer.save_every=1000", *changes, model=model)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = build_trainer(composed([], recipe), folder)
        trainer.train_step([ClipBatch(torch.rand(1, 3, 1, 32, 32) * 2 - 1, torch.arange(1), ["a"])])  # AdamW's moments
    steps = count(1)

    def state() -> dict[str, Any]:
        items = {"model": trainer.network, "optimizer": trainer.optimizer, "ema": trainer.ema}
        return {name: item.state_dict() for name, item in items.items()}

    def bare() -> None:
        torch.save(state(), bench.folder / "bare.pt")
        torch.save(trainer.ema.shadow, bench.folder / "export.pt")

    def copy() -> None:
        tree_map_only(Tensor, Tensor.clone, state())

    times: dict[str, list[float]] = {"peer": [], "ours": [], "limit": []}
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in range(1 if bench.quick else 2):
            times["peer"].append(wall_seconds(bare))
            times["ours"].append(wall_seconds(lambda: trainer.checkpointer.save(next(steps))))
            trainer.checkpointer.wait()
            times["limit"].append(wall_seconds(copy))
        trainer.log.close(failed=False)
    if not len(list((folder / "exports").glob("step-*"))) == len(times["ours"]):
        raise AssertionError(f"not every checkpoint was exported to {folder / 'exports'}")
    shutil.rmtree(folder)
    return {"peer": "torch.save of both", "limit": "a copy in memory", "clock": "wall", **compared(times)}


# ---- all lines

WAN = partial(wan, model="wan", channels=96)
WAN32 = partial(wan, model="wan", channels=32)
WAN22 = partial(wan, model="wan22", channels=64, decoder_channels=102)
SD_CHANNELS_LAST = partial(sd_vae, channels_last=True)
TAEW = partial(taehv, variant="taew2_1")
TAEW_SEQUENTIAL = partial(taehv, variant="taew2_1", parallel=False)
DIFFUSERS, PARALLEL, SEQUENTIAL = "diffusers", "published, parallel", "published, sequential"
CASES = {
    "Wan2.1 d96 decode 9x128^2": Case(WAN, DIFFUSERS, "decode", 9, 128, 2),
    "Wan2.1 d96 encode 9x128^2": Case(WAN, DIFFUSERS, "encode", 9, 128, 2),
    "Wan2.1 d96 train 17x64^2": Case(WAN, DIFFUSERS, "train", 17, 64, 1),
    "Wan2.1 d32 decode 17x128^2": Case(WAN32, DIFFUSERS, "decode", 17, 128),
    "Wan2.1 d32 encode 17x128^2": Case(WAN32, DIFFUSERS, "encode", 17, 128),
    "Wan2.1 d32 train 17x128^2": Case(WAN32, DIFFUSERS, "train", 17, 128, 1),
    "Wan2.1 d32 train 17x64^2": Case(WAN32, DIFFUSERS, "train", 17, 64),
    "Wan2.2 d64/102 decode 9x128^2": Case(WAN22, DIFFUSERS, "decode", 9, 128),
    "Wan2.2 d64/102 encode 9x128^2": Case(WAN22, DIFFUSERS, "encode", 9, 128),
    "Wan2.2 d64/102 train 9x128^2": Case(WAN22, DIFFUSERS, "train", 9, 128, 1),
    "SD f8c4 decode 256^2": Case(sd_vae, DIFFUSERS, "decode", 1, 256, 2),
    "SD f8c4 encode 256^2": Case(sd_vae, DIFFUSERS, "encode", 1, 256),
    "SD f8c4 train 256^2": Case(sd_vae, DIFFUSERS, "train", 1, 256, 1),
    "SD f8c4 decode 256^2, channels-last": Case(SD_CHANNELS_LAST, f"{DIFFUSERS}, channels-last", "decode", 1, 256, 1),
    "Open-Sora 1.2 temporal encode 17x32^2": Case(opensora, "published", "encode", 17, 32, 1),
    "Open-Sora 1.2 temporal decode 17x32^2": Case(opensora, "published", "decode", 17, 32, 1),
    "TAEHV w2_1 decode 17x256^2": Case(TAEW, PARALLEL, "decode", 17, 256),
    "TAEHV w2_1 encode 17x256^2": Case(TAEW, PARALLEL, "encode", 17, 256),
    "TAEHV w2_1 train 13x128^2": Case(TAEW, PARALLEL, "train", 13, 128),
    "TAEHV w2_1 decode 17x256^2, by latents": Case(TAEW_SEQUENTIAL, SEQUENTIAL, "decode", 17, 256),
    "TAEHV w2_1 encode 17x256^2, by latents": Case(TAEW_SEQUENTIAL, SEQUENTIAL, "encode", 17, 256),
    "TAEHV w2_2 decode 17x256^2": Case(partial(taehv, variant="taew2_2"), PARALLEL, "decode", 17, 256),
    "TAEHV w2_2 super decode 17x256^2": Case(partial(taehv, variant="taew2_2_super"), PARALLEL, "decode", 17, 256),
}
LINES: dict[str, Callable[[Bench], Row]] = {name: partial(network, case=case) for name, case in CASES.items()} | {
    "training loop, a step beyond network, clip, AdamW": training_loop,
    "LatentCache, a sample of 4x32x32": partial(latent_cache, mode="sample"),
    "LatentCache, a mean of 4x32x32": partial(latent_cache, mode="mean"),
    "train, from start to exit of 1 step": start,
    "table of 1e6 rows, first time": partial(table_of_rows, again=False),
    "table of 1e6 rows, again": partial(table_of_rows, again=True),
    "joining 1e6 paths to a folder": joined_paths,
    "checkpoint of 84 M parameters, training stands still": partial(checkpoint, asynchronous=False),
    "the same, async_mode=async": partial(checkpoint, asynchronous=True),
}


def measure(bench: Bench, names: Sequence[str], command: str, save: Callable[[Row], None]) -> Row:
    """The run: its environment, and a row for every line. save: called after each."""
    versions = {name: version(name) for name in ("diffusers", "accelerate", "numpy", "pandas")}
    run: Row = {**environment(torch.device("cpu")), **versions, "command": command, "rows": {}}
    began = time.process_time()
    convolution_rate(bench)
    for name in names:
        try:
            row = LINES[name](bench)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        run["rows"][name] = row
        convolution_rate(bench, CONVOLUTIONS[:2])
        run |= {"gflops": bench.peak / 1e9, "gflops_median": statistics.median(bench.rates) / 1e9}
        row["gflops_around"] = max(bench.rates[-2:]) / 1e9
        for row in run["rows"].values():
            row |= limits(row, bench.peak)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        run["cpu_seconds"] = time.process_time() - began + children.ru_utime + children.ru_stime
        print(f"{name}: {run['rows'][name].get('error') or figures(run['rows'][name])}", flush=True)
        save(run)
    return run


def limits(row: Row, peak: float) -> Row:
    """The limit of a network, and the share of each side's own."""
    if "flops" not in row or "seconds" not in row:
        return {}
    found = {"limit_seconds": row["flops"] / peak, "share": row["flops"] / peak / row["seconds"]}
    if "peer_seconds" in row:
        found["peer_share"] = row["peer_flops"] / peak / row["peer_seconds"]
    return found


def figures(row: Row) -> str:
    """What the line on the console says."""
    text = f"ours {amount(row['seconds'])}"
    if "ratio" in row:
        text += f", {row['peer']} {amount(row['peer_seconds'])}: {row['ratio']:.2f} times as fast"
    shares = [
        f"{name} {100 * row[key]:.0f} %" for name, key in (("ours", "share"), ("peer", "peer_share")) if key in row
    ]
    if shares:
        text += f"; of the limit ({amount(row['limit_seconds'])}) {', '.join(shares)}"
    return text + (f"; results differ by {row['difference']:.0e}" if "difference" in row else "")


def amount(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def table(run: Row, earlier: Sequence[Row]) -> str:
    """Markdown: the machine, and one row per line, beside the ratios and shares of earlier runs."""
    facts = {key: run[key] for key in ("date", "processor", "threads", "python", "torch", "diffusers")}
    machine = ", ".join(
        str(value) if key in ("date", "processor") else f"{key} {value}" for key, value in facts.items()
    )
    lines = [
        f"`{run['command']}`, {machine}. The best convolution reached {run['gflops']:.0f} GFLOP/s, and "
        f"{run['gflops_median']:.0f} in the median over the run.",
        "",
    ]
    columns = ["work", "peer", "peer takes", "ours takes", "times as fast", "limit", "ours, % of limit", "peer, %"]
    columns += ["difference", "MiB, ours, peer", *(f"{before['date']}: times as fast; %" for before in earlier)]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in run["rows"].items():
        if "error" in row:
            lines.append(f"| {name} | {row['error'].splitlines()[0].replace('|', '/')} |" + " |" * (len(columns) - 2))
            continue
        limit = ", ".join(filter(None, (amount(row.get("limit_seconds")), row.get("limit"))))
        memory = ", ".join(f"{row[key]:.0f}" for key in ("memory_mib", "peer_memory_mib") if key in row)
        work = f"{name}, {row['clock']} time" if "clock" in row else name
        cells = [work, row["peer"] or "-", amount(row.get("peer_seconds")), amount(row["seconds"]), cell(row, "ratio")]
        cells += [limit, cell(row, "share"), cell(row, "peer_share")]
        cells += [f"{row['difference']:.0e}" if "difference" in row else "", memory]
        for old in (before["rows"].get(name, {}) for before in earlier):
            cells.append("; ".join(filter(None, (cell(old, "ratio"), cell(old, "share")))))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: Row, key: str) -> str:
    if key not in row:
        return ""
    return f"{row[key]:.2f}" if key == "ratio" else f"{100 * row[key]:.0f}"


def around_table(page: Path) -> tuple[str, str]:
    """A page up to the first mark, and from the second one on."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise UserError(f"{page} has no place for the table: add the lines {MARKS[0]} and {MARKS[1]}")
    return before + MARKS[0], mark + after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="lines whose names contain one of these")
    parser.add_argument("--taehv", type=Path, help="the published taehv.py")
    parser.add_argument("--opensora", type=Path, help="the published vae_temporal.py")
    parser.add_argument("--pairs", type=positive_int, help="runs of each side of a network (1 to 3, by its length)")
    parser.add_argument("--quick", action="store_true", help="tiny networks and files, to try the script")
    parser.add_argument("--out", type=Path, default=Path("networks.json"), help="the JSON (networks.json)")
    parser.add_argument("--page", type=Path, help="a page with the marks, such as docs/speed.md")
    args = parser.parse_args(argv)
    names = [name for name in LINES if not args.only or any(text.lower() in name.lower() for text in args.only)]
    if not names:
        parser.error(f"--only {' '.join(args.only)} names no line; the lines are:\n  " + "\n  ".join(LINES))
    for file in filter(None, (args.taehv, args.opensora, args.page)):
        if not file.is_file():
            parser.error(f"{file} does not exist")
    if args.page:
        around_table(args.page)  # raises before the work, not after it
    earlier = read_json(args.out)["runs"] if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    words = [
        Path(word).name if "/" in word else word for word in sys.argv[1:] if argv is None
    ]  # without this machine's folders
    command = shlex.join(["python", "scripts/benchmarks/bench_networks.py", *words])
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        bench = Bench(args.quick, args.pairs or (1 if args.quick else None), args.taehv, args.opensora, Path(folder))
        run = measure(bench, names, command, lambda run: write_json(args.out, {"runs": [*earlier, run]}))
    text = table(run, earlier)
    print(text, flush=True)
    if args.page:
        args.page.write_text(f"\n{text}".join(around_table(args.page)))
    if failed := [name for name, row in run["rows"].items() if "error" in row]:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

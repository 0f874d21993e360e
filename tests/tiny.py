"""Models, videos, configurations and processes for tests."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from unittest import mock

import av
import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

import vae3d
from tests import warm
from vae3d.commands import cli
from vae3d.config.issues import raise_if_any
from vae3d.config.schema import CONF, TrainConfig
from vae3d.config.validate import training_issues

ROOT = Path(__file__).parents[1]

SPATIAL = {"channels": "[8,8]", "groups": 4, "layers": 1, "frame_batch": "null", "gradient_checkpointing": "false"}
TEMPORAL = {"channels": 8, "multipliers": "[1,1,2]", "downsample": "[true,true]", "groups": 4, "layers": 1}
MODEL = {
    "spatial": [f"model.{key}={value}" for key, value in SPATIAL.items()],
    "temporal_vae": [
        *(f"model.spatial.{key}={value}" for key, value in SPATIAL.items()),
        *(f"model.temporal.{key}={value}" for key, value in TEMPORAL.items()),
    ],
}
MODEL["opensora_v1_2"] = MODEL["temporal_vae"]
MODEL["sd_vae"] = MODEL["spatial"]
WAN = ["model.channels=8", "model.multipliers=[1,2]", "model.downsample=[true]", "model.layers=1"]
WAN += ["model.latent_channels=4", "model.latents_mean=[0,0,0,0]", "model.latents_std=[1,1,1,1]"]
MODEL["wan"] = WAN
MODEL["wan22"] = [*WAN, "model.multipliers=[1,1]", "model.decoder_channels=16"]
MODEL["opensora_v1_3"] = ["model.channels=8", "model.multipliers=[1,1]", "model.downsample=[true]", "model.layers=1"]
MODEL["opensora_v1_3"] += ["model.latent_channels=4", "model.groups=4", *WAN[-2:], "model.micro_frames=5"]
SERAENA = ["adversary=seraena", "adversary.context_channels=4", "adversary.channels=[8,8,8,8]"]
GAN = ["adversary=patchgan", "adversary.channels=8", "adversary.layers=1", "adversary.groups=4", "adversary.start=0"]
MODEL["taehv"] = ["model.variant=taew2_1", "model.channels=8", "model.decoder_channels=[16,8,8,8]"]
MODEL["taesd"] = ["model.variant=taesd"]
MODEL["temporal_taef2"] = ["model.temporal.channels=8", "model.temporal.layers=1", "model.micro_frames=5"]
KL = "block_out_channels:[8,8],norm_num_groups:2,down_block_types:[DownEncoderBlock2D,DownEncoderBlock2D]"
KL += ",up_block_types:[UpDecoderBlock2D,UpDecoderBlock2D]"
MODEL["diffusers"] = ["model.path=null", "+model.kind=AutoencoderKL", f"+model.config={{{KL}}}"]
MODEL["temporal_diffusers"] = [
    "model.spatial.path=null",
    "+model.spatial.kind=AutoencoderKL",
    f"+model.spatial.config={{{KL}}}",
    "model.temporal.in_channels=4",
    "model.temporal.channels=8",
    "model.temporal.layers=1",
    "model.micro_frames=5",
]
TRAINING = [
    "data.height=16",
    "data.width=16",
    "data.batch_size=2",
    "data.workers=0",
    "trainer.precision=fp32",
    "trainer.robust.preflight=false",
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "trainer.save_every=2",
    "validation.every=0",
    "logger=none",
    "optim.lr=1e-3",
]


def model(name: str, *overrides: str, seed: int = 0) -> torch.nn.Module:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    return vae3d.build(name, *MODEL[name], *overrides)


@contextlib.contextmanager
def unfilled_weights() -> Iterator[None]:
    """Build networks without their random first weights, which takes a second for the classifier of VGG16."""
    names = ("kaiming_uniform_", "kaiming_normal_", "normal_", "uniform_", "constant_")
    with mock.patch.multiple(torch.nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}):
        yield


def compose(*overrides: str, config: str = "train") -> DictConfig:
    """A configuration as the command line composes it. Unknown keys are kept for the check."""
    from vae3d.config.overrides import allow_unknown_keys

    named = ["run.name=test"] if config == "train" else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config, allow_unknown_keys([*named, *overrides]))


def training(name: str, table: Path, *overrides: str, meta_check: bool = False) -> TrainConfig:
    """A checked configuration for a tiny model and two short steps. meta_check: also run the model on the meta device,
    which takes as long as a run of two steps; for tests of errors that only this finds."""
    path = [f"data.source.path={table}"] if not any(o.startswith("data=") for o in overrides) else []
    cfg = compose(f"model={name}", *MODEL[name], *TRAINING, *path, *overrides)
    if meta_check:
        return cli.check_training(cfg)
    config, issues = training_issues(cfg)
    raise_if_any(issues)
    return config


def frames(count: int, height: int = 32, width: int = 40, seed: int = 0) -> np.ndarray:
    """[count, height, width, 3] uint8: a moving smooth pattern, with a grey patch whose level is the frame's index times 5."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 4, width // 8 + 4, 3), dtype=np.uint8))
    big = np.asarray(small.resize((width + 2 * count, height + count), Image.Resampling.BICUBIC))
    clip = np.stack([big[i : i + height, 2 * i : 2 * i + width] for i in range(count)])
    clip[:, :8, :8] = (np.arange(count) * 5 % 256)[:, None, None, None]
    return clip


def write_video(
    path: Path,
    clip: np.ndarray,
    *,
    fps: int = 24,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    transfer: int | None = None,
    **options: str,
) -> Path:
    """Encode with PyAV. times_ms: makes the frame rate variable. rotation, mirrored: written to the display matrix."""
    if codec == "libx264" and "crf" not in options:
        options["qp"] = "20"  # x264's rate control does not give the same file every time
    base = Fraction(1, fps) if times_ms is None else Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pixels
        stream.codec_context.time_base = base
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        for i, array in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = (i if times_ms is None else times_ms[i]), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def run(*command: str, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would; output and errors are captured together. Python starts in a warm process."""
    if command[0] == sys.executable and (command[1].endswith(".py") or command[1] == "-m"):
        codes, printed = warm.run(list(command), cwd, [environ(**environment)], timeout)
        return subprocess.CompletedProcess(command, codes[0], printed[0])
    return subprocess.run(
        command,
        cwd=cwd,
        env=environ(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The environment that torchrun gives each rank of one machine; of a process by itself for one rank."""
    if ranks == 1:
        return [environ()]
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [environ(RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in range(ranks)]


def run_ranks(*command: str, cwd: Path, timeout: float = 150, ranks: int = 2) -> tuple[list[int], list[str]]:
    """Run a script as torchrun would, in warm processes. Returns each rank's exit code and output."""
    return warm.run(list(command), cwd, rank_environments(ranks), timeout)


def two_ranks(module: str, folder: Path, timeout: float = 150) -> list[str]:
    """Run `python -m module folder` as two ranks; returns what each printed. Fails if one of them does, or hangs."""
    codes, printed = run_ranks(sys.executable, "-m", module, str(folder), cwd=ROOT, timeout=timeout)
    assert codes == [0, 0], "\n".join(printed)
    return printed


def _free_port() -> int:
    """An unused port, below the range from which the system serves the connections of other tests."""
    for port in random.SystemRandom().sample(range(12000, 32000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


def environ(**changes: str) -> dict[str, str]:
    """The environment of a test's process: one thread, for a fixed order of sums, and no variables of a distributed launch."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def script(name: str) -> list[str]:
    return [sys.executable, str(ROOT / name)]


def status(command: str, *arguments: object) -> int:
    """The exit status of a `vae3d` command that runs in this process."""
    try:
        return cli.main([command, *map(str, arguments)]) or 0
    except SystemExit as end:
        return end.code


def load_script(name: str) -> ModuleType:
    """Import scripts/benchmarks/<name>.py or scripts/demo/<name>.py, which find each other as they do when run."""
    [path] = (ROOT / "scripts").glob(f"*/{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return importlib.import_module(name)

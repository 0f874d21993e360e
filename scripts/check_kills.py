"""Kill training runs at random moments and check that resumed runs end with the same bits.

    python scripts/check_kills.py /tmp/kills --kills 30                    # vae3d train
    python scripts/check_kills.py /tmp/kills --kills 10 --diffusion        # vae3d train-diffusion
    python scripts/check_kills.py /tmp/kills --kills 10 --cached           # vae3d train teacher.cache=...

Half of the kills come after the last checkpoint is complete, while exports and published files are written. Each run
is killed once, then started again until it ends. Its checkpoints, exports, published files and metrics must equal those
of an unkilled run, bit for bit, and nothing else may be left. With --cached, the unkilled run has no cache, and each
killed one has its own, empty. For developers, on Linux; 30 kills take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vae3d.loading  # also once, before the forks
from vae3d.argparse_types import non_negative_int, positive_int
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import cli

STEPS = 8
KINDS = ("checkpoints", "exports")
COMMON = ["logger=none", "trainer.precision=fp32", f"trainer.max_steps={STEPS}", "trainer.save_every=2"]
COMMON += ["trainer.log_every=1", "trainer.keep=2", "data.workers=0", "run.root=runs", "run.name=run", "optim.lr=1e-3"]
VAE = ["model=spatial", "model.channels=[8,8]", "model.groups=4", "model.layers=1", "stage=finetune"]
VAE += ["stage.init_from=random", "loss=recon_kl", "data.height=16", "data.width=16", "data.batch_size=4"]
VAE += ["data.frames.min=1", "data.frames.max=1", "validation.frames=1", "validation.every=4", "validation.clips=2"]
VAE += ["validation.metrics=[psnr]", "trainer.best=psnr", "trainer.publish.prefix=vae", "trainer.publish.layout=native"]
VAE += ["trainer.robust.preflight=false"]
DISTILLATION = ["model=taesd", "model.variant=taesd", "stage=decoder_only", "loss=decoder_pixels", "teacher=vae"]
DISTILLATION += ["data.height=16", "data.width=16", "data.batch_size=4"]
DISTILLATION += ["data.frames.min=1", "data.frames.max=1", "data.crop=center", "data.flip=false"]
DISTILLATION += ["model.decoder_channels=[4,5,4,3]", "model.decoder_blocks=[1,1,1,1]", "model.frame_batch=null"]
DISTILLATION += ["teacher.features={decoder.3: decoder.4}", "loss.terms.features.weight=0.1"]
DISTILLATION += ["validation.frames=1", "validation.every=4", "validation.clips=2", "validation.metrics=[psnr]"]
DISTILLATION += ["trainer.best=psnr", "trainer.publish.layout=native", "trainer.robust.preflight=false"]
DIFFUSION = ["denoiser=unet", "denoiser.width=16", "denoiser.blocks=1", "denoiser.head_channels=16"]
DIFFUSION += ["data.height=32", "data.width=32", "data.frames.min=1", "data.frames.max=1"]
DIFFUSION += ["data.batch_size=4", "trainer.ema.rates=[0.9,0.99]", "labels=none"]
DIFFUSION += ["validation.every=0", "trainer.scale_samples=64"]


READERS = {
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".json": lambda path: json.loads(path.read_text()),
}


def start(command: str, arguments: list[str], folder: Path) -> int:
    """Run `vae3d command arguments` in a fork of this process, which has imported torch; returns the process id."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["vae3d", command, *arguments]
    code = 1
    try:
        code = cli.main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:  # the child must not return to the parent's loop
        if code == 1:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def run_to_end(command: str, arguments: list[str], folder: Path) -> float:
    """Run the command until it ends; returns the seconds. Raises RuntimeError if it fails."""
    begun, pid = time.monotonic(), start(command, arguments, folder)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"vae3d {command} failed; see {folder}/log.txt")
    return time.monotonic() - begun


def kill_once(command: str, arguments: list[str], folder: Path, late: bool) -> str:
    """Start a run and kill it: at a random step or, if late, after its last checkpoint. Returns its newest files."""
    pid, run, step = start(command, arguments, folder), folder / "runs/run", random.randint(1, STEPS - 1)
    while not is_reached(run, step, late) and still_runs(pid):
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.01 if late else 0.1))
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):  # the run had ended already
        pass
    newest = {kind: [path.name for path in sorted((run / kind).glob("step-*"))][-1:] for kind in KINDS}
    return " and ".join(f"{kind} up to {', '.join(names) or 'none'}" for kind, names in newest.items())


def is_reached(run: Path, step: int, late: bool) -> bool:
    if late:
        return (run / f"checkpoints/step-{STEPS:07d}").is_dir()
    return (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") >= step


def still_runs(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def plain(value: object) -> object:
    """The value with tensors as bytes, comparable with ==, and without `teacher.cache`, which the unkilled run has not.
    Files with equal values may differ, since pickle shares objects."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key != "cache"}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def contents(folder: Path) -> dict[str, object]:
    """{file name: content} of all that must be equal; of metrics.jsonl without speed and memory."""
    run, found = folder / "runs/run", {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and not name.startswith((".hydra", ".lock", "rank0.log", "launches", "metrics")):
            found[name] = plain(READERS.get(path.suffix, Path.read_bytes)(path))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    about_machine = ("per_second", "memory_gib")
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if not k.endswith(about_machine)} for line in lines]
    return found


def make_images(folder: Path, count: int = 80) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def make_teacher(folder: Path) -> Path:
    """An export of a small TAESD with random weights."""
    config = vae3d.loading.model_config(
        "taesd", "model.variant=taesd", "model.decoder_channels=[6,5,4,4]", "model.decoder_blocks=[2,1,1,1]"
    )
    torch.manual_seed(0)
    write_export(Checkpoint(config, vae3d.loading.instantiate(config).state_dict(), folder, "export"), folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder for the runs")
    parser.add_argument("--kills", type=positive_int, default=30)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--diffusion", action="store_true")
    kind.add_argument("--cached", action="store_true", help="distil from a teacher whose targets are cached")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    folder = args.folder.resolve()
    torch.set_num_threads(1)
    command, arguments = "train", [*COMMON, *VAE, "data=folder", f"data.source.path={make_images(folder / 'images')}"]
    if args.diffusion:
        vae = folder / "vae"
        run_to_end("train", arguments, vae)
        made = sorted((vae / "runs/run/exports").glob("step-*"))[-1]
        command = "train-diffusion"
        source = ["data=folder", f"data.source.path={folder / 'images'}", f"vae.path={made}"]
        scale = [str(made), str(folder / "images"), "--height=32", "--width=32", "--per_channel"]
        run_to_end("measure-scale", scale, vae)
        arguments = [*COMMON, *DIFFUSION, *source]
    cache = []
    if args.cached:
        teacher = make_teacher(folder / "teacher")
        source = ["data=folder", f"data.source.path={folder / 'images'}", f"teacher.path={teacher}"]
        arguments = [*COMMON, *DISTILLATION, *source, f"stage.init_from={{encoder: {teacher}}}"]
        cache = ["teacher.cache=cache"]  # in the folder of each run
    seconds = run_to_end(command, arguments, folder / "whole")
    expected = contents(folder / "whole")
    print(f"a run takes {seconds:.1f} s and leaves {len(expected)} files", flush=True)
    differing = 0
    for number in range(args.kills):
        killed = folder / f"killed{number:03d}"
        where = kill_once(command, [*arguments, *cache], killed, late=number % 2 == 1)
        run_to_end(command, [*arguments, *cache], killed)
        found = contents(killed)
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        differing += bool(names)
        print(f"{number:3d} killed at {where}: {'DIFFERS: ' + ', '.join(names) if names else 'equal'}", flush=True)
    print(f"{args.kills - differing} of {args.kills} equal")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())

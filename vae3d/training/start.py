"""What every command does first: its processes find each other."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState

from vae3d.checkpoints.state import ResumeError, latest_state
from vae3d.io import check_run_folder
from vae3d.precision import as_device


def check_may_start(folder: Path, resume: bool) -> None:
    """Raises ResumeError for a run that has checkpoints and is not to be resumed, FileError for a folder with links."""
    check_run_folder(folder)
    if not resume and latest_state(folder / "checkpoints") is not None:
        raise ResumeError(f"{folder} holds checkpoints and run.resume=false; give this run another run.name")


def training_ranks(precision: str) -> Accelerator:
    """The ranks of a training run. precision: fp32, bf16 or fp16."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # while one rank probes files, or draws samples
    AcceleratorState._reset_state()  # jobs of a sweep in one process may differ in precision
    accelerator = Accelerator(
        mixed_precision=precision.replace("fp32", "no"), cpu=_no_accelerator(), kwargs_handlers=[patience]
    )
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1)), "ranks did not find each other"
    return accelerator


def working_ranks(device: str | None) -> tuple[PartialState, torch.device]:
    """Ranks that share the files or samples of a command, and where this one computes: on `device`, if it is given."""
    patience = timedelta(days=7)  # they wait for the one with the longest videos
    ranks = PartialState(cpu=device == "cpu" or _no_accelerator(), timeout=patience)
    return ranks, as_device(device) if device else ranks.device


def _no_accelerator() -> bool:
    """Accelerate must be told: without a GPU it does not join the ranks that torchrun started."""
    return not torch.accelerator.is_available()

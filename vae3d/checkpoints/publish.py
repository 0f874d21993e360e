"""A run's checkpoints under the file names that other programs expect, in the run's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vae3d.checkpoints.export import write_flat
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.state import STATE, step_of


def publish(folder: Path, prefix: str, saved: Path, averaged: Checkpoint, layout: str, *, last: bool) -> None:
    """<prefix>_step<N>.pt, the training state in `saved`, and <prefix>_ema_step<N>.pt, the averaged weights.

    last: the run is at its end; the averaged weights are <prefix>_final_ema.pt as well.
    """
    state, weights = _files(folder, prefix, step_of(saved))
    _link(saved / STATE, state)
    write_flat(averaged, layout, weights)
    if last:
        _link(weights, folder / f"{prefix}_final_ema.pt")


def withdraw(folder: Path, prefix: str, steps: Iterable[int]) -> None:
    """Delete what was published of these steps, whose checkpoints are gone."""
    for step in steps:
        for file in _files(folder, prefix, step):
            file.unlink(missing_ok=True)


def _files(folder: Path, prefix: str, step: int) -> tuple[Path, Path]:
    return folder / f"{prefix}_step{step}.pt", folder / f"{prefix}_ema_step{step}.pt"


def _link(source: Path, target: Path) -> None:
    """A second name for a file, without its size on disk; a copy where the file system has no hard links."""
    unfinished = target.with_name(f".{target.name}.partial")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    unfinished.replace(target)
    unfinished.unlink(missing_ok=True)  # replacing a link to the same file leaves both

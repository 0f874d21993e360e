"""Named exports: a run's checkpoints under the file names that other programs expect, in the run's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vae3d.io import atomic_path


def published_files(folder: Path, prefix: str, step: int) -> tuple[Path, Path]:
    """<prefix>_step<N>.pt, the training state, and <prefix>_ema_step<N>.pt, the averaged weights."""
    return folder / f"{prefix}_step{step}.pt", folder / f"{prefix}_ema_step{step}.pt"


def final_file(folder: Path, prefix: str) -> Path:
    """The averaged weights of the last step."""
    return folder / f"{prefix}_final_ema.pt"


def link(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy where the file system has no hard links."""
    with atomic_path(target) as tmp:
        try:
            os.link(source, tmp)
        except OSError:
            shutil.copyfile(source, tmp)

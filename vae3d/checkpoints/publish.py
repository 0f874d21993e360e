"""A run's checkpoints under the file names that other programs expect, in the run's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vae3d.io import atomic_write, fsync_folder


def published_files(folder: Path, prefix: str, step: int) -> tuple[Path, Path]:
    """<prefix>_step<N>.pt, a checkpoint's training state, and <prefix>_ema_step<N>.pt, the averaged weights."""
    return folder / f"{prefix}_step{step}.pt", folder / f"{prefix}_ema_step{step}.pt"


def final_file(folder: Path, prefix: str) -> Path:
    """The averaged weights of the last step."""
    return folder / f"{prefix}_final_ema.pt"


def link(source: Path, target: Path) -> None:
    """A second name for a file, without its size on disk; a copy where the file system has no hard links."""
    unfinished = target.with_name(f".{target.name}.partial")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        with source.open("rb") as stream, atomic_write(target) as copy:
            shutil.copyfileobj(stream, copy)
        return
    unfinished.replace(target)
    unfinished.unlink(missing_ok=True)  # replacing a link to the same file leaves both
    fsync_folder(target.parent)

"""Training state on disk: everything that a bit-equal resume needs, written aside and renamed when complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vae3d.checkpoints.formats import CheckpointError
from vae3d.errors import UserError

META = "run.json"  # written last: a folder without it is not complete
STATE = "state.pt"
# Settings that make a run another run: a checkpoint of one does not continue the other.
IDENTITY = (
    "model",
    "stage.name",
    "stage.train",
    "adversary",
    "data.frames",
    "data.height",
    "data.width",
    "data.short_side",
    "data.stride",
    "data.fps",
    "data.panorama",
    "data.depth.mapping",
    "run.seed",
)


class ResumeError(UserError):
    """A run folder that belongs to another configuration."""


def save_state(root: Path, step: int, state: Mapping[str, Any], config: Mapping[str, Any], keep: int) -> Path:
    """Write root/step-<step>, then delete all but the newest `keep` (0 keeps all)."""
    target = root / f"step-{step:07d}"
    unfinished = root / f".{target.name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with (unfinished / STATE).open("wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())
    (unfinished / META).write_text(json.dumps({"step": step, "config": config}, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    prune(root, keep)
    return target


def prune(root: Path, keep: int) -> None:
    """Delete all step folders but the newest `keep` (0 keeps all)."""
    for old in _steps(root)[:-keep] if keep else []:
        shutil.rmtree(old)


def latest_state(root: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [folder for folder in _steps(root) if (folder / META).is_file()]
    return complete[-1] if complete else None


def load_state(folder: Path) -> dict[str, Any]:
    """Tensors on the CPU. Raises CheckpointError if the file is damaged."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{folder / STATE} cannot be read ({error}); delete {folder} to resume before it"
        ) from error


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / META).read_text())["config"]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (old, new)."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def refuse_other_run(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Differences between a checkpoint's configuration and `config`.

    Raises ResumeError if one of them (see IDENTITY) makes it another run.
    """
    differing = changes(saved_config(folder), config)
    # A setting that is off now and unknown to an older checkpoint was off there, too.
    changed = {key: (old, new) for key, (old, new) in differing.items() if old is not None or new}
    fatal = {key: pair for key, pair in changed.items() if key.startswith(IDENTITY)}
    if fatal:
        listed = "\n".join(f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in fatal.items())
        raise ResumeError(
            f"{folder} was trained under another configuration:\n{listed}\n"
            "  give this run another run.name, or undo the changes to resume"
        )
    return differing


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _steps(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d+", folder.name))

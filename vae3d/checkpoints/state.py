"""Training state on disk: everything that a bit-equal resume needs, written aside and renamed when complete."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch

from vae3d.arguments import ArgumentError, Range, check_fields
from vae3d.checkpoints.formats import CheckpointError, as_checkpoint_error
from vae3d.checkpoints.integrity import check_records
from vae3d.errors import UserError
from vae3d.io import check_plain, fsync_folder, read_json, remove, write_json

META = "run.json"  # written last: a folder without it is not complete
STATE = "state.pt"
RANK_STATE = "rank-{rank}.pt"
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
    "teacher.features",
    "run.seed",
)
# Of those, what may change as optim may: the discriminator's learning rate, often tied to optim and trainer.max_steps.
FREE = (
    *(f"adversary.{key}" for key in ("lr", "schedule", "warmup_steps", "max_steps", "min_lr", "cycles", "power")),
    *("denoiser.gradient_checkpointing", "denoiser.dropout"),
)


# What torch.load raises for damaged files, whatever its documentation says: found by changing random bytes.
DAMAGED = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, struct.error, LookupError, ValueError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, MemoryError),
)


class _RunInfo(TypedDict):
    """What is read of a run.json."""

    step: Annotated[int, Range(0, 10**12)]
    config: Mapping[str, Any]


class _State(TypedDict, total=False):
    """What every training state has; the rest is for those who resume from it."""

    step: Annotated[int, Range(0, 10**12)]
    model: Mapping[str, Any]
    config: Mapping[str, Any]


class ResumeError(UserError):
    """A run folder that belongs to another configuration."""


def step_folder(root: Path, step: int) -> Path:
    """The complete checkpoint of a step."""
    return root / f"step-{step:07d}"


def unfinished(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is written until it is complete."""
    return root / f".step-{step:07d}.partial"


def begin(folder: Path) -> None:
    """Make the folder of an unfinished checkpoint, empty."""
    remove(folder)
    folder.mkdir(parents=True)


def write(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The state that all ranks share; the file holds `config` too and so resumes without the folder."""
    _write(folder / STATE, {**state, "config": dict(config)})


def write_rank(folder: Path, rank: int, state: Mapping[str, Any]) -> None:
    """What a rank has of its own."""
    _write(folder / RANK_STATE.format(rank=rank), dict(state))


def seal(folder: Path, step: int, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Mark an unfinished checkpoint as complete. facts: for readers, beside step and config."""
    write_json(folder / META, {"step": step, **facts, "config": config})


def finish(folder: Path, root: Path, step: int) -> Path:
    """Give a sealed checkpoint its name, in place of an older one of the same step; durable when this returns."""
    target = step_folder(root, step)
    remove(target)
    folder.rename(target)
    fsync_folder(root)
    return target


def _write(file: Path, content: dict[str, Any]) -> None:
    with file.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def superseded(root: Path, keep: int) -> list[int]:
    """The steps of all step folders but the newest `keep`; none if `keep` is 0."""
    return [step_of(folder) for folder in _steps(root)[:-keep]] if keep else []


def discard(root: Path, step: int) -> None:
    """Delete a step folder; a kill in the middle leaves nothing that looks complete."""
    aside = unfinished(root, step)
    remove(aside)
    step_folder(root, step).rename(aside)
    remove(aside)


def prune(root: Path, keep: int) -> None:
    """Delete all step folders but the newest `keep`; 0 keeps all."""
    for step in superseded(root, keep):
        discard(root, step)


def step_of(folder: Path) -> int:
    """1000 for .../step-0001000."""
    return int(folder.name.removeprefix("step-"))


def latest_state(root: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [folder for folder in _steps(root) if (folder / META).is_file()]
    return complete[-1] if complete else None


def find_state(root: Path, asked: str) -> Path:
    """The checkpoint that `asked` names: `latest` of this run, whose checkpoints are in `root`; step-0005500 or
    checkpoint-5500 of this run; another run's folder (its latest); RUN/checkpoint-5500; a step folder; a state file.

    Raises ResumeError if there is none, with those that there are.
    """
    path = Path(asked)
    if path.is_file() or (path / META).is_file():
        return path
    named = re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name)
    folder = root
    if asked != "latest" and (named is None or path.name != asked):
        folder = path.parent if named else path
        folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    steps = [step for step in _steps(folder) if (step / META).is_file()]
    found = steps[-1:] if named is None else [step for step in steps if step_of(step) == int(named[1])]
    if not found:
        there = f"it has {', '.join(step.name for step in steps)}" if steps else "it has no complete checkpoint"
        raise ResumeError(
            f"run.resume_from={asked}: no such checkpoint in {folder} ({there}); give latest, step-..., "
            "RUN/checkpoints/step-..., RUN/checkpoint-..., a run's folder, or a training state's .pt"
        )
    return found[0]


def starting_state(root: Path, resume_from: str | None) -> Path | None:
    """What a run goes on from: the newest checkpoint under root, or `resume_from`; see find_state.

    With `resume_from` the newest checkpoint is taken only if it comes from the same start.
    Raises ResumeError if it is another one's and newer, or if nothing is called `resume_from`.
    """
    newest = latest_state(root)
    if resume_from is None:
        return newest
    found = find_state(root, resume_from)
    if newest is None or found.resolve() == newest.resolve():
        return found
    if flatten(saved_config(newest)).get("run.resume_from") == resume_from:
        return newest
    given = load_state(found, mmap=True)["step"]
    if step_of(newest) > given:
        raise ResumeError(
            f"{newest} is newer than run.resume_from={resume_from} (step {given}); give this run another run.name, "
            "leave run.resume_from out to go on from the newest, or delete the newer checkpoints"
        )
    return found


def load_state(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The training state in a step folder or a lone state file, tensors on the CPU (mmap: left on disk until used).

    Raises CheckpointError if the file is damaged (mmap: a flipped bit is not looked for) or holds something else.
    """
    file = path / STATE if path.is_dir() else path
    state = _read(file, path, mmap)
    if not isinstance(state, dict) or not {"step", "model", "optimizer"} <= state.keys():
        raise CheckpointError(f"{file} holds no training state; to start from weights alone set stage.init_from={file}")
    with as_checkpoint_error():
        check_fields(state, _State, str(file))
        check_plain(state.get("config"), f"{file}: config")
    return state


@contextmanager
def restoring(checkpoint: Path, file: str = STATE) -> Iterator[None]:
    """Inside, an ArgumentError about what was loaded becomes a CheckpointError that names the checkpoint's file."""
    try:
        yield
    except ArgumentError as error:
        path = checkpoint / file if checkpoint.is_dir() else checkpoint
        raise CheckpointError(f"{path}: {error}; {_hint(checkpoint)}") from error


def from_weights(checkpoint: Path) -> str:
    """What to give to a new run that is to have a checkpoint's weights, but nothing else of it."""
    export = checkpoint.parent.parent / "exports" / checkpoint.name
    return f"another run.name and stage.init_from={export if export.is_dir() else 'RUN, for its newest export'}"


def load_rank(path: Path, rank: int) -> dict[str, Any]:
    """What a rank of this number had of its own; empty if there is nothing, as in a lone state file.

    Raises CheckpointError if the file is damaged.
    """
    file = path / RANK_STATE.format(rank=rank)
    if not path.is_dir() or not file.is_file():
        return {}
    own = _read(file, path)
    if not isinstance(own, dict):
        raise CheckpointError(f"{file} holds no state of a rank; {_hint(path)}")
    return own


def _read(file: Path, checkpoint: Path, mmap: bool = False) -> Any:
    if not mmap:
        check_records(file, f"; {_hint(checkpoint)}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason[:200]}); {_hint(checkpoint)}") from error


def _hint(checkpoint: Path) -> str:
    if not checkpoint.is_dir():
        return "give another file"
    return f"delete {checkpoint} to resume from the checkpoint before it, or from the start if there is none"


def saved_config(path: Path) -> dict[str, Any]:
    """The configuration that a step folder or a lone state file was trained under.

    Raises CheckpointError if its run.json is damaged. Such a checkpoint is never skipped: whether to lose its steps is
    the user's decision.
    """
    if not path.is_dir():
        state = load_state(path, mmap=True)
        if "config" not in state:
            raise CheckpointError(f"{path} does not hold the configuration of its run; {_hint(path)}")
        return state["config"]
    try:
        info = read_json(path / META)
        check_fields(info, _RunInfo, str(path / META))
    except UserError as error:
        raise CheckpointError(f"{error}; {_hint(path)}") from error
    return info["config"]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (old, new)."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def check_same_run(
    folder: Path, config: Mapping[str, Any], identity: tuple[str, ...] = IDENTITY
) -> dict[str, tuple[Any, Any]]:
    """Differences between a checkpoint's configuration and `config`.

    Raises ResumeError if one of them (see IDENTITY) makes it another run.
    """
    differing = changes(saved_config(folder), config)
    # A setting that is off now and unknown to an older checkpoint was off there, too.
    changed = {key: (old, new) for key, (old, new) in differing.items() if old is not None or new}
    fatal = {key: pair for key, pair in changed.items() if key.startswith(identity) and key not in FREE}
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

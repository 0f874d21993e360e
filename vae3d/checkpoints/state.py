"""Training state on disk: everything that a bit-equal resume needs.

checkpoints/step-0001000/state.pt    shared by all ranks, with the configuration
checkpoints/step-0001000/rank-0.pt   of one rank; only if it has state of its own, as DeepSpeed's shards
checkpoints/step-0001000/run.json    step and configuration for readers; written last

All ranks write into .step-0001000.tmp: `begin` creates it, `write` and `write_rank` fill it, `commit` renames it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch

from vae3d.arguments import ArgumentError, Range, check_fields, flatten, without_source_name
from vae3d.checkpoints.formats import CheckpointError, as_checkpoint_error
from vae3d.checkpoints.location import step_folders, step_of
from vae3d.errors import UserError
from vae3d.io import FileError, atomic_write, check_plain, read_json, remove, replace_durably, tmp_path, write_json
from vae3d.models.registry import RUNNING
from vae3d.weight_files import DOWNLOAD, read_tree

META = "run.json"  # a folder without it is incomplete
STATE = "state.pt"
RANK_STATE = "rank-{rank}.pt"
# Settings that a resumed run must share with its checkpoint.
MUST_MATCH = (
    "model", "stage.name", "stage.train", "adversary", "data.frames", "data.height", "data.width", "data.short_side",
    "data.buckets.shapes", "data.buckets.aspects", "data.buckets.frames", "data.buckets.multiple",
    "data.stride", "data.fps", "data.panorama", "data.depth.mapping", "teacher.features", "run.seed",
)  # fmt: skip
# Exceptions, beside those of RUNNING, which may change as optim may: the discriminator's learning rate is often tied to
# optim.
MAY_CHANGE = (
    *(f"adversary.{key}" for key in ("lr", "schedule", "warmup_steps", "max_steps", "min_lr", "cycles", "power")),
    "denoiser.dropout",
)


class _RunInfo(TypedDict):
    """The keys of run.json that are read."""

    step: Annotated[int, Range(0, 10**12)]
    config: Mapping[str, Any]


class _State(TypedDict, total=False):
    """The keys of state.pt that are read here; the trainers check the others."""

    step: Annotated[int, Range(0, 10**12)]
    model: Mapping[str, Any]
    config: Mapping[str, Any]


class ResumeError(UserError):
    """A checkpoint does not exist, or belongs to another run."""


def step_folder(root: Path, step: int) -> Path:
    """The complete checkpoint of a step."""
    return root / f"step-{step:07d}"


def unfinished(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is written; commit renames it."""
    return tmp_path(step_folder(root, step))


def begin(folder: Path) -> None:
    """Create the empty folder of an unfinished checkpoint."""
    remove(folder)
    folder.mkdir(parents=True)


def write(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the state that all ranks share, with `config`, so that the file alone can be resumed."""
    _write(folder / STATE, {**state, "config": dict(config)})


def write_rank(folder: Path, rank: int, state: Mapping[str, Any]) -> None:
    """Write the state of one rank."""
    _write(folder / RANK_STATE.format(rank=rank), dict(state))


def commit(folder: Path, root: Path, step: int, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Path:
    """Write run.json and rename the folder, durably, in place of an older checkpoint of the same step.

    metadata: for readers of run.json, beside step and config.
    """
    write_json(folder / META, {"step": step, **metadata, "config": config})
    replace_durably(folder, step_folder(root, step))
    return step_folder(root, step)


def _write(file: Path, content: dict[str, Any]) -> None:
    with atomic_write(file) as stream:
        torch.save(content, stream)


def superseded(root: Path, keep: int) -> list[int]:
    """The steps of all step folders but the newest `keep`; none if `keep` is 0."""
    return [step_of(folder) for folder in step_folders(root)[:-keep]] if keep else []


def later(root: Path, step: int) -> list[int]:
    """The steps of all step folders after `step`."""
    return [number for number in map(step_of, step_folders(root)) if number > step]


def discard(root: Path, step: int) -> None:
    """Delete a step folder. It is renamed first, so that after a kill the rest does not look complete."""
    tmp = unfinished(root, step)
    remove(tmp)
    step_folder(root, step).rename(tmp)
    remove(tmp)


def prune(root: Path, keep: int) -> None:
    """Delete all step folders but the newest `keep`; 0 keeps all."""
    for step in superseded(root, keep):
        discard(root, step)


def latest_state(root: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [folder for folder in step_folders(root) if (folder / META).is_file()]
    return complete[-1] if complete else None


def find_state(root: Path, asked: str) -> Path:
    """The checkpoint for run.resume_from. root: the checkpoints folder of this run.

    asked: `latest` or step-0005500 of this run; another run's folder (its latest), or one of its step folders; a state
    file.
    Raises ResumeError, listing the existing checkpoints, if there is none.
    """
    path = Path(asked)
    if path.is_file() or (path / META).is_file():
        return path
    step_name = re.fullmatch(r"step-(\d+)", path.name)
    folder = root
    if asked != "latest" and (step_name is None or path.name != asked):
        folder = path.parent if step_name else path
        folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    complete = [step for step in step_folders(folder) if (step / META).is_file()]
    found = complete[-1:] if step_name is None else [step for step in complete if step_of(step) == int(step_name[1])]
    if not found:
        existing = ", ".join(step.name for step in complete) or "no complete checkpoint"
        raise ResumeError(
            f"run.resume_from={asked}: no such checkpoint in {folder} (it has {existing}); give latest, step-..., "
            "RUN/checkpoints/step-..., a run's folder, or a training state's .pt"
        )
    return found[0]


def starting_state(root: Path, resume_from: str | None) -> Path | None:
    """The checkpoint from which a run starts: the newest under root, or `resume_from` (see find_state).

    With `resume_from`, the newest checkpoint is used only if its run had the same `resume_from`.
    Raises ResumeError if it had another and is newer, or if `resume_from` does not exist.
    """
    newest = latest_state(root)
    if resume_from is None:
        return newest
    found = find_state(root, resume_from)
    if newest is None or found.resolve() == newest.resolve():
        return found
    if flatten(saved_config(newest)).get("run.resume_from") == resume_from:
        return newest
    given = load_state(found, lazy=True)["step"]
    if step_of(newest) > given:
        raise ResumeError(
            f"{newest} is newer than run.resume_from={resume_from} (step {given}); give this run another run.name, "
            "leave out run.resume_from to resume from the newest, or delete the newer checkpoints"
        )
    return found


def load_state(path: Path, *, lazy: bool = False) -> dict[str, Any]:
    """The training state in a step folder or a state file. Its tensors are pages of the file: copy them, see
    weight_files.

    lazy: leave them in the file, as LazyTensors. Raises CheckpointError if it is damaged or holds something else.
    """
    file = path / STATE if path.is_dir() else path
    state = _read(file, path, lazy=lazy)
    if not isinstance(state, dict) or not {"step", "model", "optimizer"} <= state.keys():
        raise CheckpointError(f"{file} holds no training state; to start from weights alone set stage.init_from={file}")
    with as_checkpoint_error():
        check_fields(state, _State, str(file))
        check_plain(state.get("config"), f"{file}: config")
    return state


@contextmanager
def restoring(checkpoint: Path, file: str = STATE) -> Iterator[None]:
    """Raise an ArgumentError about loaded values as a CheckpointError that names the checkpoint's file."""
    try:
        yield
    except ArgumentError as error:
        path = checkpoint / file if checkpoint.is_dir() else checkpoint
        raise CheckpointError(f"{path}: {error}; {_hint(checkpoint)}") from error


def from_weights(checkpoint: Path) -> str:
    """Hint: the settings of a new run that starts from a checkpoint's weights only."""
    export = checkpoint.parent.parent / "exports" / checkpoint.name
    return f"another run.name and stage.init_from={export if export.is_dir() else 'RUN, for its newest export'}"


def load_rank(path: Path, rank: int) -> dict[str, Any]:
    """The state of one rank, as load_state; {} if there is none, such as beside a state file."""
    file = path / RANK_STATE.format(rank=rank)
    if not path.is_dir() or not file.is_file():
        return {}
    own = _read(file, path)
    if not isinstance(own, dict):
        raise CheckpointError(f"{file} does not hold the state of a rank; {_hint(path)}")
    return own


def _read(file: Path, checkpoint: Path, *, lazy: bool = False) -> Any:
    try:
        return read_tree(file, lazy=lazy)
    except FileError as error:
        reason = str(error).removeprefix(f"{file}: ").removesuffix(f"; {DOWNLOAD}")
        raise CheckpointError(f"{file} cannot be read ({reason}); {_hint(checkpoint)}") from error


def _hint(checkpoint: Path) -> str:
    if not checkpoint.is_dir():
        return "give another file"
    return f"delete {checkpoint} to resume from the checkpoint before it, or from the start if there is none"


def saved_config(path: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a step folder or a state file.

    Raises CheckpointError if run.json is damaged. Such a checkpoint is never skipped silently, since that loses steps.
    """
    if not path.is_dir():
        state = load_state(path, lazy=True)
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
    """{dotted key: (old, new)} of the values that differ."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def check_same_run(
    folder: Path, config: Mapping[str, Any], must_match: tuple[str, ...] = MUST_MATCH
) -> dict[str, tuple[Any, Any]]:
    """The differences between a checkpoint's configuration and `config`.

    must_match: key prefixes that must not differ. Raises ResumeError if one does.
    """
    differing = changes(saved_config(folder), config)
    # A setting that is off now and missing in an older checkpoint was off there too.
    changed = {key: (old, new) for key, (old, new) in differing.items() if old is not None or new}
    fatal = {
        key: pair
        for key, pair in changed.items()
        if without_source_name(key).startswith(must_match)
        and key not in MAY_CHANGE
        and key.rpartition(".")[2] not in RUNNING
        and not _of_new_source(key, changed)
    }
    if fatal:
        lines = "\n".join(f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in fatal.items())
        raise ResumeError(
            f"{folder} was trained under another configuration:\n{lines}\n"
            "  undo the changes to resume, or give this run another run.name"
        )
    return differing


def _of_new_source(key: str, changed: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether a setting is of a source of a mixture that was added or taken out, as files may be."""
    name = re.match(r"data\.sources\.[^.]+\.", key)
    return name is not None and None in changed.get(f"{name[0]}weight", ())

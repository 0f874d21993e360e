"""Checkpoints and exports of a diffusion run, and going on from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from vae3d.arguments import Size, check_fields
from vae3d.checkpoints import state
from vae3d.diffusion.export import write_export
from vae3d.restore import check_like
from vae3d.training.checkpointer import Means, Outputs, Steps, find_resume_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from vae3d.training.diffusion_trainer import DiffusionTrainer

# Settings that make a run another run.
IDENTITY = (
    *("denoiser", "process", "vae.sample", "labels", "data.frames", "data.height", "data.width", "data.stride"),
    *("data.fps", "run.seed"),
)


class _Scale(TypedDict):
    count: Steps
    mean: Sequence[float]
    std: Sequence[float]


class _Older(TypedDict, total=False):
    """What older checkpoints may lack."""

    data: Mapping[str, Any]


class _Saved(_Older):
    """The state of a diffusion run, as far as its form does not depend on the run."""

    step: Steps
    optimizer: Mapping[str, Any]
    ema: Mapping[str, Mapping[str, Any]]
    window: Means
    reads: Annotated[Sequence[Steps], Size(2, 2)]
    skipped: Steps
    scale: _Scale
    vae: Mapping[str, Any]
    classes: Sequence[str]


def save(trainer: DiffusionTrainer) -> None:
    """Write a checkpoint and an export, and delete what is older than trainer.keep. All ranks hold the same; the first
    one writes. Raises SaveError, on all ranks."""
    write_checkpoint(trainer, _state(trainer), {}, {}, outputs(trainer))


def outputs(trainer: DiffusionTrainer) -> Outputs:
    """What is made of the checkpoint of the step that the trainer is at."""
    (folder,) = step_outputs(trainer.folder, trainer.step)
    return {folder: lambda path: export(trainer, path)}


def step_outputs(folder: Path, step: int) -> list[Path]:
    """The outputs that are named after their step."""
    return [state.step_folder(folder / "exports", step)]


def export(trainer: DiffusionTrainer, folder: Path) -> None:
    """The averaged weights, and what sampling needs to know."""
    weights = {}
    for decay, average in trainer.averages.items():
        with average.applied():
            weights[decay] = {name: tensor.cpu().clone() for name, tensor in trainer.network.state_dict().items()}
    write_export(folder, trainer.export_facts(), weights)


def _state(trainer: DiffusionTrainer) -> dict[str, Any]:
    """Everything that a bit-equal resume needs: all randomness is a function of seed, step and position."""
    return {
        "step": trainer.step,
        "model": trainer.network.state_dict(),
        "optimizer": trainer.replicas.optimizer_state(),
        "ema": {f"{decay:g}": average.state_dict() for decay, average in trainer.averages.items()},
        "window": trainer.window.state_dict(),
        "reads": [trainer.reads, trainer.broken_reads],
        "skipped": trainer.skipped.in_row,
        "scale": trainer.scale,
        "vae": trainer.vae_facts(),
        "classes": trainer.data.classes,
        "data": {} if trainer.data.record is None else trainer.data.record.state_dict(),
    }


def resume(trainer: DiffusionTrainer) -> dict[str, tuple[Any, Any]]:
    """Restore what the run goes on from, if there is anything; returns the settings that changed since.

    Raises ResumeError, or UserError by name, for another network, process, autoencoder or data.
    """
    start = find_resume_checkpoint(trainer)
    if start is None:
        return {}
    before, saved = state.saved_config(start), state.load_state(start)
    if not all(isinstance(before.get(part), Mapping) for part in ("denoiser", "process")):
        raise state.ResumeError(f"{start} is no checkpoint of a diffusion model; run.resume_from takes one of those")
    with state.restoring(start):
        check_fields(saved, _Saved)
    changed = _check_same(trainer, start, before, saved)
    with state.restoring(start):
        _restore(trainer, start, saved)
    return changed


def _check_same(
    trainer: DiffusionTrainer, start: Path, before: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings that changed since. Raises ResumeError, or UserError by name, as `resume` does."""
    config = asdict(trainer.config)
    if saved["classes"] != trainer.data.classes:
        there, here = (", ".join(names) or "none" for names in (saved["classes"], trainer.data.classes))
        raise state.ResumeError(
            f"{start} was trained on the classes {there}; the data have {here}. A class is its place in this list; "
            "give back the data of before, or give this run another run.name"
        )
    changed = state.check_same_run(start, config, IDENTITY)
    if saved["vae"] != trainer.vae_facts():
        told = ", ".join(name for name, value in trainer.vae_facts().items() if saved["vae"].get(name) != value)
        raise state.ResumeError(
            f"{start} was trained on latents of another autoencoder than {trainer.config.vae.path}: its {told} "
            "differs; give the one of before, or another run.name"
        )
    rates = [f"{decay:g}" for decay in trainer.averages]
    if sorted(saved["ema"]) != sorted(rates):
        raise state.ResumeError(
            f"{start} holds averages at the rates {', '.join(saved['ema'])}, and trainer.ema.rates={rates}; "
            "these cannot be changed in the middle of a run"
        )
    return changed


def _restore(trainer: DiffusionTrainer, start: Path, saved: Mapping[str, Any]) -> None:
    """Raises ArgumentError for what does not fit this run."""
    check_like(saved["model"], trainer.network.state_dict(), "model")
    trainer.network.load_state_dict(saved["model"])
    trainer.replicas.load_optimizer(saved["optimizer"], {}, start)
    for decay, average in trainer.averages.items():
        average.load_state_dict(saved["ema"][f"{decay:g}"])
    trainer.window.load_state_dict(saved["window"])
    trainer.step, trainer.scale = saved["step"], saved["scale"]
    if trainer.data.record is not None:
        trainer.data_changes = trainer.data.record.changes_since(saved.get("data"))
    trainer.reads, trainer.broken_reads = saved["reads"]
    trainer.skipped.in_row = saved["skipped"]

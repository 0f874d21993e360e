"""Checkpoints and exports of a diffusion run, and going on from them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vae3d.checkpoints import state
from vae3d.diffusion.build import require_same
from vae3d.diffusion.export import write_export
from vae3d.engine.saving import tried_by_all
from vae3d.errors import UserError

if TYPE_CHECKING:
    from vae3d.diffusion.trainer import DiffusionTrainer

# Settings that make a run another run, beside those of network and process.
IDENTITY = ("vae.sample", "labels", "data.frames", "data.height", "data.width", "data.stride", "data.fps", "run.seed")


class SaveError(UserError):
    """A checkpoint that could not be written."""


def save(trainer: DiffusionTrainer) -> None:
    """Write a checkpoint and an export, each aside and then renamed; what is older than trainer.keep goes.

    All ranks hold the same; the first one writes. Raises SaveError on all of them; the last complete checkpoint stays.
    """
    root = trainer.folder / "checkpoints"
    config, keep = asdict(trainer.config), trainer.config.trainer.keep

    def write() -> None:
        unfinished = state.unfinished(root, trainer.step)
        try:
            state.begin(unfinished)
            state.write(unfinished, _state(trainer), config)
            facts = {"world_size": trainer.accelerator.num_processes}
            state.finish(unfinished, root, trainer.step, config, facts)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        export(trainer)
        state.prune(trainer.folder / "exports", keep)
        state.prune(root, keep)

    if fault := tried_by_all(trainer.device, lambda: write() if trainer.accelerator.is_main_process else None):
        raise SaveError(
            f"step {trainer.step} could not be saved: {fault}; the last complete checkpoint stays, and the same "
            "command goes on from there"
        )
    trainer.log.say(f"saved {state.step_folder(root, trainer.step)}")


def export(trainer: DiffusionTrainer) -> None:
    """The averaged weights, and what sampling needs to know."""
    weights = {}
    for decay, average in trainer.averages.items():
        with average.applied():
            weights[decay] = {name: tensor.cpu().clone() for name, tensor in trainer.network.state_dict().items()}
    write_export(trainer.folder / "exports" / f"step-{trainer.step:07d}", trainer.export_facts(), weights)


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
    }


def resume(trainer: DiffusionTrainer) -> dict[str, tuple[Any, Any]]:
    """Restore what the run goes on from, if there is anything; returns the settings that changed since.

    Raises ResumeError, or UserError by name, for another network, process, autoencoder or data.
    """
    start = state.starting_state(trainer.folder / "checkpoints", trainer.config.run.resume_from)
    if start is None:
        return {}
    config = asdict(trainer.config)
    before = state.saved_config(start)
    for part in ("denoiser", "process"):
        require_same(before[part], config[part], part)
    changed = state.refuse_other_run(start, config, IDENTITY)
    saved = state.load_state(start)
    if saved["vae"] != trainer.vae_facts():
        told = ", ".join(name for name, value in trainer.vae_facts().items() if saved["vae"][name] != value)
        raise state.ResumeError(
            f"{start} was trained on latents of another autoencoder than {trainer.config.vae.path}: its {told} "
            "differs; give the one of before, or another run.name"
        )
    rates = [f"{decay:g}" for decay in trainer.averages]
    if sorted(saved["ema"]) != sorted(rates):
        raise state.ResumeError(
            f"{start} holds averages at the rates {', '.join(saved['ema'])}, and trainer.ema.decays={rates}; "
            "these cannot be changed in the middle of a run"
        )
    trainer.network.load_state_dict(saved["model"])
    trainer.replicas.load_optimizer(saved["optimizer"], {}, start)
    for decay, average in trainer.averages.items():
        average.load_state_dict(saved["ema"][f"{decay:g}"])
    trainer.window.load_state_dict(saved["window"])
    trainer.step, trainer.scale = saved["step"], saved["scale"]
    trainer.reads, trainer.broken_reads = saved["reads"]
    trainer.skipped.in_row = saved["skipped"]
    return changed

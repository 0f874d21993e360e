"""A run's checkpoints and exports: written by all ranks together, or given up by all together."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from vae3d import ranks
from vae3d.checkpoints import state
from vae3d.checkpoints.export import replace_export, write_final_model
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.publish import publish, withdraw
from vae3d.engine.freeze import set_mode
from vae3d.inference.scale import ScaleError, measure, rescaled, spread_clips
from vae3d.metrics import MetricError

if TYPE_CHECKING:
    from vae3d.diffusion.trainer import DiffusionTrainer
    from vae3d.engine.trainer import Trainer

log = logging.getLogger("vae3d")

# What a full or vanished disk raises; torch.save tells it as a RuntimeError.
DISK_FAULTS = (OSError, RuntimeError, SafetensorError)


def save(trainer: Trainer) -> str | None:
    """Write a checkpoint, an export and, if asked for, their published files; why not, if that failed on some rank."""
    facts = {"strategy": trainer.config.trainer.strategy.name}
    states = _shared_state(trainer), _rank_state(trainer)
    return written(trainer, *states, facts, lambda saved: _publish(trainer, saved))


def written(
    trainer: Trainer | DiffusionTrainer,
    shared: dict[str, Any],
    own: dict[str, Any],
    facts: dict[str, Any],
    publish: Callable[[Path], None],
) -> str | None:
    """Write a checkpoint, and let the first rank `publish` what is made of it; why not, if that failed on some rank.

    shared: state that is equal on all ranks. own: what this rank has beside. facts: for readers.
    Every step of it is tried by all ranks, and the next only taken if all succeeded, so that none is left waiting. The
    last complete checkpoint stays whatever happens.
    """
    root, config = trainer.folder / "checkpoints", asdict(trainer.config)
    unfinished = state.unfinished(root, trainer.step)
    main = trainer.accelerator.is_main_process

    def write() -> None:
        if main:
            state.write(unfinished, shared, config)
        if own:
            state.write_rank(unfinished, trainer.accelerator.process_index, own)

    def finish() -> None:
        if main:
            about = {"world_size": trainer.accelerator.num_processes, **facts}
            state.finish(unfinished, root, trainer.step, config, about)

    for stage in (lambda: state.begin(unfinished) if main else None, write, finish):
        if fault := tried_by_all(trainer.device, stage):
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
            return f"no checkpoint of step {trainer.step}: {fault}"
    saved = state.step_folder(root, trainer.step)
    if fault := tried_by_all(trainer.device, lambda: publish(saved) if main else None):
        return f"{saved} is complete, but not what is made of it: {fault}"
    trainer.log.say(f"saved {saved}")
    return None


def tried_by_all(device: torch.device, stage: Callable[[], Any]) -> str | None:
    """Run a stage of saving on all ranks; what went wrong on any of them."""
    fault = None
    try:
        stage()
    except DISK_FAULTS as error:
        if "CUDA" in str(error):  # a RuntimeError, too, and of no disk
            raise
        full = "a file could not be written whole, as on a full disk: " if "inline_container" in str(error) else ""
        fault = f"{full}{type(error).__name__}: {error}"
    if ranks.everyone(fault is None, device):
        return None
    faults = gather_object([fault])
    return "; ".join(f"rank {rank}: {told}" for rank, told in enumerate(faults) if told)


def _publish(trainer: Trainer, saved: Path) -> None:
    """The export and the published files of a checkpoint; what is older than trainer.keep goes."""
    keep, named, folder = trainer.config.trainer.keep, trainer.config.trainer.publish, trainer.folder
    export(trainer, folder / "exports" / saved.name)
    last = trainer.step == trainer.config.trainer.max_steps
    if named.prefix is not None:
        with trainer.ema.applied():
            averaged = Checkpoint(trainer.config.model, trainer.network.state_dict(), folder, "export")
            publish(folder, named.prefix, saved, averaged, named.layout, last=last)
    if named.final_model and last:
        with trainer.ema.applied():
            write_final_model(Checkpoint(trainer.config.model, trainer.network.state_dict(), folder, "export"), folder)
    state.prune(folder / "exports", keep)
    gone = state.prune(folder / "checkpoints", keep)
    if named.prefix is not None:
        withdraw(folder, named.prefix, gone)


def export(trainer: Trainer, folder: Path, **about: Any) -> None:
    """The averaged weights (the current ones without EMA), for vae3d.load. about: further facts for model.yaml."""
    config = trainer.config
    with trainer.ema.applied():
        weights = Checkpoint(config.model, trainer.network.state_dict(), folder, "export")
        facts = {"stage": config.stage.name, "step": trainer.step, "ema": config.trainer.ema.decay, **about}
        if config.trainer.publish.measure_scale:
            weights, measured = _scaled(trainer, weights)
            facts |= measured
        replace_export(weights, folder, **facts)


def _scaled(trainer: Trainer, weights: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
    """The weights with the scale of their latents on training clips of the largest size, and the facts of it."""
    data, network, faults = trainer.data, trainer.network, []
    counts = [count for count in data.plan.frames.all() if len(data.plan.lengths.eligible(count))]
    count = trainer.config.trainer.publish.measure_scale
    clips = spread_clips(data.table, data.settings, counts[-1], count, faults)
    network.eval()
    try:
        measured = measure(network, clips, trainer.config.run.seed)
        return rescaled(weights, network, measured), {"latents": measured.facts()}
    except (ScaleError, MetricError) as error:
        trainer.log.warn(f"the export of step {trainer.step} has the scale of the configuration: {error}")
        return weights, {}
    finally:
        set_mode(network, trainer.config.stage.train)
        trainer.log.faults(faults)


def common_start(trainer: Trainer | DiffusionTrainer) -> Path | None:
    """The checkpoint that a run goes on from. Raises ResumeError on every rank if they do not all find the same."""
    start = state.starting_state(trainer.folder / "checkpoints", trainer.config.run.resume_from)
    found = gather_object([None if start is None else start.name])
    if len(set(found)) > 1:
        raise state.ResumeError(
            f"the ranks found the checkpoints {', '.join(sorted(map(str, set(found))))} in {trainer.folder}; they must "
            "all see the same folder, so put run.root on a shared disk"
        )
    return start


def resume(trainer: Trainer) -> dict[str, tuple[Any, Any]]:
    """Restore what the run goes on from, if there is anything; returns the settings that changed since."""
    start = common_start(trainer)
    if start is None:
        return {}
    changed = state.refuse_other_run(start, asdict(trainer.config))
    saved = state.load_state(start)
    trainer.proximal.refuse_other_anchor(saved.get("anchor"), start, trainer.config.stage.init_from)
    learned = saved.get("objective", {})
    if learned.keys() != trainer.objective.state_dict().keys():
        raise state.ResumeError(
            f"{start} was trained {'with' if learned else 'without'} loss.logvar; give this run another run.name, or "
            "set loss.logvar as it was"
        )
    trainer.objective.load_state_dict(learned)
    trainer.network.load_state_dict(saved["model"])
    if trainer.projections is not None:
        trainer.projections.load_state_dict(saved["projections"])
    rank = trainer.accelerator.process_index
    own = state.load_rank(start, rank)
    trainer.strategy.load_optimizer(saved["optimizer"], own.get("strategy", {}), start)
    trainer.ema.load_state_dict(saved["ema"])
    trainer.spikes.load_state_dict(saved["spikes"])
    trainer.adversary.load_state_dict(saved["adversary"])
    if "adversary" in own:
        trainer.adversary.load_rank_state_dict(own["adversary"])
    elif trainer.adversary.rank_state_dict():
        log.warning("%s has nothing of rank %d's own: its replay buffer starts empty", start, rank)
    if trainer.accelerator.scaler is not None and saved["scaler"]:
        trainer.accelerator.scaler.load_state_dict(saved["scaler"])
    trainer.window.load_state_dict(saved["window"])
    trainer.best.load_state_dict(saved.get("best", {}))
    trainer.step = saved["step"]
    if trainer.data.record is not None:
        trainer.data_changes = trainer.data.record.changes_since(saved.get("data"))
    trainer.reads, trainer.broken_reads = saved["reads"]
    trainer.unfinished.in_row, trainer.zero_gradient.in_row = saved.get("faults_in_row", (0, 0))
    return changed


def _rank_state(trainer: Trainer) -> dict[str, Any]:
    """What each rank has of its own."""
    parts = {"strategy": trainer.strategy.rank_state(), "adversary": trainer.adversary.rank_state_dict()}
    return {name: part for name, part in parts.items() if part}


def _shared_state(trainer: Trainer) -> dict[str, Any]:
    """What is equal on all ranks."""
    scaler = trainer.accelerator.scaler
    return {
        "step": trainer.step,
        "model": trainer.network.state_dict(),
        "objective": trainer.objective.state_dict(),
        "optimizer": trainer.strategy.optimizer_state(),
        "ema": trainer.ema.state_dict(),
        "anchor": trainer.proximal.digest,
        "spikes": trainer.spikes.state_dict(),
        "adversary": trainer.adversary.state_dict(),
        "projections": {} if trainer.projections is None else trainer.projections.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "window": trainer.window.state_dict(),
        "best": trainer.best.state_dict(),
        "data": {} if trainer.data.record is None else trainer.data.record.state_dict(),
        "reads": [trainer.reads, trainer.broken_reads],
        "faults_in_row": [trainer.unfinished.in_row, trainer.zero_gradient.in_row],
    }

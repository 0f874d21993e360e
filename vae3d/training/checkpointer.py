"""A run's checkpoints and exports: written by all ranks together, or given up by all together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from vae3d import distributed
from vae3d.arguments import Range, Size, check_fields
from vae3d.checkpoints import state
from vae3d.checkpoints.export import replace_export, write_final_model, write_flat
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.publish import final_file, link, published_files
from vae3d.errors import UserError
from vae3d.inference.scale import ScaleError, measure, rescaled, spread_clips
from vae3d.io import is_disk_error, remove, remove_unfinished
from vae3d.metrics import MetricError
from vae3d.restore import check_like
from vae3d.training.freeze import set_mode
from vae3d.training.patience import FailureCounter
from vae3d.training.spike import SpikeError

if TYPE_CHECKING:
    from vae3d.training.diffusion_trainer import DiffusionTrainer
    from vae3d.training.vae_trainer import Trainer

log = logging.getLogger("vae3d")

# What is written for a checkpoint beside its training state: where, and what writes it there, atomically.
Outputs = dict[Path, Callable[[Path], None]]

Steps = Annotated[int, Range(0, 10**12)]
Means = Mapping[str, Annotated[Sequence[Real], Size(1, 10**6)]]  # of a Window; also of losses that are not finite


class _Spikes(TypedDict):
    mean: float
    accepted: Steps
    skipped_in_row: Steps


class _Older(TypedDict, total=False):
    """What older checkpoints may lack."""

    objective: Mapping[str, Any]
    anchor: str | None
    best: Mapping[str, Any]
    data: Mapping[str, Any]
    errors_in_row: Annotated[Sequence[Steps], Size(2, 2)]


class _Saved(_Older):
    """The state that all ranks share, as far as its form does not depend on the run."""

    step: Steps
    optimizer: Mapping[str, Any]
    ema: Mapping[str, Any]
    spikes: _Spikes
    adversary: Mapping[str, Any]
    projections: Mapping[str, Any]
    scaler: Mapping[str, Any]
    window: Means
    reads: Annotated[Sequence[Steps], Size(2, 2)]


class _Own(TypedDict, total=False):
    """What each rank has of its own."""

    strategy: Mapping[str, Any]
    adversary: Mapping[str, Any]


class SaveError(UserError):
    """A checkpoint, or what is made of it, could not be written. what: that alone; lost: what comes of it at the end of
    a run."""

    def __init__(self, what: str, lost: str) -> None:
        super().__init__(f"{what}; {lost}")
        self.what, self.lost = what, lost


class Saver:
    """Decides when a run saves: at every `every`-th step, at its end, and before it stops with an error.

    Nothing is saved while steps are being skipped, since the weights may be ruined: a checkpoint that is due then waits
    for the next step that is taken. So a step has succeeded after every checkpoint but the newest.
    write: writes the checkpoint of the step that the run is at, or raises SaveError. root: of the checkpoints. every: 0
    never saves. failures: counts saves in a row that failed.
    """

    def __init__(
        self, write: Callable[[], None], root: Path, every: int, failures: FailureCounter, warn: Callable[[str], None]
    ) -> None:
        self.write, self.root, self.every, self.failures, self.warn = write, root, every, failures, warn
        self.due = False
        self.saved = self.taken = -1  # in this process: step of the newest checkpoint; step after the last update

    def after_step(self, step: int, *, taken: bool, ruined: int, end: bool) -> None:
        """taken: whether the step was. ruined: steps in a row, up to it, that were skipped because their loss or
        gradient was not finite. end: whether the run ends with it.

        Raises SpikeError at an end with ruined steps, SaveError at one where saving fails, TooManyFailures after too many
        failures.
        """
        if not self.every:
            return
        self.due |= step % self.every == 0
        if end and ruined:
            raise SpikeError(
                f"the run ends on {ruined} skipped steps whose loss or gradient was not finite, so that step {step} is "
                "not saved; lower optim.lr, or raise trainer.max_steps to train past it"
            )
        if end:
            self.save(step, end=True)
        elif self.due and taken:
            self.save(step)

    def save(self, step: int, end: bool = False) -> None:
        """Write a checkpoint and what is made of it; where that fails, and it is not the end, the run goes on.

        Raises SaveError, or TooManyFailures after too many failures.
        """
        self.due = False
        try:
            self.write()
        except SaveError as error:
            if end:
                raise
            self.warn(f"{error.what}; training goes on")
            self.failures.error(str(error))
        else:
            self.saved = step
            self.failures.reset()

    def save_before(self, error: UserError, step: int, skipped: int) -> None:
        """Save the finished steps before the run ends with `error`, on all ranks alike, and let it say what is saved.

        skipped: steps in a row whose loss or gradient was unsound; where there are any nothing is saved.
        """
        if skipped:
            error.args = (f"{error}{self.way_back()}",)
        if not self.every or skipped or step == 0:
            return
        try:
            if self.saved != step:
                self.write()
        except SaveError as failed:
            error.args = (f"{error}\n{failed}",)
        else:
            self.saved = step
            error.args = (f"{error}\nall {step} finished steps are saved; the same command resumes from there",)

    def way_back(self) -> str:
        """How to resume where no step succeeded after the newest checkpoint."""
        newest = state.latest_state(self.root)
        if newest is None or self.taken > state.step_of(newest):
            return ""
        return f". No step succeeded after {newest}: delete it to resume from the checkpoint before it"


def run_on_all_ranks(device: torch.device, stage: Callable[[], Any]) -> str | None:
    """Run a stage of saving on all ranks. Returns the disk errors of any of them; other errors propagate."""
    reason = None
    try:
        stage()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        full = "a file could not be written whole, as on a full disk: " if isinstance(error, RuntimeError) else ""
        reason = f"{full}{type(error).__name__}: {error}"
    if distributed.all_ranks_ok(reason is None, device):
        return None
    reasons = gather_object([reason])
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)


def save(trainer: Trainer) -> None:
    """Write a checkpoint, an export and, if asked for, their published files. Raises SaveError, on all ranks."""
    facts = {"strategy": trainer.config.trainer.strategy.name}
    write_checkpoint(trainer, _shared_state(trainer), _rank_state(trainer), facts, outputs(trainer))


def write_checkpoint(
    trainer: Trainer | DiffusionTrainer,
    shared: dict[str, Any],
    own: dict[str, Any],
    facts: dict[str, Any],
    outputs: Outputs,
) -> None:
    """Write a checkpoint and then, on the first rank, its outputs.

    shared: state that is equal on all ranks. own: what this rank has beside. facts: for readers of run.json.
    Every stage is run by all ranks, and the next only if all succeeded, so that none is left waiting. The last complete
    checkpoint stays whatever happens.
    Raises SaveError, on all ranks, if the disk of any of them fails.
    """
    root, config, step = trainer.folder / "checkpoints", asdict(trainer.config), trainer.step
    unfinished = state.unfinished(root, step)
    main = trainer.accelerator.is_main_process

    def write() -> None:
        if main:
            state.write(unfinished, shared, config)
        if own:
            state.write_rank(unfinished, trainer.accelerator.process_index, own)

    def seal() -> None:
        state.seal(unfinished, step, config, {"world_size": trainer.accelerator.num_processes, **facts})

    def finish() -> None:
        for path in outputs:  # of an older checkpoint of this step: what is there belongs to the newest one
            remove(path)
        state.finish(unfinished, root, step)

    def on_main(do: Callable[[], Any]) -> Callable[[], Any]:
        return do if main else lambda: None

    for stage in (on_main(lambda: state.begin(unfinished)), write, on_main(seal), on_main(finish)):
        if reason := run_on_all_ranks(trainer.device, stage):
            if main:
                _remove_if_possible(unfinished)
            raise SaveError(f"no checkpoint of step {step}: {reason}", _lost(root))
    write_outputs(trainer, outputs)
    trainer.log.say(f"saved {state.step_folder(root, step)}")


def write_outputs(trainer: Trainer | DiffusionTrainer, outputs: Outputs) -> None:
    """On the first rank, write those outputs of the newest checkpoint that are missing; then delete what is superseded.

    Raises SaveError, on all ranks, if the disk fails.
    """
    main = trainer.accelerator.is_main_process

    def write() -> None:
        for path, writer in outputs.items():
            if not path.exists():
                writer(path)
        _prune(trainer)

    if reason := run_on_all_ranks(trainer.device, lambda: write() if main else None):
        saved = state.step_folder(trainer.folder / "checkpoints", trainer.step)
        raise SaveError(
            f"{saved} is complete, but not what is made of it: {reason}",
            "free disk space, then run the same command again: it writes what is missing",
        )


def finish_newest(trainer: Trainer | DiffusionTrainer, outputs: Outputs) -> None:
    """At the start of a run: remove what killed writers left, and write what the newest checkpoint, from which the run
    resumed, lacks. Raises SaveError, on all ranks, if the disk fails."""
    root = trainer.folder / "checkpoints"
    newest = state.latest_state(root)
    if newest is None or state.step_of(newest) != trainer.step:  # resumed from another run's
        outputs = {}

    def clean() -> None:
        for folder in (trainer.folder, root, trainer.folder / "exports", *trainer.folder.glob(".hydra/rank*")):
            remove_unfinished(folder)

    main = trainer.accelerator.is_main_process
    if reason := run_on_all_ranks(trainer.device, lambda: clean() if main else None):
        raise SaveError(f"{trainer.folder} cannot be written to: {reason}", "fix that, then run the same command again")
    for path in outputs:
        if main and not path.exists():
            trainer.log.say(f"{newest} has no {path.relative_to(trainer.folder)} yet: writing it")
    write_outputs(trainer, outputs)


def _prune(trainer: Trainer | DiffusionTrainer) -> None:
    """Delete what exceeds trainer.keep, a step's checkpoint last.

    At least two are kept: a step is known to have succeeded after the last but one, not yet after the newest.
    """
    keep, root = trainer.config.trainer.keep, trainer.folder / "checkpoints"
    keep = max(keep, 2) if keep else 0
    state.prune(trainer.folder / "exports", keep)
    for step in state.superseded(root, keep):
        for path in trainer.step_outputs(step):
            remove(path)
        state.discard(root, step)


def _lost(root: Path) -> str:
    newest = state.latest_state(root)
    since = "all steps since the start" if newest is None else f"the steps after step {state.step_of(newest)}"
    resumes = "starts from the beginning" if newest is None else f"resumes from {newest}"
    return f"{since} are lost; free disk space, then run the same command again: it {resumes}"


def _remove_if_possible(folder: Path) -> None:
    """Half a checkpoint would only keep the disk full; the next start removes what cannot be removed now."""
    try:
        remove(folder)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)


def step_outputs(trainer: Trainer, step: int) -> list[Path]:
    """The outputs that are named after their step."""
    named, folder = trainer.config.trainer.publish, trainer.folder
    files = [] if named.prefix is None else published_files(folder, named.prefix, step)
    return [state.step_folder(folder / "exports", step), *files]


def outputs(trainer: Trainer) -> Outputs:
    """What is made of the checkpoint of the step that the trainer is at."""
    config, folder, step = trainer.config, trainer.folder, trainer.step
    named, last = config.trainer.publish, step >= config.trainer.max_steps

    def write_averaged(path: Path) -> None:
        with trainer.ema.applied():
            averaged = Checkpoint(config.model, trainer.network.state_dict(), folder, "export")
            write_flat(averaged, named.layout, path)

    def write_final(path: Path) -> None:
        with trainer.ema.applied():
            write_final_model(Checkpoint(config.model, trainer.network.state_dict(), folder, "export"), path.parent)

    made: Outputs = {state.step_folder(folder / "exports", step): lambda path: export(trainer, path)}
    if named.prefix is not None:
        training, averaged = published_files(folder, named.prefix, step)
        source = state.step_folder(folder / "checkpoints", step) / state.STATE
        made |= {training: lambda path: link(source, path), averaged: write_averaged}
        if last:
            made[final_file(folder, named.prefix)] = lambda path: link(averaged, path)
    if named.final_model and last:
        made[folder / "final_model.pth"] = write_final  # the last of its three files
    return made


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
    data, network, errors = trainer.data, trainer.network, []
    counts = [count for count in data.schedule.frames.all() if len(data.schedule.with_at_least(count))]
    count = trainer.config.trainer.publish.measure_scale
    clips = spread_clips(data.table, data.settings, counts[-1], count, errors)
    network.eval()
    try:
        measured = measure(network, clips, trainer.config.run.seed)
        return rescaled(weights, network, measured), {"latents": measured.facts()}
    except (ScaleError, MetricError) as error:
        trainer.log.warn(f"the export of step {trainer.step} has the scale of the configuration: {error}")
        return weights, {}
    finally:
        set_mode(network, trainer.config.stage.train)
        trainer.log.errors(errors)


def find_resume_checkpoint(trainer: Trainer | DiffusionTrainer) -> Path | None:
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
    start = find_resume_checkpoint(trainer)
    if start is None:
        return {}
    changed = state.check_same_run(start, asdict(trainer.config))
    saved = state.load_state(start)
    own = state.load_rank(start, trainer.accelerator.process_index)
    with state.restoring(start):
        check_fields(saved, _Saved)
        _restore(trainer, start, saved, own)
    return changed


def _restore(trainer: Trainer, start: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """own: of this rank. Raises ArgumentError for what does not fit this run."""
    rank = trainer.accelerator.process_index
    with state.restoring(start, state.RANK_STATE.format(rank=rank)):
        check_fields(own, _Own)
    trainer.proximal.check_same_anchor(saved.get("anchor"), start, trainer.config.stage.init_from)
    learned = saved.get("objective", {})
    if learned.keys() != trainer.objective.state_dict().keys():
        raise state.ResumeError(
            f"{start} was trained {'with' if learned else 'without'} loss.logvar; give this run another run.name, or "
            "set loss.logvar as it was"
        )
    check_like(learned, trainer.objective.state_dict(), "objective")
    trainer.objective.load_state_dict(learned)
    check_like(saved["model"], trainer.network.state_dict(), "model")
    trainer.network.load_state_dict(saved["model"])
    if trainer.projections is not None:
        check_like(saved["projections"], trainer.projections.state_dict(), "projections")
        trainer.projections.load_state_dict(saved["projections"])
    trainer.strategy.load_optimizer(saved["optimizer"], own.get("strategy", {}), start)
    trainer.ema.load_state_dict(saved["ema"])
    trainer.spikes.load_state_dict(saved["spikes"])
    trainer.adversary.load_state_dict(saved["adversary"])
    if "adversary" in own:
        with state.restoring(start, state.RANK_STATE.format(rank=rank)):
            trainer.adversary.load_rank_state_dict(own["adversary"])
    elif trainer.adversary.rank_state_dict():
        log.warning("%s has nothing of rank %d's own: its replay buffer starts empty", start, rank)
    if trainer.accelerator.scaler is not None and saved["scaler"]:
        check_like(saved["scaler"], trainer.accelerator.scaler.state_dict(), "scaler")
        trainer.accelerator.scaler.load_state_dict(saved["scaler"])
    trainer.window.load_state_dict(saved["window"])
    trainer.best.load_state_dict(saved.get("best", {}))
    trainer.step = saved["step"]
    if trainer.data.fingerprint is not None:
        trainer.data_changes = trainer.data.fingerprint.changes_since(saved.get("data"))
    trainer.reads, trainer.broken_reads = saved["reads"]
    trainer.unfinished.in_row, trainer.zero_gradient.in_row = saved.get("errors_in_row", (0, 0))


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
        "data": {} if trainer.data.fingerprint is None else trainer.data.fingerprint.state_dict(),
        "reads": [trainer.reads, trainer.broken_reads],
        "errors_in_row": [trainer.unfinished.in_row, trainer.zero_gradient.in_row],
    }

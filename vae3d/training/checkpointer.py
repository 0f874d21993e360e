"""Checkpoints and exports: all ranks write them together, or none does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from vae3d import distributed
from vae3d.arguments import ArgumentError, check_value
from vae3d.checkpoints import state
from vae3d.checkpoints.state import ResumeError, step_folder
from vae3d.errors import UserError
from vae3d.io import check_run_folder, is_disk_error, remove, remove_unfinished
from vae3d.restore import check_like
from vae3d.text import plural
from vae3d.training.best import BEST, BestExport
from vae3d.training.ema import Ema, MultiEma
from vae3d.training.failures import FailureCounter, SaveError, SpikeError
from vae3d.training.memory import catch_out_of_memory
from vae3d.training.runlog import RunLog
from vae3d.transfer import HostBuffers, host_copy, map_tensors

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import TrainConfig

log = logging.getLogger("vae3d")

Outputs = dict[Path, Callable[[Path], None]]  # files beside a checkpoint: path -> function that writes it, atomically


class Stateful(Protocol):
    """May also have rank_state_dict and load_rank_state_dict, for state that differs between ranks."""

    def state_dict(self) -> Any:
        """Equal on all ranks; tensors and plain values only."""

    def load_state_dict(self, state: Any) -> object:
        """Raises ArgumentError for a state of another form, ResumeError for one that does not fit the run."""


class Checkpointer:
    """Saves and loads registered objects, and writes the outputs of each checkpoint (exports, published files).

    A checkpoint is written to a hidden folder, fsynced and renamed once it is complete. All ranks run each stage of
    saving, see `_stages`, and the next only if all succeeded. The last complete checkpoint is never touched.

    No checkpoint is saved after a skipped step, since the weights may be NaN: one that is due waits for the next step
    that is applied. So a step was applied after every checkpoint but the newest. Exceptions: the end of a run is saved
    unless its last steps were not finite, and an error saves unless the spike guard skipped the steps before it.

    With trainer.async_mode=async, the first stage copies all state to host memory, which is kept for the next save, and
    `save` returns. A thread of each rank runs the others. The status of each step says whether one still writes; once
    none does, all begin the next stage together, in `advance`, or report the error then. One checkpoint is written at a
    time: the next one, and the end of a run, wait.

    outputs, final_outputs: called with a step; outputs also with a copy of the state. metadata: written to run.json.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        config: TrainConfig | DiffusionConfig,
        run_log: RunLog,
        *,
        outputs: Callable[..., Outputs],
        final_outputs: Callable[[int], Outputs],
        metadata: Mapping[str, Any],
    ) -> None:
        self.folder, self.root = folder, folder / "checkpoints"
        self.device, self.rank, self.main = accelerator.device, accelerator.process_index, accelerator.is_main_process
        self.config, self.log = asdict(config), run_log
        self.save_every, self.max_steps = config.trainer.save_every, config.trainer.max_steps
        self.keep = max(config.trainer.keep, 2) if config.trainer.keep else 0
        self.failures = FailureCounter(
            config.trainer.robust.save_failures,
            "trainer.robust.save_failures",
            "checkpoints in a row could not be written",
            "the last complete one stays",
        )
        self.outputs, self.final_outputs = outputs, final_outputs
        self.metadata = {"world_size": accelerator.num_processes, **metadata}
        self.items: dict[str, Stateful] = {}
        self.strict: set[str] = set()
        self.optional_rank_state: set[str] = set()
        self.uncopied_rank_state: set[str] = set()
        self.asynchronous = config.trainer.async_mode == "async"
        self.pending: _Save | None = None
        self.copies = HostBuffers(), HostBuffers()  # of the shared state, on the first rank, and of each rank's own
        self.reserving: futures.Future[None] | None = None
        self.due = False
        self.last_saved = -1  # step of the newest checkpoint that this process wrote
        self.last_applied = -1  # number of steps after the last one that this process applied

    def register(
        self,
        name: str,
        item: Stateful,
        *,
        strict: bool = False,
        optional_rank_state: bool = False,
        copy_rank_state: bool = True,
    ) -> None:
        """Save and load `item` under `name`.

        strict: a saved state must have the keys and shapes of the current one. optional_rank_state: its rank state may
        be missing, as in a lone state file. copy_rank_state: False if training replaces its tensors and never changes
        them, so that an asynchronous save needs no copy.
        """
        self.items[name] = item
        self.uncopied_rank_state |= set() if copy_rank_state else {name}
        self.strict |= {name} if strict else set()
        self.optional_rank_state |= {name} if optional_rank_state else set()

    # ---- loading

    def load(self, checkpoint: Path) -> int:
        """Load all registered objects; returns the step. Raises CheckpointError for another form, and ResumeError."""
        saved, own = state.load_state(checkpoint), state.load_rank(checkpoint, self.rank)
        with state.restoring(checkpoint):
            for name, item in self.items.items():
                if name not in saved:
                    raise ArgumentError(f"{name} is missing")
                if name in self.strict:
                    check_like(saved[name], item.state_dict(), name)
                loaded = saved[name] if isinstance(item, nn.Module | Ema | MultiEma) else _copied(saved[name])
                _load_item(checkpoint, name, item.load_state_dict, loaded)
        with state.restoring(checkpoint, state.RANK_STATE.format(rank=self.rank)):
            for name, item in self.items.items():
                if not hasattr(item, "load_rank_state_dict"):
                    continue
                if name in own or name not in self.optional_rank_state:
                    check_value(own.get(name, {}), Mapping[str, Any], name)
                    _load_item(checkpoint, name, item.load_rank_state_dict, _copied(own.get(name, {})))
                elif item.rank_state_dict():
                    log.warning("%s has no %s of rank %d, which starts empty", checkpoint, name, self.rank)
        return saved["step"]

    # ---- saving

    def mark_applied(self, step: int) -> None:
        """The last of `step` steps was applied."""
        self.last_applied = step
        if self.asynchronous and self.save_every and self.main and self.reserving is None:
            self._reserve()

    def _reserve(self) -> None:
        """Allocate the memory of asynchronous saves in a thread, so that the first of them need not wait for it.

        Without enough of it, that save says so.
        """
        shared = self._shared_state()  # which has the optimizer's moments from the first step on
        self.reserving = _in_thread(lambda: self.copies[0].reserve(shared), "checkpoint-memory")

    def save_if_due(self, step: int, *, applied: bool, not_finite: int, end: bool) -> None:
        """Save if a checkpoint is due.

        applied: whether the last step was. not_finite: consecutive skipped steps whose loss or gradient was not finite.
        end: whether the run ends here. Raises SpikeError if it ends on such steps, SaveError if its last save fails,
        TooManyFailures after too many failed saves.
        """
        if not self.save_every:
            return
        self.due |= step % self.save_every == 0
        if end and not_finite:
            raise SpikeError(
                f"the run ends on {plural(not_finite, 'skipped step')} whose loss or gradient was not finite, so that "
                f"step {step} is not saved; lower optim.lr, or raise trainer.max_steps to train past it"
                f"{self.recovery_hint()}"
            )
        if end or (self.due and applied):
            self.save(step, end=end)

    def save(self, step: int, end: bool = False) -> None:
        """Write a checkpoint and its outputs. If that fails before the end of a run, training continues.

        Raises SaveError at the end, TooManyFailures after too many failures.
        """
        self.due = False
        self.wait()
        error = self._save(step, in_thread=self.asynchronous and not end)
        if end and error is not None:
            raise error
        self._record(error)

    def _record(self, error: SaveError | None) -> None:
        """Count a failed save, after which training continues. Raises TooManyFailures."""
        if error is not None:
            self.log.warn(f"{error.what}; training goes on")
            self.failures.record(str(error))

    @property
    def writing(self) -> bool:
        """Whether this rank still writes files of an asynchronous save."""
        return self.pending is not None and self.pending.running

    def advance(self, *, saving: bool) -> None:
        """Begin the next stage of an asynchronous save once all ranks have finished the last one.

        saving: whether a rank was still writing, equal on all ranks. Raises TooManyFailures after too many failures.
        """
        if self.pending is not None and not saving:
            self._record(self._next_stage())

    def wait(self) -> None:
        """Finish an asynchronous save. Every rank must call it. Raises TooManyFailures after too many failures."""
        self._record(self._finish())

    def close(self) -> None:
        """Finish an asynchronous save as far as this rank can by itself, after an error on any rank.

        With several ranks only the files of the current stage are written, and the next start removes them.
        """
        if self.pending is not None and distributed.is_distributed():
            self.pending.join()
        elif (error := self._finish()) is not None:
            self.log.warn(str(error))

    def save_then_raise(self, error: UserError, step: int, skipped: int) -> NoReturn:
        """End the run with `error`, on all ranks, after saving the finished steps. Adds to the message what is saved.

        skipped: consecutive steps that the spike guard skipped up to here; if there are any, nothing is saved.
        """
        if (failed := self._finish()) is not None:
            self.log.warn(failed.what)
        if skipped:
            error.args = (f"{error}{self.recovery_hint()}",)
        elif self.save_every and step:
            failed = None if self.last_saved == step else self._save(step, in_thread=False)
            saved = f"all {step} finished steps are saved; the same command resumes from there"
            error.args = (f"{error}\n{saved if failed is None else failed}",)
        raise error

    def recovery_hint(self) -> str:
        """How to resume if no step was applied after the newest checkpoint."""
        newest = state.latest_state(self.root)
        if newest is None or self.last_applied > state.step_of(newest):
            return ""
        return f". No step succeeded after {newest}: delete it to resume from the checkpoint before it"

    # ---- the stages of a save

    def _stages(self, step: int, *, copy: bool) -> list[Callable[[], None]]:
        """What this rank does to save. All ranks finish a stage before any begins the next.

        copy: the first stage copies the state, so that the others may run in a thread while training goes on.
        """
        unfinished = state.unfinished(self.root, step)
        shared: dict[str, Any] = {}
        own: dict[str, Any] = {}
        outputs: Outputs = {}

        def read() -> None:
            nonlocal shared, own, outputs
            if self.main:
                state.begin(unfinished)
                shared = self._shared_state(copy=copy)
                outputs = self.outputs(step, shared) if copy else self._outputs(step)
            own = self._own_state(copy=copy)

        def write() -> None:
            if self.main:
                state.write(unfinished, {"step": step, **shared}, self.config)
            if own:
                state.write_rank(unfinished, self.rank, own)

        def commit() -> None:
            if self.main:
                for path in outputs:  # left by an older checkpoint of this step
                    remove(path)
                state.commit(unfinished, self.root, step, self.config, self.metadata)

        def write_outputs() -> None:
            if self.main:
                self._write_missing(step, outputs)

        return [read, write, commit, write_outputs]

    def _save(self, step: int, *, in_thread: bool) -> SaveError | None:
        """Save a checkpoint and its outputs, or only begin to. Returns the error if a rank had one."""
        self.pending = _Save(step, self._stages(step, copy=in_thread), in_thread)
        return self._next_stage() if in_thread else self._finish()

    def _finish(self) -> SaveError | None:
        """Run the pending save, if there is one, to its end. Returns the error if a rank had one."""
        error = None
        while self.pending is not None:
            error = self._next_stage()
        return error

    def _next_stage(self) -> SaveError | None:
        """Finish the current stage of the pending save and begin the next. Returns the error if a rank had one.

        Every rank must call it.
        """
        save, self.pending = self.pending, None  # an error of any kind ends the save
        reason = run_on_all_ranks(self.device, save.finish)
        if reason is not None:
            return self._outputs_missing(save.step, reason) if save.at_end else self._not_saved(save.step, reason)
        if not save.at_end:
            save.begin_next()
            self.pending = save
            return None
        self.last_saved = save.step
        self.failures.reset()
        self.log.say(f"saved {step_folder(self.root, save.step).relative_to(self.folder)}")
        return None

    def _shared_state(self, *, copy: bool = False) -> dict[str, Any]:
        shared = {name: item.state_dict() for name, item in self.items.items()}
        if not copy:
            return shared
        futures.wait([self.reserving] if self.reserving else [])
        return host_copy(shared, self.copies[0])

    def _own_state(self, *, copy: bool) -> dict[str, Any]:
        """Of this rank."""
        per_rank = {name: i.rank_state_dict() for name, i in self.items.items() if hasattr(i, "rank_state_dict")}
        own = {name: part for name, part in per_rank.items() if part}
        if not copy:
            return own
        changing = {name: part for name, part in own.items() if name not in self.uncopied_rank_state}
        return own | host_copy(changing, self.copies[1])

    def _outputs(self, step: int) -> Outputs:
        """Those of the current weights, with the final ones after the last step."""
        return self.outputs(step) | (self.final_outputs(step) if step >= self.max_steps else {})

    def _write_missing(self, step: int, outputs: Outputs) -> None:
        """Write the missing outputs and delete what exceeds `keep`."""
        for path, writer in outputs.items():
            if not path.exists():
                writer(path)
        state.prune(self.folder / "exports", self.keep)
        for old in state.superseded(self.root, self.keep):
            for path in self.outputs(old):
                remove(path)
            state.discard(self.root, old)

    def _not_saved(self, step: int, reason: str) -> SaveError:
        if self.main:
            _try_to_remove(state.unfinished(self.root, step))
        return SaveError(f"no checkpoint of step {step}: {reason}", self._lost())

    def _outputs_missing(self, step: int, reason: str) -> SaveError:
        return SaveError(
            f"{step_folder(self.root, step)} is complete, but its outputs are not: {reason}",
            "free disk space or memory, then run the same command again: it writes what is missing",
        )

    def _lost(self) -> str:
        newest = state.latest_state(self.root)
        since = "all steps since the start" if newest is None else f"the steps after step {state.step_of(newest)}"
        resumes = "starts from the beginning" if newest is None else f"resumes from {newest}"
        return f"{since} are lost; free disk space or memory, then run the same command again: it {resumes}"

    # ---- outputs at other times

    def complete_newest(self, step: int) -> None:
        """At the start of a run, remove what a killed process left and write missing outputs of the newest checkpoint.

        Outputs of later steps, whose checkpoints the user has deleted, are removed: the run takes these steps again,
        and until then they would pass for the newest.

        Raises SaveError, on all ranks, if the disk fails.
        """
        newest = state.latest_state(self.root)
        resumed = newest is not None and state.step_of(newest) == step  # not from the checkpoint of another run
        outputs = self._outputs(step) if resumed else {}

        def clean() -> None:
            for folder in (self.folder, self.root, self.folder / "exports", *self.folder.glob(".hydra/rank*")):
                remove_unfinished(folder)
            for later in state.later(self.folder / "exports", step) if resumed else ():
                self.log.say(f"removing {step_folder(self.folder / 'exports', later)}: the run resumes at step {step}")
                for path in self._outputs(later):
                    remove(path)

        if reason := run_on_all_ranks(self.device, clean, self.main):
            raise SaveError(f"{self.folder} cannot be written to: {reason}", "fix that, then run the same command")
        for path in outputs:
            if self.main and not path.exists():
                self.log.say(f"{newest} has no {path.relative_to(self.folder)} yet: writing it")
        if reason := run_on_all_ranks(self.device, lambda: self._write_missing(step, outputs), self.main):
            raise self._outputs_missing(step, reason)

    def export_best(
        self, best: BestExport, scores: Mapping[str, float], step: int, export: Callable[..., None]
    ) -> None:
        """Write exports/best if `scores`, equal on all ranks, are the best so far. If that fails, it only warns."""
        value = scores.get(f"val/{best.column}")
        if value is None or not best.beaten_by(value):
            return
        folder = self.folder / "exports" / BEST
        if reason := run_on_all_ranks(self.device, lambda: export(folder, best={best.column: value}), self.main):
            self.log.warn(f"{folder} is not of step {step}, the best so far: {reason}; training goes on")
            best.missed = value, step
        else:
            best.value, best.step = value, step
            self.log.say(f"{best.column} {value:.6g} is the best so far: {folder.relative_to(self.folder)}")


class _Save:
    """A save on this rank, of which one stage runs at a time: in `finish`, or, but for the first, in a thread."""

    def __init__(self, step: int, stages: list[Callable[[], None]], in_thread: bool) -> None:
        self.step, self.in_thread = step, in_thread
        self._current, *self._next = stages
        self._thread: futures.Future[None] | None = None

    @property
    def at_end(self) -> bool:
        """Whether the current stage is the last."""
        return not self._next

    @property
    def running(self) -> bool:
        return self._thread is not None and not self._thread.done()

    def begin_next(self) -> None:
        self._current = self._next.pop(0)
        if self.in_thread:
            self._thread = _in_thread(self._current, "checkpoint")
            self._current = self._thread.result

    def finish(self) -> None:
        """Run the current stage, or wait for it. Raises what it raises."""
        self._current()

    def join(self) -> None:
        """Wait for the current stage, if it runs."""
        futures.wait([self._thread] if self._thread else [])


def _in_thread(run: Callable[[], None], name: str) -> futures.Future[None]:
    executor = ThreadPoolExecutor(1, name)
    future = executor.submit(run)
    executor.shutdown(wait=False)
    return future


def _copied(saved: Any) -> Any:
    """Copies of tensors that are pages of a file, for items that keep what they load; modules copy it themselves."""
    return map_tensors(Tensor.clone, saved)


def _load_item(checkpoint: Path, name: str, load: Callable[[Any], object], item_state: Any) -> None:
    """load(item_state), with the item's name or the checkpoint added to errors."""
    try:
        load(item_state)
    except ArgumentError as error:
        raise ArgumentError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    except ResumeError as error:
        weights = f"; or start a new run from its weights: {state.from_weights(checkpoint)}"
        raise ResumeError(f"{checkpoint} {error}{weights if name == 'optimizer' else ''}") from error


def run_on_all_ranks(device: torch.device, stage: Callable[[], Any], runs: bool = True) -> str | None:
    """Run a stage of saving on the ranks that have `runs`; every rank must call it.

    Returns the UserErrors of any rank, and the errors of its disk or memory; other errors propagate.
    """
    reason = None
    try:
        if runs:
            _, reason = catch_out_of_memory(stage)
    except UserError as error:  # such as FileError of a file that cannot be written
        reason = str(error)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        full = "a file could not be written whole, as on a full disk: " if isinstance(error, RuntimeError) else ""
        reason = f"{full}{type(error).__name__}: {error}"
    if distributed.all_ranks_ok(reason is None, device):
        return None
    reasons = distributed.all_gather_object(reason)
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)


def check_may_start(folder: Path, resume: bool) -> None:
    """Raises ResumeError for a run that has checkpoints and must not resume, FileError for a folder with links."""
    check_run_folder(folder)
    if not resume and state.latest_state(folder / "checkpoints") is not None:
        raise ResumeError(f"{folder} holds checkpoints and run.resume=false; give this run another run.name")


def find_checkpoint(folder: Path, resume_from: str | None) -> Path | None:
    """The checkpoint from which a run starts, see state.starting_state. Every rank must call it.

    Raises ResumeError, on all ranks, if they do not all find the same, or one of them none that it may take.
    """
    found, failure = None, None
    try:
        found = state.starting_state(folder / "checkpoints", resume_from)
    except UserError as error:
        failure = error
    answers = distributed.all_gather_object((None if found is None else found.name, failure))
    names = {name for name, _ in answers}
    if len(names) > 1:
        raise ResumeError(
            f"the ranks found the checkpoints {', '.join(sorted(map(str, names)))} in {folder}; all must see the same "
            "folder, so put run.root on a shared disk"
        )
    if failures := [failure for _, failure in answers if failure is not None]:
        raise failures[0]
    return found


def _try_to_remove(folder: Path) -> None:
    """Half a checkpoint keeps the disk full. The next start removes what cannot be removed now."""
    try:
        remove(folder)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)

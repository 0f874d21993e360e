"""The training loop. VaeTrainer and DiffusionTrainer add what they compute in it."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

from vae3d import distributed
from vae3d.adversarial.base import Adversary, NoAdversary, UpdatePhase
from vae3d.checkpoints import state
from vae3d.data.media import DataError
from vae3d.data.table.fingerprint import DataChanges
from vae3d.errors import UserError
from vae3d.io import read_json
from vae3d.metrics.base import Better
from vae3d.pixels import PixelError, no_value_checks
from vae3d.schedules import learning_rate
from vae3d.seeding import seed_of
from vae3d.training.best import BestExport
from vae3d.training.checkpointer import Checkpointer, Outputs, step_folder
from vae3d.training.ema import Ema, MultiEma
from vae3d.training.failures import FailureCounter, ReadErrors, SpikeGuard, TooManyFailures
from vae3d.training.freeze import eval_mode, parameter_list
from vae3d.training.loggers import Loggers
from vae3d.training.memory import catch_out_of_memory, idle_gib, release_idle_memory
from vae3d.training.proximal import Proximal
from vae3d.training.runlog import RunLog, StopRequest, stop_signals
from vae3d.training.step_status import MeanMeter, StatusTable, StepMetrics, StepResult, StepStatus
from vae3d.training.strategy import ScalerState, Strategy
from vae3d.transfer import InputCopies, read

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import TrainConfig

MIN_GRAD_NORM = 1e-12  # below it a gradient counts as zero
STEP_TIMEOUT = timedelta(minutes=10)  # of a step's collectives, beside the time that a rank may wait for data

Batch = TypeVar("Batch")
T = TypeVar("T")


CLIPS_PER_STEP = "clips_per_step"  # key of run.json: of each source and bucket


class Trainer(ABC, Generic[Batch]):
    """Takes optimizer steps, logs, validates and saves; a run that was stopped or killed resumes bit for bit.

    A subclass's `__init__` moves the model to its device and builds optimizer and strategy, which compares the weights
    of all ranks; no file is read or written. Then call `setup` once, which resumes and opens the log, and `fit`.
    Subclasses implement the abstract methods, and register further state with `self.checkpointer`.

    network: the model that is trained and saved. data: has `schedule`, `clips_per_step`, `fingerprint` and `errors`.
    max_zero_gradients: limit of consecutive steps, 0 for none. compact_gib: see release_idle_memory. metadata: written
    to run.json.
    """

    def __init__(
        self,
        config: TrainConfig | DiffusionConfig,
        folder: Path,
        accelerator: Accelerator,
        network: nn.Module,
        strategy: Strategy,
        ema: Ema | MultiEma,
        data: Any,
        logger: Loggers,
        *,
        spikes: SpikeGuard,
        max_zero_gradients: int = 0,
        adversary: Adversary | None = None,
        proximal: Proximal | None = None,
        best: BestExport | None = None,
        preflight_enabled: bool = False,
        compact_gib: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.device, self.rank = accelerator.device, accelerator.process_index
        self.network, self.strategy, self.ema, self.data = network, strategy, ema, data
        self.adversary = adversary or NoAdversary()
        self.proximal = proximal or Proximal(network, weight=0.0)
        self.spikes = spikes
        limits = config.trainer.robust
        self.failed_steps = FailureCounter(
            limits.max_consecutive_failures,
            "trainer.robust.max_consecutive_failures",
            "steps in a row could not be finished",
            "for memory raise trainer.accumulate or lower data.batch_size, data.frames.max, data.height or data.width; "
            f"for files see {folder}/data_errors*.jsonl",
        )
        self.discriminator_failures = FailureCounter(
            spikes.max_consecutive_skips,
            "trainer.spike.max_consecutive_skips",
            "updates of the discriminator in a row had a loss or gradient that is not finite",
            "lower adversary.lr, or use adversary=none",
        )
        self.zero_gradient = FailureCounter(
            max_zero_gradients,
            "trainer.robust.zero_gradient",
            "steps in a row had no gradient at all",
            "the model learns nothing: are its outputs clamped, or the pixels in another range than the losses expect?",
        )
        self.read_errors = ReadErrors(config.data.max_broken, folder)
        self.data_changes = DataChanges(data.fingerprint)
        self.best = best or BestExport(None, {})
        self.preflight_enabled, self.compact_gib = preflight_enabled, compact_gib

        self.inputs = InputCopies(self.device, self.copy_to_device)
        self.step = 0
        self.stopped_by = 0  # the signal that ended the run
        self.meter = MeanMeter()
        self.reset_timer()
        self.status_table = StatusTable(self.rank, accelerator.num_processes, self.device)
        self.log = RunLog(folder, logger, rank=self.rank)
        self.checkpointer = Checkpointer(
            folder,
            accelerator,
            config,
            self.log,
            outputs=self.outputs,
            final_outputs=self.final_outputs,
            metadata=metadata or {},
        )
        self.checkpointer.register("model", self.network, strict=True)
        self.checkpointer.register("optimizer", self.strategy)
        self.checkpointer.register("scaler", ScalerState(accelerator))
        self.checkpointer.register("ema", self.ema)
        self.checkpointer.register("spikes", self.spikes)
        self.checkpointer.register("failed_steps", self.failed_steps)
        self.checkpointer.register("discriminator_failures", self.discriminator_failures)
        self.checkpointer.register("zero_gradient", self.zero_gradient)
        self.checkpointer.register("reads", self.read_errors)
        self.checkpointer.register("meter", self.meter)
        self.checkpointer.register("best", self.best)
        self.checkpointer.register("data", self.data_changes)

    # ---- what a subclass adds

    @abstractmethod
    def load_batches(self, stopping: Callable[[], bool]) -> Iterator[Batch]:
        """The micro-batches of all steps from self.step on. stopping: whether the run is about to stop."""

    @abstractmethod
    def is_readable(self, batch: Batch) -> bool:
        """Whether the batch has data; without, none of its files could be read."""

    @abstractmethod
    def clip_names(self, batch: Batch) -> list[str]:
        """The batch's clips, to name them in the log."""

    @abstractmethod
    def copy_to_device(self, batch: Batch) -> Batch:
        """A readable batch on the device, by copies that do not wait for it."""

    @abstractmethod
    def forward_backward(self, batches: Sequence[Batch], phase: UpdatePhase, step: int, metrics: StepMetrics) -> None:
        """Forward and backward passes of this rank's micro-batches; gradients add up over them.

        phase: whether the step trains the model, its discriminator, or both.
        """

    @abstractmethod
    def export_of(self, step: int, saved: Mapping[str, Any], **info: Any) -> Callable[[Path], None]:
        """A function that exports the averaged weights of `saved`, see `outputs`, with `info` in the metadata."""

    @abstractmethod
    def check_same_run(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        """Settings that changed since `checkpoint`, key -> (old, new). Raises ResumeError for a different run."""

    def prepare(self) -> None:
        """Compute what the run needs from its data, after resuming. Nothing by default."""

    def preflight(self) -> None:
        """Find errors of any step before the first one. Nothing by default."""

    def outputs(self, step: int, saved: Mapping[str, Any] | None = None) -> Outputs:
        """Files that belong to the checkpoint of `step`: path -> function that writes it.

        saved: a copy of the checkpoint, by registered name, from which to write, in another thread, while training goes
        on; None: of the current weights. Whatever needs the network is then computed before this returns.
        """
        path = step_folder(self.folder / "exports", step)
        return {path: self.export if saved is None else self.export_of(step, saved)}

    def export(self, folder: Path, **info: Any) -> None:
        """Write the current averaged weights. info: more entries for the export's metadata."""
        self.export_of(self.step, self.current_state(), **info)(folder)

    def current_state(self) -> dict[str, Any]:
        """What exports are made of, by its name in checkpoints; not copied."""
        return {"model": self.network.state_dict(), "ema": self.ema.state_dict()}

    def final_outputs(self, step: int) -> Outputs:
        """Files to write after the last step, which are never pruned."""
        return {}

    # ---- the run

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.strategy.optimizer

    def setup(self, checkpoint: Path | None) -> None:
        """Resume from `checkpoint`, see find_checkpoint, lock the run's folder and open its log.

        Raises ResumeError for a checkpoint of a different run, RunLocked if another process trains in the folder.
        """
        changed = {} if checkpoint is None else self.resume(checkpoint)
        self.prepare()
        self.log.open(self.step, self.config.trainer.max_steps, validates=self.validation_due())
        self.log.launch(self.step, asdict(self.config), changed, self.data_changes.lines)
        self.log.text("parameters", parameter_list(self.network), self.step)
        for key, (old, new) in changed.items():
            self.log.say(f"{key} changed at step {self.step} from {old} to {new}")
        self.log.errors(self.data.errors, "is left out")
        self.log.skipped_files(self.data.skipped_files)

    def resume(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        """Load the checkpoint. Returns the settings that changed since."""
        changed = self.check_same_run(checkpoint)
        self.step = self.checkpointer.load(checkpoint)
        return changed

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after a signal. Returns whether it was the last.

        Raises SaveError if the last checkpoint or an export of it could not be written, SpikeError if the run ends on
        skipped steps, TooManyFailures if a failure repeats, DataError, after saving, if the data loader fails,
        RanksDiffer, after saving, if ranks have gradients or metrics of other names, and PreflightError or PartError
        before the first step.
        """
        last = self.config.trainer.max_steps
        try:
            self.checkpointer.complete_newest(self.step)
            if self.preflight_enabled and self.step < last:
                self.preflight()
            done = f"the run is complete: step {self.step}/{last}; a larger trainer.max_steps continues it"
            self.log.say(done if self.step >= last else f"training from step {self.step} to {last} in {self.folder}")
            if self.validation_due():
                self.validate_and_keep_best()
                if self.step >= last:
                    self.best.require_written()
            with stop_signals(verbose=self.log.main) as request, self.profiler() as profiler_step:
                try:
                    self._train(request, last, profiler_step)
                finally:
                    self.stopped_by = self.stopped_by or request.signum  # a signal during the last save counts
        finally:
            self.checkpointer.close()
            self.log.close(failed=sys.exc_info()[0] is not None)
        return self.step >= last

    def _train(self, request: StopRequest, last: int, profiler_step: Callable[[], object]) -> None:
        batches = StepBatches(self.load_batches(lambda: bool(request.signum)), self.config.trainer.accumulate)
        first, timeout = self.step, self.step_timeout
        self.reset_timer()
        while self.step < last and not self.stopped_by:
            micro_batches, data_error = batches.take()
            goes_on = self.step + 1 < last and not request.signum
            result = self.train_step(micro_batches, request.signum, data_error, batches.fetch if goes_on else None)
            if self.step < last and self.spikes.consecutive_skips == 0:  # else the weights to save might be NaN
                self.stopped_by = result.status.stop
            if self.step == first + 1:  # kernels are compiled and chosen, and the first batch has been read
                distributed.shorten_timeout(timeout)
            with distributed.long_timeout(timeout) if self.stands_still() else nullcontext():
                self.checkpointer.advance(saving=result.status.saving)
                self.log_validate_save(result)
            profiler_step()
        if self.stopped_by:
            saved = "the same command resumes from there" if self.config.trainer.save_every else "nothing is saved"
            self.log.say(f"stopped by {signal.Signals(self.stopped_by).name} after step {self.step}; {saved}")

    @no_value_checks()
    def train_step(
        self,
        batches: Sequence[Batch],
        stop: int = 0,
        data_error: UserError | None = None,
        fetch_next: Callable[[], Sequence[Batch]] | None = None,
    ) -> StepResult:
        """One optimizer step over the micro-batches. The result is the same on all ranks.

        stop: a signal that this rank received, or 0. data_error: why the data loader of this rank failed; `batches` is
        then empty. fetch_next: reads the micro-batches of the next step, the first of which is copied to a GPU while it
        computes this one.
        A step that fails on one rank for lack of memory or readable files, or with a loss that is not finite, is
        skipped by all. Any other exception ends its rank alone: the others wait in their next collective until the
        launcher ends them, as torchrun does at once, or after `step_timeout`.
        Raises what count_failures raises, RanksDiffer, data_error (DataError on the other ranks) and Adversary.error.
        """
        step, metrics, phase = self.step, StepMetrics(), self.adversary.update_phase(self.step)
        lr = learning_rate(self.config.optim, step, self.config.trainer.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        torch.manual_seed(seed_of(self.config.run.seed, "step", step, self.rank))

        # Each rank by itself. A rank that has no readable clip, or runs out of memory, makes no other rank wait.
        out_of_memory = None
        readable = all(self.is_readable(batch) for batch in batches)
        if data_error is None and readable:
            out_of_memory = self.strategy.run_guarded(lambda: self.forward_backward(batches, phase, step, metrics))
        else:
            self.strategy.skip_local()
        adversary_error = self.adversary.sync_remaining(step, self.config.trainer.accumulate)
        if fetch_next is not None and self.inputs.ahead:
            for batch in fetch_next()[:1]:
                if self.is_readable(batch):
                    self.inputs.queue(batch)

        # One small all-reduce, after which all ranks make the same decisions. The host waits for the device here, and
        # for the gradient norms: what follows must read nothing else.
        errors = [error for batch in batches for error in batch.errors]
        self.log.errors(errors)
        status = self.sync_status(
            metrics,
            out_of_memory,
            adversary_error,
            unreadable=not readable,
            no_data=data_error is not None,
            stop=stop,
            read_errors=len(errors),
            saving=self.checkpointer.writing,
        )
        if status.adversary_error:
            self.checkpointer.save_then_raise(self.adversary.error(), self.step, self.spikes.consecutive_skips)
        averages: dict[str, float] = {}
        scalars: dict[str, float] = {}
        if status.finite:
            on_device: dict[str, Tensor] = {}
            if phase.model:
                self.strategy.average_gradients()
                self.proximal.add_gradient()
                on_device["grad_norm"] = self.strategy.clip_gradients(self.config.optim.grad_clip)
                on_device |= self.strategy.loss_scale()
            if phase.discriminator:
                on_device["discriminator"] = self.adversary.average_gradients()
            values = read(torch.stack([value.double() for value in on_device.values()]))
            scalars = dict(zip(on_device, values, strict=True))
            averages = {**status.metrics, **({"grad_norm": scalars["grad_norm"]} if phase.model else {})}
            averages["loss_max"] = status.worst
        grad_norm = averages.get("grad_norm")
        skips_overflow = self.strategy.skips_overflow(scalars.get("loss_scale"))
        decision = status.decide(None if skips_overflow else grad_norm, self.spikes if phase.model else None)

        applied, reason = decision.apply, decision.reason
        if applied and phase.model:
            self.optimizer.step()
            applied, averages["grad_norm"] = self.strategy.finish_step(grad_norm)
            if applied:
                self.ema.update(step)
            else:
                reason = f"gradient norm {averages['grad_norm']:g}"
        else:
            self.strategy.discard_gradients()
        if applied and phase.discriminator:
            self.adversary.step(scalars["discriminator"])
        elif not applied:
            self.adversary.reset_step()

        if decision.error is not None:  # on all ranks; a resumed run takes this step again
            self.checkpointer.save_then_raise(data_error or decision.error, self.step, self.spikes.consecutive_skips)
        self.step += 1
        if applied:
            self.checkpointer.mark_applied(self.step)
        else:
            self.log.warn(f"step {self.step} is skipped by all ranks: {reason}")
            if self.rank in decision.ranks:
                self.log_own_failure(batches, metrics, out_of_memory)
        result = StepResult(status, averages, applied, reason)
        self.count_failures(result, scalars.get("discriminator", math.nan) if phase.discriminator else None)
        return result

    def sync_status(
        self,
        metrics: StepMetrics,
        out_of_memory: str | None,
        adversary_error: Tensor | None = None,
        **columns: float,
    ) -> StepStatus:
        """All-reduce and read how the step went on each rank, and its metrics.

        out_of_memory: the error message, if memory ran out here. adversary_error: see Adversary.sync_remaining.
        columns: further ones of StatusTable.
        """
        names = [f"a gradient of {name}" for name in self.strategy.params_with_grad()]
        names += [f"the metric {name}" for name in metrics.names]
        on_device = {} if out_of_memory else metrics.losses()
        if adversary_error is not None:
            on_device["adversary_error"] = adversary_error
        means = {} if out_of_memory else metrics.means()
        return self.status_table.sync(on_device, names, means, out_of_memory=out_of_memory is not None, **columns)

    def log_own_failure(self, batches: Sequence[Batch], metrics: StepMetrics, out_of_memory: str | None) -> None:
        """Log, on any rank, the error message or the weighted losses for which a step is skipped, and its clips."""
        values = {} if out_of_memory else {name: value.item() for name, value in metrics.means().items()}
        values = {name: value for name, value in values.items() if not name.startswith(("loss/", "loss_mean/"))}
        not_finite = {name: value for name, value in values.items() if not math.isfinite(value)}
        losses = {name: value for name, value in values.items() if name.startswith("loss")}
        terms = ", ".join(f"{name} {value:g}" for name, value in (not_finite or losses).items())
        clips = ", ".join(name for batch in batches for name in self.clip_names(batch))
        cause = out_of_memory or terms or "no readable file"
        self.log.warn(f"step {self.step}, rank {self.rank}: {cause}; clips: {clips}", any_rank=True)

    def count_failures(self, result: StepResult, discriminator: float | None = None) -> None:
        """End the run, after saving, if a failure repeats too often. All ranks count the same.

        discriminator: norm of its gradient, NaN if there is none; None in a step that does not train it.
        Raises DataError for too many unreadable files, SpikeError for too many steps that are not finite, otherwise
        TooManyFailures.
        """
        status, grad_norm = result.status, result.metrics.get("grad_norm")
        skipped = self.spikes.consecutive_skips
        try:
            clips = self.data.schedule.batch_size_at(self.step - 1)
            self.read_errors.record(status.read_errors + clips, status.read_errors)
            if not result.applied and not self.strategy.can_skip_step():
                # The next step would repeat if the weights were not saved, but right after a resume they might be NaN.
                skipped = 0 if self.checkpointer.last_applied == self.step - 1 else skipped
                raise TooManyFailures(
                    f"step {self.step} failed ({result.reason}), and DeepSpeed cannot undo the backward passes of one "
                    "step; torchrun --max-restarts=N resumes by itself. If it happens again, raise trainer.accumulate "
                    "or lower data.frames.max, data.height and data.width for memory"
                )
            if not result.applied:
                self.spikes.check_limit(result.reason)
            if status.completed and discriminator is not None:
                if math.isfinite(discriminator):
                    self.discriminator_failures.reset()
                else:
                    self.discriminator_failures.record(status.failure() or f"gradient norm {discriminator:g}")
            if status.completed:
                self.failed_steps.reset()
            else:
                self.failed_steps.record(status.failure())
            if grad_norm is not None and grad_norm < MIN_GRAD_NORM:
                self.zero_gradient.record(f"loss {status.loss:g}")
            elif grad_norm is not None:
                self.zero_gradient.reset()
        except (DataError, TooManyFailures) as error:
            self.meter.add(result.metrics, applied=result.applied)
            self.checkpointer.save_then_raise(error, self.step, skipped)

    def profiler(self) -> AbstractContextManager[Callable[[], object]]:
        """Yields a function to call after every step; with debug=profile that of `profiled`, on the first rank."""
        if self.config.debug.mode != "profile" or self.rank > 0:
            return nullcontext(lambda: None)
        return profiled(self.folder, self.config.debug.steps)

    @property
    def step_timeout(self) -> timedelta:
        """How long a rank waits for another in a step, in which that one may wait for data."""
        data = self.config.data.timeout
        return STEP_TIMEOUT + timedelta(seconds=data) if data else distributed.LONG_TIMEOUT

    def stands_still(self) -> bool:
        """Whether a rank may validate or save now, while the others wait."""
        save = self.config.trainer.save_every
        saves = save and (self.step % save == 0 or self.checkpointer.due)
        return bool(self.validation_due() or saves or self.step == self.config.trainer.max_steps or self.stopped_by)

    def log_validate_save(self, result: StepResult) -> None:
        """Log, validate and save, when due."""
        trainer = self.config.trainer
        finished, stopped = self.step == trainer.max_steps, self.stopped_by > 0
        self.meter.add(result.metrics, applied=result.applied)
        self.log.advance()
        # A stop that is saved logs no means: those of the next line are over all of its steps, as without the stop.
        if self.step % trainer.log_every == 0 or finished or (stopped and not trainer.save_every):
            self.log.scalars(self.step_metrics() | self.perf_metrics(), self.step)
            self.reset_timer()
            if freed := release_idle_memory(self.compact_gib):
                self.log.say(f"released {freed:.2f} GiB of idle GPU memory")
        else:
            self.log.first_step(result.metrics, self.step)
        if self.validation_due() and not stopped:  # a stopped run has little time: it validates when it resumes
            self.validate_and_keep_best()
            self.reset_timer()
        self.checkpointer.save_if_due(
            self.step,
            applied=result.applied,
            not_finite=0 if self.spikes.all_finite else self.spikes.consecutive_skips,
            end=finished or stopped,
        )
        if finished:
            self.best.require_written()

    def step_metrics(self) -> dict[str, float]:
        """Means of the metrics since the last log line."""
        return self.meter.flush()

    def changed_clips_per_step(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        """Setting -> (there, here) of the clips per step of sources and buckets that a checkpoint had otherwise, with a
        warning: they follow from the number of ranks."""
        clips, file = self.data.clips_per_step(), checkpoint / state.META
        saved = read_json(file).get(CLIPS_PER_STEP, {}) if file.is_file() else clips  # a state file does not say it
        other = {name: (old, new) for name, (old, new) in state.changes(saved, clips).items() if old and new}
        if other:
            self.log.warn(
                "the buckets have other numbers of clips per step than the run had until now, since it has another "
                "number of ranks or data.batch_size: the next clips are not those that would have come then; fix "
                "data.buckets.clips_multiple for a run that changes its number of ranks"
            )
        return {f"clips per step of {name}": pair for name, pair in other.items()}

    def perf_metrics(self) -> dict[str, float]:
        """Learning rates, clips per second since the last log line, and peak memory of this process."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        schedule = self.data.schedule
        clips = schedule.clips_before(self.step) - schedule.clips_before(self._timed_from)
        rates = {f"lr/{g['part']}" if "part" in g else "lr": g["lr"] for g in self.optimizer.param_groups}
        perf = {**rates, "clips_per_second": clips / (time.perf_counter() - self._timer), "memory_gib": peak / 2**30}
        if cuda:
            perf["memory_idle_gib"] = idle_gib()
        return perf

    def reset_timer(self) -> None:
        self._timer, self._timed_from = time.perf_counter(), self.step

    # ---- validation

    @property
    @abstractmethod
    def better(self) -> Mapping[str, Better]:
        """Score of the validation -> which values are better."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Compute, log and return validation scores of the averaged weights."""

    def validation_due(self) -> bool:
        """Whether a validation belongs to this step and is not done yet."""
        every = self.config.validation.every
        if not every or self.best.validated == self.step:
            return False
        if self.step == 0:
            return self.config.validation.on_start
        return self.step % every == 0 or self.step == self.config.trainer.max_steps

    def validate_and_keep_best(self) -> None:
        """Validate, and write exports/best if the scores are the best so far."""
        scores = self.validate()
        self.best.validated = self.step
        if self.step:  # weights that are not trained count for no best
            self.checkpointer.export_best(self.best, scores, self.step, self.export)

    def validate_on_all_ranks(self, compute: Callable[[], T], memory_hint: str) -> T | None:
        """compute() with the averaged weights in eval mode; no collective may be in it.

        None, with a warning, on all ranks, if one of them runs out of memory or gets pixels that are not finite.
        """
        with eval_mode(self.network), self.ema.applied():
            result, error = self.catch_validation_error(compute, memory_hint)
        if distributed.all_ranks_ok(error is None, self.device):
            return result
        reason = error or "on another rank"
        self.log.warn(f"validation failed at step {self.step}: {reason}; it counts for no best checkpoint")
        return None

    @staticmethod
    def catch_validation_error(compute: Callable[[], T], memory_hint: str) -> tuple[T | None, str | None]:
        """compute() and None, or None and the error message, if memory runs out or pixels are not finite."""
        try:
            result, error = catch_out_of_memory(compute)
        except PixelError as raised:
            return None, str(raised)
        return result, error and f"{error}; {memory_hint}"


class StepBatches(Generic[Batch]):
    """The micro-batches of one step after another, `count` of each.

    batches: as Trainer.load_batches gives them; has as many as all steps take.
    """

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self.batches, self.count = batches, count
        self._fetched: tuple[list[Batch], UserError | None] | None = None

    def fetch(self) -> list[Batch]:
        """Read those of the next step, if they are not there yet, and return them; none if the data loader failed."""
        if self._fetched is None:
            try:
                self._fetched = [next(self.batches) for _ in range(self.count)], None
            except UserError as error:
                error.on_every_rank = False
                self._fetched = [], error
        return self._fetched[0]

    def take(self) -> tuple[list[Batch], UserError | None]:
        """Those of the next step; or none, and the error, if the data loader of this rank failed."""
        self.fetch()
        taken, self._fetched = self._fetched, None
        return taken


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step. One step is skipped, one warms up, then `steps` are recorded.

    Writes profile.json (for chrome://tracing or Perfetto) and profile.txt (operators by time) to `folder`.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def write(recorded: profile) -> None:
        recorded.export_chrome_trace(str(folder / "profile.json"))
        table = recorded.key_averages().table(sort_by=sort, row_limit=30, max_name_column_width=60)
        (folder / "profile.txt").write_text(table + "\n")

    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    ) as recorder:
        yield recorder.step

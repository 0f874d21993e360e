"""The training loop: a run is `fit`, one optimizer step is `train_step`."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from vae3d.adversarial.base import Adversary, UpdatePhase
from vae3d.data.clips import Unreadable
from vae3d.data.loader import TrainingData
from vae3d.data.media import DataError
from vae3d.errors import UserError
from vae3d.losses.objective import Objective
from vae3d.metrics import MetricSet
from vae3d.models.forward import attach_decoder
from vae3d.pixels import no_value_checks
from vae3d.seeding import seed_of
from vae3d.training.agreement import RanksDiffer
from vae3d.training.best import Best, keep_best, require_best
from vae3d.training.checkpointer import Saver, finish_newest, outputs, resume, save, step_outputs
from vae3d.training.data_parallel import Replicas
from vae3d.training.deepspeed import Zero
from vae3d.training.distillation import Distillation, StudentWithProjections
from vae3d.training.ema import Ema
from vae3d.training.freeze import set_mode, train_parts
from vae3d.training.loggers import Logger
from vae3d.training.memory import compact, idle_gib
from vae3d.training.metrics import StepMetrics, Window
from vae3d.training.optim import adamw_settings, rate_at
from vae3d.training.patience import FailureCounter, TooManyFailures, check_broken_share
from vae3d.training.preflight import preflight
from vae3d.training.profile import profiled
from vae3d.training.proximal import Proximal
from vae3d.training.runlog import RunLog
from vae3d.training.spike import SpikeError, SpikeGuard
from vae3d.training.step_status import StatusTable, StepStatus
from vae3d.training.stopping import StopRequest, stop_signals
from vae3d.training.vae_validation import metrics_due, report, validate_together
from vae3d.types import Clip, Reconstruction

if TYPE_CHECKING:
    from vae3d.config.schema import TrainConfig

NO_GRADIENT = 1e-12  # norm below which nothing is learned
LOGVAR = "logvar"  # the optimizer's group of Objective.logvar


class Trainer:
    """Trains `model` on `data` under `objective`, resuming from the newest checkpoint in `folder`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        adversary: Adversary,
        data: TrainingData,
        metrics: MetricSet,
        logger: Logger,
        distillation: Distillation | None = None,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.device, rank = accelerator.device, accelerator.process_index
        self.objective, self.adversary, self.data, self.metrics = objective, adversary, data, metrics
        self.network, self.distillation = self._under_autocast(model.to(self.device)), distillation

        groups = train_parts(model, config.stage.train)
        set_mode(model, config.stage.train)
        student = model if distillation is None else distillation.student(model, data.schedule.frames.all()[-1])
        self.projections = student.projections if isinstance(student, StudentWithProjections) else None
        if self.projections is not None:
            groups.append({"params": list(self.projections.parameters()), "part": "projections", "lr_scale": 1.0})
            student = self._under_autocast(student)
        if objective.logvar is not None:
            groups.append({"params": [objective.logvar], "part": LOGVAR, "lr_scale": config.loss.logvar_lr})
        self.ema = Ema(model, **asdict(config.trainer.ema))
        self.proximal = Proximal(model, config.optim.proximal)
        self.spikes = SpikeGuard(**asdict(config.trainer.spike), warn=lambda message: self.log.warn(message))
        self.best = Best(config.trainer.best, metrics.columns)
        self.window = Window()
        self.step = 0
        self.stopped_by = 0  # the signal that ended the run
        self.reads, self.broken_reads = 0, 0
        adversary.load(model, self.device, config.run.seed, rank)
        optimizer = torch.optim.AdamW(groups, fused=self._fuses(), **adamw_settings(config.optim))
        self.strategy = self._share_work(student, optimizer)
        self.ballot = StatusTable(rank, accelerator.num_processes, self.device)
        self._set_patience()
        self.data_changes: list[str] = []  # since the checkpoint that the run goes on from
        changed = resume(self)
        for group in self.optimizer.param_groups:  # a checkpoint's own came back with its moments
            group.update(adamw_settings(config.optim))
            if group["part"] == LOGVAR:
                group.update(weight_decay=0.0, lr_scale=config.loss.logvar_lr)
        self.log = RunLog(folder, logger, rank=rank, step=self.step, max_steps=config.trainer.max_steps)
        self.log.launch(self.step, asdict(config), changed, self.data_changes)
        for key, (old, new) in changed.items():
            self.log.say(f"{key} was {old} until step {self.step} and is {new} from here on")
        self.log.errors(data.errors)
        self.log.skipped_files(data.skipped_files)

    def _under_autocast(self, network: nn.Module) -> nn.Module:
        """The same network, whose forward turns autocast on by itself: DeepSpeed turns off what is on around it."""
        return self.accelerator.prepare_model(network, evaluation_mode=True)  # which leaves DDP out

    def _share_work(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> Replicas | Zero:
        """The strategy, whose `model` is what training calls: the student."""
        told, data = self.config.trainer.strategy, self.data.schedule
        if told.name == "replicated":
            return Replicas(self.accelerator, student, optimizer)
        batch = {"micro_batch": data.micro_batch, "accumulate": data.accumulate}
        return Zero(
            self.accelerator, student, optimizer, told.deepspeed, **batch, grad_clip=self.config.optim.grad_clip
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.strategy.optimizer

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after a signal (stop_signals); whether it was the last.

        Raises SaveError if the last checkpoint, or what is made of it, could not be written; SpikeError if the run ends
        on skipped steps; DataError, after saving, if no more clips come.
        """
        config, last = self.config, self.config.trainer.max_steps
        try:
            finish_newest(self, outputs(self))
            if config.trainer.robust.preflight and self.step < last:
                preflight(self)
            self.log.begin(self.step, last)
            profiling = config.debug.mode == "profile"
            recorder = profiled(self.folder, config.debug.steps) if profiling else nullcontext(lambda: None)
            with stop_signals(speak=self.log.main) as request, recorder as step_done:
                try:
                    self._train(request, last, step_done)
                finally:
                    self.stopped_by = self.stopped_by or request.signum  # which may have come during the last save
        except SpikeError as error:
            raise SpikeError(f"{error}{self.saver.way_back()}") from error
        finally:
            self.log.close()
        return self.step >= last

    def _train(self, request: StopRequest, last: int, step_done: Callable[[], None]) -> None:
        accumulate = self.config.trainer.accumulate
        clips = self.data.clips(self.step, last, lambda: bool(request.signum))
        self._tick, self._steps, self._frames = time.perf_counter(), 0, 0
        while self.step < last and not self.stopped_by:
            batch, error = _next_clips(clips, accumulate)
            values = self.train_step(batch, request.signum, error)
            self._steps, self._frames = self._steps + 1, self._frames + self.data.schedule.frames_at(self.step - 1)
            signum = int(values.pop("stop"))
            if self.step < last and self.spikes.skipped_in_row == 0:  # else wait: what is saved now might be ruined
                self.stopped_by = signum
            self._after_step(values)
            step_done()
        if self.stopped_by:
            saved = "the same command resumes from there" if self.config.trainer.save_every else "nothing is saved"
            self.log.say(f"stopped by {signal.Signals(self.stopped_by).name} after step {self.step}; {saved}")

    @no_value_checks()
    def train_step(
        self, clips: Sequence[Clip | Unreadable], stop: int = 0, data_error: UserError | None = None
    ) -> dict[str, float]:
        """One optimizer step over the micro-batches `clips`; returns metrics averaged over them and all ranks.

        Each rank runs its own part; an all-reduce of the status then decides for all whether the step is taken or
        skipped. stop: a signal that this rank was sent. data_error: why this rank has no clips and gets no more.
        """
        phase = self.adversary.update_phase(self.step)
        self._set_lr()
        torch.manual_seed(seed_of(self.config.run.seed, "step", self.step, self.accelerator.process_index))
        metrics, reason = StepMetrics(), None

        if any(isinstance(clip, Unreadable) for clip in clips):
            self.strategy.skip_local()
        else:
            reason = self.strategy.run_guarded(lambda: self.accumulate(clips, phase, metrics, self.step))
        self.adversary.sync_remaining(self.step, len(clips))
        try:
            status = self.vote(clips, metrics, reason, stop, data_error)
        except RanksDiffer as error:  # on all ranks
            self._abandon_step(error)
            raise
        if status.no_data:
            error = data_error or DataError(f"rank {', '.join(map(str, status.no_data))} has no more data")
            self._abandon_step(error)
            raise error
        values = metrics.averaged() | {"loss_max": status.worst} if status.complete else {}
        taken = self._update(phase, status, values)
        if not taken:
            self.adversary.reset_step()
        elif phase.discriminator:
            self.adversary.step()
        self.step += 1
        self.saver.taken = self.step if taken else self.saver.taken
        values["skipped"] = float(not taken)
        self._judge(status, values, reason)
        return {**values, "stop": float(status.stop)}

    def accumulate(self, clips: Sequence[Clip], phase: UpdatePhase, metrics: StepMetrics, step: int) -> None:
        """Forward and backward passes of this rank's micro-batches; their gradients add up."""
        for clip in clips:
            clip = clip.to(self.device)
            with torch.set_grad_enabled(phase.generator):
                clip, out = self._reconstruct(clip, step)

            if phase.generator:
                loss, terms = self.objective(clip, out, step)
                adversarial, more = self.adversary.generator_loss(clip, out, loss, step)
                self.strategy.backward((loss + adversarial) / len(clips))
                metrics.add({"loss": loss, **terms, **more})

            if phase.discriminator:
                loss, more = self.adversary.discriminator_loss(clip, out, step)
                (loss / len(clips)).backward()
                metrics.add({"loss_discriminator": loss, **more})

    def _reconstruct(self, clip: Clip, step: int) -> tuple[Clip, Reconstruction]:
        """The clip with its teacher's targets, if there is a teacher, and what the model makes of it."""
        noise = clip.generators(self.config.run.seed, self.device)
        how: dict[str, Any] = {"pixels": self.objective.needs_pixels, "generator": noise}
        how["noise"] = self.config.stage.latent_noise
        if self.distillation is not None:
            clip = self.distillation.compute_targets(clip)
            how |= {"latents": self.distillation.latents(clip, step), "encode": self.objective.needs_posterior}
        return clip, attach_decoder(self.strategy.model(clip.video, **how), self.network)

    def vote(
        self,
        clips: Sequence[Clip | Unreadable],
        metrics: StepMetrics,
        error: str | None,
        stop: int = 0,
        data_error: UserError | None = None,
    ) -> StepStatus:
        """Tell the other ranks how this one fared, and hear how they did. error: how its memory ran out."""
        errors = [error for clip in clips for error in clip.errors]
        self.log.errors(errors)
        sound = math.isfinite(metrics.worst("loss_discriminator"))
        return self.ballot.cast(
            loss=metrics.mean("loss"),
            worst=metrics.worst("loss") if sound else math.nan,
            out_of_memory=error is not None,
            unreadable=data_error is None and any(isinstance(clip, Unreadable) for clip in clips),
            no_data=data_error is not None,
            stop=stop,
            broken=len(errors),
            gradients=self.strategy.gradients(),
            with_gradient=self.strategy.with_gradient,
        )

    def _update(self, phase: UpdatePhase, status: StepStatus, values: dict[str, float]) -> bool:
        """Average the gradients and step, unless loss or gradient are unsound; whether it did.

        Writes the norm of the gradient before clipping into `values`.
        """
        averaged = sound = status.complete and status.finite
        if phase.generator and status.complete:
            norm = 0.0
            if averaged:
                self.strategy.average_gradients()
                self.proximal.add_gradient()
                norm = values["grad_norm"] = self.strategy.clip(self.config.optim.grad_clip)
            # fp16 gradients overflow in normal operation: the loss scaler skips those steps and learns from them. What
            # it no longer scales up did not overflow by scaling.
            scaler = self.accelerator.scaler
            learning = scaler is not None and scaler.get_scale() > 1
            sound = self.spikes.accept(status.loss, status.worst, 0.0 if learning else norm)
        if not sound:
            self.strategy.skip(unscaled=averaged and phase.generator)
            return False
        if phase.generator:
            sound = self.strategy.step()
            if sound:
                self.ema.update(self.step)
        return sound

    def _judge(self, status: StepStatus, values: dict[str, float], reason: str | None) -> None:
        """Stop the run, after saving, if an error repeats too often; all ranks count the same."""
        self.broken_reads += status.broken
        self.reads += status.broken + self.config.data.batch_size
        if status.out_of_memory and not self.strategy.can_skip_steps:
            self._leave(status)
        try:
            check_broken_share(self.reads, self.broken_reads, self.config.data.max_broken, self.folder)
            self._count_errors(status, values, reason)
        except DataError as error:
            self.reads = self.broken_reads = 0  # count afresh once the user has repaired the files
            self.window.add(values)
            self.saver.save_before(error, self.step, self.spikes.skipped_in_row)
            raise
        except TooManyFailures as error:
            self.window.add(values)
            self.saver.save_before(error, self.step, self.spikes.skipped_in_row)
            raise

    def _count_errors(self, status: StepStatus, values: dict[str, float], error: str | None) -> None:
        """Raises TooManyFailures."""
        if not status.complete:
            self.log.warn(f"step {self.step} is skipped by all ranks: {status.error()}{f': {error}' if error else ''}")
            self.unfinished.error(status.error())
        else:
            self.unfinished.reset()
        norm = values.get("grad_norm")
        if norm is not None and norm < NO_GRADIENT:
            self.zero_gradient.error(f"loss {status.loss:g}")
        elif norm is not None:  # a step that was skipped tells nothing
            self.zero_gradient.reset()

    def _abandon_step(self, error: UserError) -> None:
        """Undo the unfinished step, which a resumed run repeats, and save the finished ones."""
        self.strategy.skip(unscaled=False)
        self.adversary.reset_step()
        self.saver.save_before(error, self.step, self.spikes.skipped_in_row)

    def _leave(self, status: StepStatus) -> None:
        """Save, without the step that failed, and end: the strategy cannot take back what came of it."""
        self.log.warn(
            f"step {self.step} failed on some rank ({status.error()}), and DeepSpeed cannot forget half a step"
        )
        error = TooManyFailures(
            "stopped; torchrun --max-restarts=N goes on from the newest checkpoint by itself. If it comes back, "
            "raise trainer.accumulate or lower data.frames.max, data.height and data.width"
        )
        self.saver.save_before(error, self.step, self.spikes.skipped_in_row)
        raise error

    def _set_patience(self) -> None:
        robust = self.config.trainer.robust
        self.unfinished = FailureCounter(
            robust.max_consecutive_failures,
            "steps in a row could not be finished",
            "for memory raise trainer.accumulate or lower data.frames.max, data.height and data.width; for files look "
            f"at {self.folder}/data_errors.jsonl (trainer.robust.max_consecutive_failures is the limit)",
        )
        self.zero_gradient = FailureCounter(
            robust.zero_gradient,
            "steps in a row had no gradient at all",
            "the model learns nothing: are its outputs clamped, or the pixels in another range than the losses expect? "
            "(trainer.robust.zero_gradient is the limit)",
        )
        failures = FailureCounter(
            robust.save_failures,
            "checkpoints in a row could not be written",
            "the last complete one stays (trainer.robust.save_failures is the limit)",
        )
        self.saver = Saver(
            lambda: save(self),
            self.folder / "checkpoints",
            self.config.trainer.save_every,
            failures,
            warn=lambda message: self.log.warn(message),
        )

    def _fuses(self) -> bool:
        """Where DeepSpeed offloads, AdamW steps on the host."""
        return self.device.type == "cuda" and self.config.trainer.strategy.name == "replicated"

    def _set_lr(self) -> None:
        lr = rate_at(self.config.optim, self.step, self.config.trainer.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _after_step(self, values: dict[str, float]) -> None:
        """Whatever is due after a step: log, validate, save."""
        trainer, validation = self.config.trainer, self.config.validation
        finished, stopped = self.step == trainer.max_steps, self.stopped_by > 0
        self.window.add(values)
        self.log.advance()
        if self.step % trainer.log_every == 0 or finished or stopped:
            self.log.scalars(self.window.flush() | self._perf_metrics(), self.step)
            if freed := compact(trainer.robust.compact_gib):
                self.log.say(f"gave back {freed:.2f} GiB of GPU memory that lay idle")
        if validation.every and (self.step % validation.every == 0 or finished) and not stopped:
            keep_best(self, self.validate())
        ruined = 0 if self.spikes.finite_row else self.spikes.skipped_in_row
        self.saver.after_step(self.step, taken=not values["skipped"], ruined=ruined, end=finished or stopped)
        if finished:
            require_best(self)

    def save(self) -> None:
        """Write a checkpoint and what is made of it; see Saver.save."""
        self.saver.save(self.step)

    def step_outputs(self, step: int) -> list[Path]:
        """What is made of the checkpoint of a step, and goes with it."""
        return step_outputs(self, step)

    def _perf_metrics(self) -> dict[str, float]:
        """Learning rates, the proximal term, speed since the last log line, and peak memory of this process."""
        elapsed = time.perf_counter() - self._tick
        per_second = self.config.data.batch_size / elapsed
        speed = {"clips_per_second": self._steps * per_second, "frames_per_second": self._frames * per_second}
        self._tick, self._steps, self._frames = time.perf_counter(), 0, 0
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            **{f"lr/{group['part']}": group["lr"] for group in self.optimizer.param_groups},
            **({"prox": self.proximal.value().item()} if self.proximal.weight else {}),
            **speed,
            "memory_gib": peak / 2**30,
            **({"memory_idle_gib": idle_gib()} if cuda else {}),
        }

    def validate(self) -> dict[str, float]:
        """Score the held-out clips with the averaged weights; log the means and show some of the clips."""
        due = metrics_due(self)
        return report(self, due, validate_together(self, due))


def _next_clips(clips: Iterator[Clip | Unreadable], count: int) -> tuple[list[Clip | Unreadable], UserError | None]:
    """The micro-batches of a step; or, if the loader fails on this rank, placeholders and why."""
    try:
        return [next(clips) for _ in range(count)], None
    except UserError as error:
        error.on_every_rank = False
        return [Unreadable([])] * count, error

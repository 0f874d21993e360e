"""Training a diffusion model on latents: a run is `fit`, one optimizer step is `train_step`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae3d import distributed
from vae3d.data.media import DataError
from vae3d.diffusion.conditioning import drop_labels
from vae3d.diffusion.data import Batch, LatentData
from vae3d.diffusion.processes import QUARTILES, Process, quartile_sums, training_losses
from vae3d.diffusion.scale import check_latent_scale, measure
from vae3d.errors import UserError
from vae3d.pixels import no_value_checks
from vae3d.seeding import generator_of
from vae3d.training.agreement import RanksDiffer
from vae3d.training.checkpointer import Saver, finish_newest
from vae3d.training.data_parallel import Replicas
from vae3d.training.diffusion_saving import outputs, resume, save, step_outputs
from vae3d.training.diffusion_validation import validate
from vae3d.training.ema import Ema
from vae3d.training.loggers import Logger
from vae3d.training.metrics import StepMetrics, Window
from vae3d.training.optim import adamw_settings, rate_at
from vae3d.training.patience import FailureCounter, TooManyFailures, check_broken_share
from vae3d.training.runlog import RunLog
from vae3d.training.spike import SpikeError
from vae3d.training.step_status import StatusTable, StepStatus
from vae3d.training.stopping import StopRequest, stop_signals

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vae3d.config.diffusion import DiffusionConfig


class DiffusionTrainer:
    """Trains `network` to undo `process` on the latents of `data`, resuming from the newest checkpoint in `folder`.

    config: with all settings of network and process. vae: vae_metadata of the autoencoder, and where it is.
    hint: the command that mends latents of another scale.
    Raises LatentScaleError before the first step if the latents are not of mean 0 and deviation 1.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        folder: Path,
        accelerator: Accelerator,
        network: nn.Module,
        process: Process,
        data: LatentData,
        vae: dict[str, Any],
        logger: Logger,
        hint: str,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.device, self.seed = accelerator.device, config.run.seed
        self.network, self.process, self.data, self.vae = network.to(self.device), process, data, vae
        ema = asdict(config.trainer.ema)
        self.averages = {decay: Ema(self.network, decay, **ema) for decay in ema.pop("rates")}
        self.ema = next(iter(self.averages.values()))
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            fused=self.device.type == "cuda",
            **adamw_settings(config.optim),
        )
        self.replicas = Replicas(accelerator, self.network, optimizer)
        self.ballot = StatusTable(accelerator.process_index, accelerator.num_processes, self.device)
        self.window = Window()
        self.skipped = FailureCounter(
            config.trainer.max_consecutive_skips,
            "steps in a row were skipped",
            "lower optim.lr if losses are not finite, data.batch_size or raise trainer.accumulate for memory; files "
            f"that cannot be read are in {folder}/data_errors.jsonl (trainer.max_consecutive_skips is the limit)",
        )
        failures = FailureCounter(
            config.trainer.save_failures,
            "checkpoints in a row could not be written",
            "the last complete one stays (trainer.save_failures is the limit)",
        )
        self.saver = Saver(
            lambda: save(self),
            folder / "checkpoints",
            config.trainer.save_every,
            failures,
            warn=lambda message: self.log.warn(message),
        )
        self.step, self.reads, self.broken_reads = 0, 0, 0
        self.stopped_by = 0  # the signal that ended the run
        self.unsound = 0  # steps in a row whose loss or gradient was not finite
        self._tick, self._steps = time.perf_counter(), 0  # since the last log line
        self.scale: dict[str, Any] = {}
        self.shown = False  # held-out clips, beside samples
        self.data_changes: list[str] = []  # since the checkpoint that the run goes on from
        changed, scale = resume(self), None
        for group in self.replicas.optimizer.param_groups:  # a checkpoint's own came back with its moments
            group.update(adamw_settings(config.optim))
        if not self.scale:
            scale = measure(data, config.trainer.scale_samples, self.device)
            check_latent_scale(scale, hint)
            self.scale = scale.as_dict()
        self.held_out = [(data.latents(batch, self.device), batch) for batch in data.held_out]
        parts = distributed.gather_to_main([z.cpu() for z, _ in self.held_out])
        self.real = [z for part in parts for z in part]  # of all ranks, on the first, which compares samples with them
        rank, last = accelerator.process_index, config.trainer.max_steps
        self.log = RunLog(folder, logger, rank=rank, step=self.step, max_steps=last)
        self.log.launch(self.step, asdict(config), changed, self.data_changes)
        for key, (old, new) in changed.items():
            self.log.say(f"{key} was {old} until step {self.step} and is {new} from here on")
        self.log.errors(data.errors)
        if scale is not None:
            self.log.say(str(scale))

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after a signal (stop_signals); whether it was the last.

        Raises SaveError if the last checkpoint, or its export, could not be written; SpikeError if the run ends on
        skipped steps; DataError, after saving, if no more batches come.
        """
        last = self.config.trainer.max_steps
        try:
            finish_newest(self, outputs(self))
            self.log.begin(self.step, last)
            with stop_signals(speak=self.log.main) as request:
                try:
                    self._train(request, last)
                finally:
                    self.stopped_by = self.stopped_by or request.signum  # which may have come during the last save
        except SpikeError as error:
            raise SpikeError(f"{error}{self.saver.way_back()}") from error
        finally:
            self.log.close()
        return self.step >= last

    def _train(self, request: StopRequest, last: int) -> None:
        accumulate = self.config.trainer.accumulate
        batches = self.data.batches(self.step, last, lambda: bool(request.signum))
        self._tick, self._steps = time.perf_counter(), 0
        while self.step < last and not self.stopped_by:
            batch, error = _next_batches(batches, accumulate)
            values = self.train_step(batch, request.signum, error)
            signum = int(values.pop("stop"))
            if self.step < last and not self.unsound:  # else wait: what is saved now might be ruined
                self.stopped_by = signum
            self._after_step(values)
        if self.stopped_by:
            saved = "the same command resumes from there" if self.config.trainer.save_every else "nothing is saved"
            self.log.say(f"stopped by {signal.Signals(self.stopped_by).name} after step {self.step}; {saved}")

    @no_value_checks()
    def train_step(
        self, batches: Sequence[Batch], stop: int = 0, data_error: UserError | None = None
    ) -> dict[str, float]:
        """One optimizer step over micro-batches; returns metrics averaged over them and all ranks.

        Each rank runs its own part; an all-reduce of the status then decides for all whether the step is taken or
        skipped. stop: a signal that this rank was sent. data_error: why this rank has no batches and gets no more.
        """
        self._set_lr()
        metrics, reason = StepMetrics(), None
        if any(batch.values is None for batch in batches):
            self.replicas.skip_local()
        else:
            reason = self.replicas.run_guarded(lambda: self.accumulate(batches, metrics))
        try:
            status = self._vote(batches, metrics, reason, stop, data_error)
        except RanksDiffer as error:  # on all ranks
            self.saver.save_before(error, self.step, self.unsound)
            raise
        if status.no_data:
            error = data_error or DataError(f"rank {', '.join(map(str, status.no_data))} has no more data")
            self.saver.save_before(error, self.step, self.unsound)
            raise error
        values = metrics.averaged() if status.complete else {}
        if status.complete and status.finite:
            self.replicas.average_gradients()
            values["grad_norm"] = self.replicas.clip(self.config.optim.grad_clip)
        taken = math.isfinite(values.get("grad_norm", math.nan))
        if taken:
            self.replicas.step()
            for average in self.averages.values():
                average.update(self.step)
        else:
            self.replicas.skip(unscaled=False)
        self.step += 1
        if taken:
            self.unsound, self.saver.taken = 0, self.step
        else:
            self.unsound += status.complete
        values["skipped"] = float(not taken)
        self._judge(status, values, reason)
        return {**values, "stop": float(status.stop)}

    def accumulate(self, batches: Sequence[Batch], metrics: StepMetrics) -> None:
        """Forward and backward passes of this rank's micro-batches; their gradients add up."""
        for batch in batches:
            z = self.data.latents(batch, self.device)  # [B, C, t, h, w], of mean 0 and deviation 1
            noise = [self._generator(position) for position in batch.positions]
            labels = self._labels(batch, noise)
            with self.accelerator.autocast():
                losses = training_losses(self.network, self.process, z, noise, labels)
            loss = losses["loss"].mean()
            self.replicas.backward(loss / len(batches))
            terms = {f"loss/{name}": losses[name].mean() for name in ("mse", "vlb") if name in losses}
            metrics.add({"loss": loss, **terms, **_by_quartile(losses)})

    def _generator(self, position: int) -> torch.Generator:
        """For the time, the noise and the label's dropout of a clip: a pure function of (seed, step, position)."""
        return generator_of(self.seed, self.step, position, "diffusion", device=self.device)

    def _labels(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor | None:
        if not self.network.num_classes:
            return None
        return drop_labels(batch.labels, self.config.label_dropout, self.network.num_classes, generators)

    def _vote(
        self,
        batches: Sequence[Batch],
        metrics: StepMetrics,
        error: str | None,
        stop: int,
        data_error: UserError | None,
    ) -> StepStatus:
        errors = [error for batch in batches for error in batch.errors]
        self.log.errors(errors)
        return self.ballot.cast(
            loss=metrics.mean("loss"),
            worst=metrics.worst("loss"),
            out_of_memory=error is not None,
            unreadable=data_error is None and any(batch.values is None for batch in batches),
            no_data=data_error is not None,
            stop=stop,
            broken=len(errors),
            gradients=self.replicas.gradients(),
            with_gradient=self.replicas.with_gradient,
        )

    def _judge(self, status: StepStatus, values: dict[str, float], reason: str | None) -> None:
        """Stop the run, after saving, if an error repeats too often; all ranks count the same."""
        self.broken_reads += status.broken
        self.reads += status.broken + self.config.data.batch_size
        try:
            check_broken_share(self.reads, self.broken_reads, self.config.data.max_broken, self.folder)
            self._count_skipped(status, bool(values["skipped"]), reason)
        except DataError as error:
            self.reads = self.broken_reads = 0  # count afresh once the user has repaired the files
            self.window.add(values)
            self.saver.save_before(error, self.step, self.unsound)
            raise
        except TooManyFailures as error:
            self.window.add(values)
            self.saver.save_before(error, self.step, self.unsound)
            raise

    def _count_skipped(self, status: StepStatus, skipped: bool, error: str | None) -> None:
        """Raises TooManyFailures."""
        if not skipped:
            self.skipped.reset()
            return
        why = status.error() or f"loss {status.loss:g} or its gradient is not finite"
        self.log.warn(f"step {self.step} is skipped by all ranks: {why}{f': {error}' if error else ''}")
        self.skipped.error(why)

    def _set_lr(self) -> None:
        lr = rate_at(self.config.optim, self.step, self.config.trainer.max_steps)
        for group in self.replicas.optimizer.param_groups:
            group["lr"] = lr

    def _after_step(self, values: dict[str, float]) -> None:
        """Whatever is due after a step: log, validate, save."""
        trainer, every = self.config.trainer, self.config.validation.every
        finished, stopped = self.step == trainer.max_steps, self.stopped_by > 0
        self.window.add(values)
        self.log.advance()
        self._steps += 1
        if self.step % trainer.log_every == 0 or finished or stopped:
            self.log.scalars(with_quartiles(self.window.flush()) | self._perf_metrics(), self.step)
        if every and (self.step % every == 0 or finished) and not stopped:
            validate(self)
            self._tick, self._steps = time.perf_counter(), 0
        end = finished or stopped
        self.saver.after_step(self.step, taken=not values["skipped"], ruined=self.unsound, end=end)

    def step_outputs(self, step: int) -> list[Path]:
        """What is made of the checkpoint of a step, and goes with it."""
        return step_outputs(self.folder, step)

    def _perf_metrics(self) -> dict[str, float]:
        """Learning rate, and speed since the last log line."""
        speed = self._steps * self.config.data.batch_size / (time.perf_counter() - self._tick)
        self._tick, self._steps = time.perf_counter(), 0
        return {"lr": self.replicas.optimizer.param_groups[0]["lr"], "samples_per_second": speed}

    def vae_facts(self) -> dict[str, Any]:
        """What a checkpoint of another autoencoder would not share."""
        return {name: self.vae[name] for name in ("encoder", "latents_mean", "latents_std")}

    def export_facts(self) -> dict[str, Any]:
        """What sampling must know beside the weights."""
        return {
            "step": self.step,
            "network": self.network.config,
            "process": self.config.process,
            "latent_shape": list(self.data.latent_shape),
            "size": list(self.data.size),
            "classes": self.data.classes,
            "trained_classes": self.data.trained_classes,
            "label_dropout": self.config.label_dropout,
            "vae": self.vae,
            "latents": self.scale,
        }


def _next_batches(batches: Iterator[Batch], count: int) -> tuple[list[Batch], UserError | None]:
    """The micro-batches of a step; or, if the loader fails on this rank, placeholders and why."""
    try:
        return [next(batches) for _ in range(count)], None
    except UserError as error:
        error.on_every_rank = False
        return [Batch(None, torch.empty(0), [], [])] * count, error


def _by_quartile(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum and count of the squared errors in each quarter of the times: they add up over steps and ranks."""
    sums = quartile_sums(losses["mse"], losses["t_normalised"])
    return {f"{what}_q{q}": sums[q, i] for q in range(QUARTILES) for i, what in enumerate(("sum", "count"))}


def with_quartiles(values: dict[str, float]) -> dict[str, float]:
    """Sums and counts as loss_q0..loss_q3, without those of which there were none."""
    kept = {name: value for name, value in values.items() if not name.startswith(("sum_q", "count_q"))}
    for q in range(QUARTILES):
        if values.get(f"count_q{q}"):
            kept[f"loss_q{q}"] = values[f"sum_q{q}"] / values[f"count_q{q}"]
    return kept

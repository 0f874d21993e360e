"""Training a diffusion model on latents: a run is `fit`, one optimizer step is `train_step`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae3d import ranks
from vae3d.diffusion.conditioning import drop_labels
from vae3d.diffusion.data import Batch, LatentData
from vae3d.diffusion.processes import QUARTILES, Process, quartile_sums, training_losses
from vae3d.diffusion.saving import resume, save
from vae3d.diffusion.scale import measure, refuse_other_scale
from vae3d.diffusion.validation import validate
from vae3d.engine.ema import Ema
from vae3d.engine.loggers import Logger
from vae3d.engine.metrics import StepMetrics, Window
from vae3d.engine.optim import adamw_settings, rate_at
from vae3d.engine.patience import Patience, SavePatience, refuse_many_broken
from vae3d.engine.replicas import Replicas
from vae3d.engine.runlog import RunLog
from vae3d.engine.stopping import on_sigterm
from vae3d.engine.verdict import Ballot, Verdict
from vae3d.pixels import no_value_checks
from vae3d.seeding import generator_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vae3d.diffusion_config import DiffusionConfig


class DiffusionTrainer:
    """Trains `network` to undo `process` on the latents of `data`, resuming from the newest checkpoint in `folder`.

    config: with all settings of network and process. vae: vae_facts of the autoencoder, and where it is.
    remedy: the command that mends latents of another scale.
    Raises ScaleRefused before the first step if the latents are not of mean 0 and deviation 1.
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
        remedy: str,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.device, self.seed = accelerator.device, config.run.seed
        self.network, self.process, self.data, self.vae = network.to(self.device), process, data, vae
        ema = asdict(config.trainer.ema)
        self.averages = {decay: Ema(self.network, decay, **ema) for decay in ema.pop("decays")}
        self.ema = next(iter(self.averages.values()))
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            fused=self.device.type == "cuda",
            **adamw_settings(config.optim),
        )
        self.replicas = Replicas(accelerator, self.network, optimizer)
        self.ballot = Ballot(accelerator.process_index, accelerator.num_processes, self.device)
        self.window = Window()
        self.skipped = Patience(
            config.trainer.patience,
            "steps in a row were skipped",
            "lower optim.lr if losses are not finite, data.batch_size or raise trainer.accumulate for memory; files "
            f"that cannot be read are in {folder}/faults.jsonl (trainer.patience is the limit)",
        )
        self._unsaved = SavePatience(config.trainer.save_failures, "trainer.save_failures")
        self.step, self.reads, self.broken_reads = 0, 0, 0
        self._tick, self._steps = time.perf_counter(), 0  # since the last log line
        self.scale: dict[str, Any] = {}
        self.shown = False  # held-out clips, beside samples
        changed, scale = resume(self), None
        for group in self.replicas.optimizer.param_groups:  # a checkpoint's own came back with its moments
            group.update(adamw_settings(config.optim))
        if not self.scale:
            scale = measure(data, config.trainer.scale_samples, self.device)
            refuse_other_scale(scale, remedy)
            self.scale = scale.facts()
        self.held_out = [(data.latents(batch, self.device), batch) for batch in data.held_out]
        parts = ranks.gathered([z.cpu() for z, _ in self.held_out])
        self.real = [z for part in parts for z in part]  # of all ranks, on the first, which compares samples with them
        rank, last = accelerator.process_index, config.trainer.max_steps
        self.log = RunLog(folder, logger, rank=rank, step=self.step, max_steps=last)
        self.log.launch(self.step, asdict(config), changed)
        for key, (old, new) in changed.items():
            self.log.say(f"{key} was {old} until step {self.step} and is {new} from here on")
        self.log.faults(data.faults)
        if scale is not None:
            self.log.say(str(scale))

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after SIGTERM; whether it was the last step."""
        trainer = self.config.trainer
        self.log.begin(self.step, trainer.max_steps)
        batches, stopped = self.data.batches(self.step, trainer.max_steps), False
        self._tick, self._steps = time.perf_counter(), 0
        with on_sigterm() as stop:
            while self.step < trainer.max_steps and not stopped:
                values = self.train_step([next(batches) for _ in range(trainer.accumulate)], stop.asked)
                stopped = values.pop("stop") > 0
                self._after_step(values, stopped)
        if stopped:
            saved = "the same command goes on from there" if trainer.save_every else "nothing is saved"
            self.log.say(f"stopped by SIGTERM after step {self.step}; {saved}")
        self.log.close()
        return not stopped

    @no_value_checks()
    def train_step(self, batches: Sequence[Batch], stop: bool = False) -> dict[str, float]:
        """One optimizer step over micro-batches; returns metrics averaged over them and all ranks.

        Every rank tries its own part; then all hear how it went everywhere, and take the step together or skip it
        together.
        """
        self._set_lr()
        metrics, fault = StepMetrics(), None
        if any(batch.values is None for batch in batches):
            self.replicas.abstain()
        else:
            fault = self.replicas.attempt(lambda: self.accumulate(batches, metrics))
        verdict = self._vote(batches, metrics, fault, stop)
        values = metrics.averaged() if verdict.complete else {}
        if verdict.complete and verdict.finite:
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
        self._judge(verdict, taken, fault)
        return {**values, "skipped": float(not taken), "stop": float(verdict.stop)}

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

    def _vote(self, batches: Sequence[Batch], metrics: StepMetrics, fault: str | None, stop: bool) -> Verdict:
        faults = [fault for batch in batches for fault in batch.faults]
        self.log.faults(faults)
        return self.ballot.cast(
            loss=metrics.mean("loss"),
            worst=metrics.worst("loss"),
            out_of_memory=fault is not None,
            unreadable=any(batch.values is None for batch in batches),
            stop=stop,
            broken=len(faults),
            gradients=self.replicas.gradients(),
        )

    def _judge(self, verdict: Verdict, taken: bool, fault: str | None) -> None:
        """Stop the run where a fault has come back too often; every rank counts the same."""
        self.broken_reads += verdict.broken
        self.reads += verdict.broken + self.config.data.batch_size
        refuse_many_broken(self.reads, self.broken_reads, self.config.data.max_broken, self.folder)
        if taken:
            self.skipped.went_well()
            return
        why = verdict.fault() or f"loss {verdict.loss:g} or its gradient is not finite"
        self.log.warn(f"step {self.step} is skipped by all ranks: {why}{f': {fault}' if fault else ''}")
        self.skipped.fault(why)

    def _set_lr(self) -> None:
        lr = rate_at(self.config.optim, self.step, self.config.trainer.max_steps)
        for group in self.replicas.optimizer.param_groups:
            group["lr"] = lr

    def _after_step(self, values: dict[str, float], stopped: bool) -> None:
        """Whatever is due after a step: log, validate, save."""
        trainer, every = self.config.trainer, self.config.validation.every
        finished = self.step == trainer.max_steps
        self.window.add(values)
        self.log.advance()
        self._steps += 1
        if self.step % trainer.log_every == 0 or finished or stopped:
            self.log.scalars(with_quartiles(self.window.flush()) | self._gauges(), self.step)
        if every and (self.step % every == 0 or finished) and not stopped:
            validate(self)
            self._tick, self._steps = time.perf_counter(), 0
        if trainer.save_every and (self.step % trainer.save_every == 0 or finished or stopped):
            self._unsaved.heed(save(self), self.log.warn)

    def _gauges(self) -> dict[str, float]:
        """Learning rate, and speed since the last log line."""
        speed = self._steps * self.config.data.batch_size / (time.perf_counter() - self._tick)
        self._tick, self._steps = time.perf_counter(), 0
        return {"lr": self.replicas.optimizer.param_groups[0]["lr"], "samples_per_second": speed}

    def vae_facts(self) -> dict[str, Any]:
        """What a checkpoint of another autoencoder would not share."""
        return {name: self.vae[name] for name in ("encoder", "shift", "scale")}

    def export_facts(self) -> dict[str, Any]:
        """What sampling must know beside the weights."""
        return {
            "step": self.step,
            "network": self.network.config,
            "process": self.config.process,
            "latent_shape": list(self.data.latent_shape),
            "size": list(self.data.size),
            "classes": self.data.classes,
            "known": self.data.known,
            "label_dropout": self.config.label_dropout,
            "vae": self.vae,
            "latents": self.scale,
        }


def _by_quartile(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum and count of the squared errors in each quarter of the times: they add up over steps and ranks."""
    sums = quartile_sums(losses["mse"], losses["level"])
    return {f"{what}_q{q}": sums[q, i] for q in range(QUARTILES) for i, what in enumerate(("sum", "count"))}


def with_quartiles(values: dict[str, float]) -> dict[str, float]:
    """Sums and counts as loss_q0..loss_q3, without those of which there were none."""
    kept = {name: value for name, value in values.items() if not name.startswith(("sum_q", "count_q"))}
    for q in range(QUARTILES):
        if values.get(f"count_q{q}"):
            kept[f"loss_q{q}"] = values[f"sum_q{q}"] / values[f"count_q{q}"]
    return kept

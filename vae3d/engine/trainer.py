"""The training loop: a run is `fit`, one optimizer step is `train_step`."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from vae3d.adversarial.base import Adversary, Turn
from vae3d.data.clips import Unreadable
from vae3d.data.loader import TrainingData
from vae3d.engine.best import Best, keep_best
from vae3d.engine.distillation import Distillation, Pupil
from vae3d.engine.ema import Ema
from vae3d.engine.freeze import set_mode, train_parts
from vae3d.engine.loggers import Logger
from vae3d.engine.memory import compact, idle_gib
from vae3d.engine.metrics import StepMetrics, Window
from vae3d.engine.optim import adamw_settings, rate_at
from vae3d.engine.patience import LostPatience, Patience, SavePatience, refuse_many_broken
from vae3d.engine.profile import profiled
from vae3d.engine.proximal import Proximal
from vae3d.engine.rehearsal import rehearse
from vae3d.engine.replicas import Replicas
from vae3d.engine.runlog import RunLog
from vae3d.engine.saving import resume, save
from vae3d.engine.spike import SpikeGuard
from vae3d.engine.stopping import on_sigterm
from vae3d.engine.validation import metrics_due, report, validate_together
from vae3d.engine.verdict import Ballot, Verdict
from vae3d.engine.zero import Zero
from vae3d.losses.objective import Objective
from vae3d.metrics import MetricSet
from vae3d.models.base import with_decoder
from vae3d.pixels import no_value_checks
from vae3d.seeding import seed_of
from vae3d.types import Clip, Reconstruction

if TYPE_CHECKING:
    from vae3d.config import TrainConfig

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
        pupil = model if distillation is None else distillation.pupil(model, data.plan.frames.all()[-1])
        self.projections = pupil.projections if isinstance(pupil, Pupil) else None
        if self.projections is not None:
            groups.append({"params": list(self.projections.parameters()), "part": "projections", "lr_scale": 1.0})
            pupil = self._under_autocast(pupil)
        if objective.logvar is not None:
            groups.append({"params": [objective.logvar], "part": LOGVAR, "lr_scale": config.loss.logvar_lr})
        self.ema = Ema(model, **asdict(config.trainer.ema))
        self.proximal = Proximal(model, config.optim.proximal)
        self.spikes = SpikeGuard(**asdict(config.trainer.spike), warn=lambda message: self.log.warn(message))
        self.best = Best(config.trainer.best, metrics.columns)
        self.window = Window()
        self.step = 0
        self.reads, self.broken_reads = 0, 0
        adversary.load(model, self.device, config.run.seed, rank)
        optimizer = torch.optim.AdamW(groups, fused=self._fuses(), **adamw_settings(config.optim))
        self.strategy = self._share_work(pupil, optimizer)
        self.ballot = Ballot(rank, accelerator.num_processes, self.device)
        self._set_patience()
        changed = resume(self)
        for group in self.optimizer.param_groups:  # a checkpoint's own came back with its moments
            group.update(adamw_settings(config.optim))
            if group["part"] == LOGVAR:
                group.update(weight_decay=0.0, lr_scale=config.loss.logvar_lr)
        self.log = RunLog(folder, logger, rank=rank, step=self.step, max_steps=config.trainer.max_steps)
        self.log.launch(self.step, asdict(config), changed)
        for key, (old, new) in changed.items():
            self.log.say(f"{key} was {old} until step {self.step} and is {new} from here on")
        self.log.faults(data.faults)
        self.log.left_out(data.left_out)

    def _under_autocast(self, network: nn.Module) -> nn.Module:
        """The same network, whose forward turns autocast on by itself: DeepSpeed turns off what is on around it."""
        return self.accelerator.prepare_model(network, evaluation_mode=True)  # which leaves DDP out

    def _share_work(self, pupil: nn.Module, optimizer: torch.optim.Optimizer) -> Replicas | Zero:
        """The strategy, whose `model` is what training calls: the pupil."""
        told, data = self.config.trainer.strategy, self.data.plan
        if told.name == "ddp":
            return Replicas(self.accelerator, pupil, optimizer)
        batch = {"micro_batch": data.micro_batch, "accumulate": data.accumulate}
        return Zero(self.accelerator, pupil, optimizer, told.deepspeed, **batch, grad_clip=self.config.optim.grad_clip)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.strategy.optimizer

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after SIGTERM; whether it was the last step."""
        config, last = self.config, self.config.trainer.max_steps
        if config.trainer.robust.rehearse and self.step < last:
            rehearse(self)
        self.log.begin(self.step, last)
        profiling = config.debug.mode == "profile"
        recorder = profiled(self.folder, config.debug.steps) if profiling else nullcontext(lambda: None)
        clips = self.data.clips(self.step, last)
        stopped = False
        self._tick, self._steps, self._frames = time.perf_counter(), 0, 0
        with on_sigterm() as stop, recorder as step_done:
            while self.step < last and not stopped:
                batch = [next(clips) for _ in range(config.trainer.accumulate)]
                values = self.train_step(batch, stop.asked)
                self._steps, self._frames = self._steps + 1, self._frames + self.data.plan.frames_at(self.step - 1)
                stopped = values.pop("stop") > 0
                self._after_step(values, stopped)
                step_done()
        if stopped:
            saved = "the same command goes on from there" if config.trainer.save_every else "nothing is saved"
            self.log.say(f"stopped by SIGTERM after step {self.step}; {saved}")
        self.log.close()
        return not stopped

    @no_value_checks()
    def train_step(self, clips: Sequence[Clip | Unreadable], stop: bool = False) -> dict[str, float]:
        """One optimizer step over the micro-batches `clips`; returns metrics averaged over them and all ranks.

        Every rank tries its own part; then all hear how it went everywhere, and take the step together or skip it
        together.
        """
        turn = self.adversary.turn(self.step)
        self._set_lr()
        torch.manual_seed(seed_of(self.config.run.seed, "step", self.step, self.accelerator.process_index))
        metrics, fault = StepMetrics(), None

        if any(isinstance(clip, Unreadable) for clip in clips):
            self.strategy.abstain()
        else:
            fault = self.strategy.attempt(lambda: self.accumulate(clips, turn, metrics, self.step))
        self.adversary.settle(self.step, len(clips))
        verdict = self.vote(clips, metrics, fault, stop)
        values = metrics.averaged() | {"loss_max": verdict.worst} if verdict.complete else {}
        taken = self._update(turn, verdict, values)
        if not taken:
            self.adversary.discard()
        elif turn.discriminator:
            self.adversary.step()
        self.step += 1
        self._judge(verdict, values, fault)
        return {**values, "skipped": float(not taken), "stop": float(verdict.stop)}

    def accumulate(self, clips: Sequence[Clip], turn: Turn, metrics: StepMetrics, step: int) -> None:
        """Forward and backward passes of this rank's micro-batches; their gradients add up."""
        for clip in clips:
            clip = clip.to(self.device)
            with torch.set_grad_enabled(turn.generator):
                clip, out = self._reconstruct(clip, step)

            if turn.generator:
                loss, terms = self.objective(clip, out, step)
                adversarial, more = self.adversary.generator_loss(clip, out, loss, step)
                self.strategy.backward((loss + adversarial) / len(clips))
                metrics.add({"loss": loss, **terms, **more})

            if turn.discriminator:
                loss, more = self.adversary.discriminator_loss(clip, out, step)
                (loss / len(clips)).backward()
                metrics.add({"loss_discriminator": loss, **more})

    def _reconstruct(self, clip: Clip, step: int) -> tuple[Clip, Reconstruction]:
        """The clip with its teacher's lesson, if there is a teacher, and what the model makes of it."""
        noise = clip.generators(self.config.run.seed, self.device)
        how: dict[str, Any] = {"pixels": self.objective.needs_pixels, "generator": noise}
        how["noise"] = self.config.stage.latent_noise
        if self.distillation is not None:
            clip = self.distillation.teach(clip)
            how |= {"latents": self.distillation.latents(clip, step), "encode": self.objective.needs_posterior}
        return clip, with_decoder(self.strategy.model(clip.video, **how), self.network)

    def vote(self, clips: Sequence[Clip | Unreadable], metrics: StepMetrics, fault: str | None, stop: bool) -> Verdict:
        """Tell the other ranks how this one fared, and hear how they did. fault: how its memory ran out."""
        faults = [fault for clip in clips for fault in clip.faults]
        self.log.faults(faults)
        sound = math.isfinite(metrics.worst("loss_discriminator"))
        return self.ballot.cast(
            loss=metrics.mean("loss"),
            worst=metrics.worst("loss") if sound else math.nan,
            out_of_memory=fault is not None,
            unreadable=any(isinstance(clip, Unreadable) for clip in clips),
            stop=stop,
            broken=len(faults),
            gradients=self.strategy.gradients(),
        )

    def _update(self, turn: Turn, verdict: Verdict, values: dict[str, float]) -> bool:
        """Average the gradients and step, unless loss or gradient are unsound; whether it did.

        Writes the norm of the gradient before clipping into `values`.
        """
        averaged = sound = verdict.complete and verdict.finite
        if turn.generator and verdict.complete:
            norm = 0.0
            if averaged:
                self.strategy.average_gradients()
                self.proximal.add_gradient()
                norm = values["grad_norm"] = self.strategy.clip(self.config.optim.grad_clip)
            # fp16 gradients overflow in normal operation: the loss scaler skips those steps and learns from them. What
            # it no longer scales up did not overflow by scaling.
            scaler = self.accelerator.scaler
            learning = scaler is not None and scaler.get_scale() > 1
            sound = self.spikes.accept(verdict.loss, verdict.worst, 0.0 if learning else norm)
        if not sound:
            self.strategy.skip(unscaled=averaged and turn.generator)
            return False
        if turn.generator:
            sound = self.strategy.step()
            if sound:
                self.ema.update(self.step)
        return sound

    def _judge(self, verdict: Verdict, values: dict[str, float], fault: str | None) -> None:
        """Stop the run where a fault has come back too often; every rank counts the same."""
        self.broken_reads += verdict.broken
        self.reads += verdict.broken + self.config.data.batch_size
        refuse_many_broken(self.reads, self.broken_reads, self.config.data.max_broken, self.folder)
        if verdict.out_of_memory and not self.strategy.recovers:
            self._leave(verdict)
        if not verdict.complete:
            self.log.warn(f"step {self.step} is skipped by all ranks: {verdict.fault()}{f': {fault}' if fault else ''}")
            self.unfinished.fault(verdict.fault())
        else:
            self.unfinished.went_well()
        norm = values.get("grad_norm")
        if norm is not None and norm < NO_GRADIENT:
            self.zero_gradient.fault(f"loss {verdict.loss:g}")
        elif norm is not None:  # a step that was skipped tells nothing
            self.zero_gradient.went_well()

    def _leave(self, verdict: Verdict) -> None:
        """Save, without the step that failed, and end: the strategy cannot take back what came of it."""
        self.log.warn(
            f"step {self.step} failed on some rank ({verdict.fault()}), and DeepSpeed cannot forget half a step"
        )
        fault = save(self)
        saved = f"saved after step {self.step}" if fault is None else f"could not save step {self.step} ({fault})"
        raise LostPatience(
            f"{saved} and stopped; torchrun --max-restarts=N goes on from the newest checkpoint by itself. If it "
            "comes back, raise trainer.accumulate or lower data.frames.max, data.height and data.width"
        )

    def _set_patience(self) -> None:
        robust = self.config.trainer.robust
        self.unfinished = Patience(
            robust.patience,
            "steps in a row could not be finished",
            "for memory raise trainer.accumulate or lower data.frames.max, data.height and data.width; for files look "
            f"at {self.folder}/faults.jsonl (trainer.robust.patience is the limit)",
        )
        self.zero_gradient = Patience(
            robust.zero_gradient,
            "steps in a row had no gradient at all",
            "the model learns nothing: are its outputs clamped, or the pixels in another range than the losses expect? "
            "(trainer.robust.zero_gradient is the limit)",
        )
        self._unsaved = SavePatience(robust.save_failures, "trainer.robust.save_failures")

    def _fuses(self) -> bool:
        """Where DeepSpeed offloads, AdamW steps on the host."""
        return self.device.type == "cuda" and self.config.trainer.strategy.name == "ddp"

    def _set_lr(self) -> None:
        lr = rate_at(self.config.optim, self.step, self.config.trainer.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _after_step(self, values: dict[str, float], stopped: bool) -> None:
        """Whatever is due after a step: log, validate, save."""
        trainer, validation = self.config.trainer, self.config.validation
        finished = self.step == trainer.max_steps
        self.window.add(values)
        self.log.advance()
        if self.step % trainer.log_every == 0 or finished or stopped:
            self.log.scalars(self.window.flush() | self._gauges(), self.step)
            if freed := compact(trainer.robust.compact_gib):
                self.log.say(f"gave back {freed:.2f} GiB of GPU memory that lay idle")
        if validation.every and (self.step % validation.every == 0 or finished) and not stopped:
            keep_best(self, self.validate())
        if trainer.save_every and (self.step % trainer.save_every == 0 or finished or stopped):
            self.save()

    def save(self) -> None:
        """Write a checkpoint and an export; where that fails the run goes on, for a while.

        Raises LostPatience after trainer.robust.save_failures failures in a row.
        """
        self._unsaved.heed(save(self), self.log.warn)

    def _gauges(self) -> dict[str, float]:
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

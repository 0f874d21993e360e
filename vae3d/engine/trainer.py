"""The training loop: a run is `fit`, one optimizer step is `train_step`."""

from __future__ import annotations

import resource
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vae3d.adversarial.base import Adversary
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.publish import publish, withdraw
from vae3d.checkpoints.state import ResumeError, load_state, prune, refuse_other_run, save_state, starting_state
from vae3d.data.loader import TrainingData
from vae3d.data.sources import DataError
from vae3d.engine.ema import Ema
from vae3d.engine.freeze import PartError, set_mode, train_parts, without_gradient
from vae3d.engine.loggers import Logger
from vae3d.engine.metrics import StepMetrics, Window
from vae3d.engine.profile import profiled
from vae3d.engine.proximal import Proximal
from vae3d.engine.runlog import RunLog
from vae3d.engine.spike import SpikeGuard, worst
from vae3d.engine.stopping import on_sigterm
from vae3d.engine.validation import validate
from vae3d.losses.objective import Objective
from vae3d.metrics import MetricSet
from vae3d.schedules import learning_rate
from vae3d.seeding import seed_of
from vae3d.types import Clip

if TYPE_CHECKING:
    from vae3d.config import TrainConfig

READS_BEFORE_JUDGING = 50  # clips read before data.max_broken can stop the run


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
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.device = accelerator.device
        self.objective, self.adversary, self.data, self.metrics = objective, adversary, data, metrics
        self.network = model.to(self.device)  # `model` below is the same, wrapped for autocast and DDP

        groups = train_parts(model, config.stage.train)
        set_mode(model, config.stage.train)
        self.ema = Ema(model, **asdict(config.trainer.ema))
        self.proximal = Proximal(model, config.optim.proximal)
        self.spikes = SpikeGuard(**asdict(config.trainer.spike), warn=lambda message: self.log.warn(message))
        self.window = Window()
        self.step = 0
        self.reads, self.broken_reads = 0, 0
        self._first_step_here = True
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda", **self._optimizer_settings())
        changed = self._resume()
        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise ResumeError(
                f"the ranks found checkpoints of steps {', '.join(map(str, sorted(set(steps))))} in {folder}; "
                "they must all see the same folder, so put run.root on a shared disk"
            )
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.log = RunLog(
            folder, logger, rank=accelerator.process_index, step=self.step, max_steps=config.trainer.max_steps
        )
        self.log.launch(self.step, asdict(config), changed)
        for key, (old, new) in changed.items():
            self.log.say(f"{key} was {old} until step {self.step} and is {new} from here on")
        self.log.faults(data.faults)

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after SIGTERM; whether it was the last step."""
        config, last = self.config, self.config.trainer.max_steps
        self.log.say(f"training from step {self.step} to {last}")
        profiling = config.debug.mode == "profile"
        recorder = profiled(self.folder, config.debug.steps) if profiling else nullcontext(lambda: None)
        clips = self.data.clips(self.step, last)
        stopped = False
        self._tick, self._steps, self._frames = time.perf_counter(), 0, 0
        with on_sigterm() as stop, recorder as step_done:
            while self.step < last and not stopped:
                batch = [next(clips) for _ in range(config.trainer.accumulate)]
                values = self.train_step(batch, stop.asked)
                self._steps, self._frames = self._steps + 1, self._frames + batch[0].video.shape[2]
                stopped = values.pop("stop") > 0
                self._after_step(values, stopped)
                step_done()
        if stopped:
            saved = "the same command goes on from there" if config.trainer.save_every else "nothing is saved"
            self.log.say(f"stopped by SIGTERM after step {self.step}; {saved}")
        self.log.close()
        return not stopped

    def train_step(self, clips: list[Clip], stop: bool = False) -> dict[str, float]:
        """One optimizer step over the micro-batches `clips`; returns metrics averaged over them and all ranks."""
        turn = self.adversary.turn(self.step)
        self._set_lr()
        torch.manual_seed(seed_of(self.config.run.seed, "step", self.step, self.accelerator.process_index))
        metrics = StepMetrics()

        for i, clip in enumerate(clips):
            clip = clip.to(self.device)
            noise = clip.generators(self.config.run.seed, self.device)
            with self._sync_gradients(i == len(clips) - 1):
                with torch.set_grad_enabled(turn.generator):
                    out = self.model(clip.video, pixels=self.objective.needs_pixels, generator=noise)

                if turn.generator:
                    loss, terms = self.objective(clip, out, self.step)
                    adversarial, more = self.adversary.generator_loss(clip, out, loss, self.step)
                    self.accelerator.backward((loss + adversarial) / len(clips))
                    metrics.add({"loss": loss, **terms, **more})

                if turn.discriminator:
                    loss, more = self.adversary.discriminator_loss(clip, out, self.step)
                    self.accelerator.backward(loss / len(clips))
                    metrics.add(more)

        if turn.generator:
            self.accelerator.unscale_gradients()
            self.proximal.add_gradient()
            metrics.add({"grad_norm": self._clip_gradients()})
        values = self._reduce(metrics, clips, stop)  # from here on every rank knows and does the same
        if turn.generator:
            values["skipped"] = float(not self._step_optimizer(values))
        if turn.discriminator:
            self.adversary.step()
        self.step += 1
        return values

    def _optimizer_settings(self) -> dict[str, Any]:
        optim = self.config.optim
        return {"betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}

    def _set_lr(self) -> None:
        optim = self.config.optim
        lr = learning_rate(
            self.step,
            lr=optim.lr,
            warmup_steps=optim.warmup_steps,
            decay_start=optim.decay_start,
            schedule=optim.schedule,
            max_steps=self.config.trainer.max_steps,
            min_lr=optim.min_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _sync_gradients(self, sync: bool) -> AbstractContextManager[None]:
        return nullcontext() if sync else self.accelerator.no_sync(self.model)

    def _clip_gradients(self) -> torch.Tensor:
        if self._first_step_here:
            self._first_step_here = False
            if unreached := without_gradient(self.network):
                raise PartError(
                    f"stage.train names parts that no loss term reaches: {len(unreached)} parameters such as "
                    f"{unreached[0]} got no gradient; take the part out of stage.train or add a term that reads it"
                )
        # Accelerate's own would unscale fp16 gradients, which are unscaled already.
        return nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optim.grad_clip)

    def _reduce(self, metrics: StepMetrics, clips: list[Clip], stop: bool) -> dict[str, float]:
        """Means over all ranks, and the worst loss of all as `loss_max`, in one all-reduce and one transfer.

        Stops the run if too many reads failed.
        """
        faults = [fault for clip in clips for fault in clip.faults]
        self.log.faults(faults)
        names, packed = metrics.pack({"stop": stop, "broken": len(faults)}, self.device)
        ranks = self.accelerator.num_processes
        slots = torch.zeros(ranks, device=self.device)  # one per rank, so that a mean tells each rank's loss
        if "loss" in names:
            slots[self.accelerator.process_index] = metrics.worst("loss")
        reduced = self.accelerator.reduce(torch.cat([packed, slots]), "mean").tolist()
        values = dict(zip(names, reduced[:-ranks], strict=True))
        if "loss" in names:
            values["loss_max"] = worst(loss * ranks for loss in reduced[-ranks:])

        broken = round(values.pop("broken") * self.accelerator.num_processes)
        self.broken_reads += broken
        self.reads += broken + self.config.data.batch_size
        share = self.broken_reads / self.reads
        if self.reads >= READS_BEFORE_JUDGING and share > self.config.data.max_broken:
            raise DataError(
                f"{self.broken_reads} of {self.reads} reads failed, a larger share than "
                f"data.max_broken={self.config.data.max_broken}; the files are listed in {self.folder}/faults.jsonl"
            )
        return values

    def _step_optimizer(self, values: dict[str, float]) -> bool:
        """Step unless loss or gradient are unsound; whether it did."""
        # fp16 gradients overflow in normal operation: the loss scaler skips those steps and learns from them.
        norm = 0.0 if self.accelerator.scaler is not None else values["grad_norm"]
        scaler = self.accelerator.scaler
        taken = self.spikes.accept(values["loss"], values["loss_max"], norm)
        if taken:
            self.optimizer.step()
            taken = scaler is None or not self.optimizer.step_was_skipped
        elif scaler is not None:
            scaler.update()  # the gradients were unscaled for clipping, which it must not meet twice
        if taken:
            self.ema.update(self.step)
        self.optimizer.zero_grad()
        return taken

    def _after_step(self, values: dict[str, float], stopped: bool) -> None:
        """Whatever is due after a step: log, validate, save."""
        trainer, validation = self.config.trainer, self.config.validation
        finished = self.step == trainer.max_steps
        self.window.add(values)
        self.log.advance()
        if self.step % trainer.log_every == 0 or finished or stopped:
            self.log.scalars(self.window.flush() | self._gauges(), self.step)
        if validation.every and (self.step % validation.every == 0 or finished) and not stopped:
            self.validate()
        if trainer.save_every and (self.step % trainer.save_every == 0 or finished or stopped):
            self.save()

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
        }

    def validate(self) -> dict[str, float]:
        """Score the held-out clips with the averaged weights; log the means and show some of the clips."""
        settings, depth = self.config.validation, self.config.data.depth.mapping
        self.network.eval()
        with self.ema.applied():
            mine = validate(
                self.network,
                self.data.held_out,
                self.metrics,
                self.device,
                settings.videos,
                roll=settings.roll,
                depth=depth,
            )
        set_mode(self.network, self.config.stage.train)
        everyone = sorted(gather_object(mine), key=lambda clip: clip.place)
        scores = self.metrics.over([clip.result for clip in everyone])
        scores |= {name: fmean(clip.more[name] for clip in everyone) for name in everyone[0].more}
        means = {f"val/{column}": value for column, value in scores.items() if value is not None}
        self.log.scalars({**means, "val_clips": len(everyone)}, self.step)
        for clip in everyone:
            if clip.picture is not None:
                self.log.video(f"original above reconstruction {clip.place}: {clip.name}", clip.picture, 8, self.step)
        return means

    def save(self) -> None:
        """Write a checkpoint, an export and, if asked for, their published files; other ranks wait for rank 0."""
        if self.accelerator.is_main_process:
            keep, named = self.config.trainer.keep, self.config.trainer.publish
            saved = save_state(self.folder / "checkpoints", self.step, self._state(), asdict(self.config))
            self.export(self.folder / "exports" / saved.name)
            if named.prefix is not None:
                last = self.step == self.config.trainer.max_steps
                with self.ema.applied():
                    publish(self.folder, named.prefix, saved, self.network.state_dict(), named.layout, last=last)
            prune(self.folder / "exports", keep)
            gone = prune(self.folder / "checkpoints", keep)
            if named.prefix is not None:
                withdraw(self.folder, named.prefix, gone)
            self.log.say(f"saved {saved}")
        self.accelerator.wait_for_everyone()

    def export(self, folder: Path) -> None:
        """The averaged weights (the current ones without EMA), for vae3d.load."""
        unfinished = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with self.ema.applied():
            weights = Checkpoint(self.config.model, self.network.state_dict(), folder, "export")
            write_export(
                weights, unfinished, stage=self.config.stage.name, step=self.step, ema=self.config.trainer.ema.decay
            )
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "anchor": self.proximal.digest,
            "spikes": self.spikes.state_dict(),
            "adversary": self.adversary.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "window": self.window.state_dict(),
            "reads": [self.reads, self.broken_reads],
        }

    def _resume(self) -> dict[str, tuple[Any, Any]]:
        """Restore what the run goes on from, if there is anything; returns the settings that changed since."""
        start = starting_state(self.folder / "checkpoints", self.config.run.resume_from)
        if start is None:
            return {}
        changed = refuse_other_run(start, asdict(self.config))
        state = load_state(start)
        self.proximal.refuse_other_anchor(state.get("anchor"), start, self.config.stage.init_from)
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # the checkpoint's own came back with its moments
            group.update(self._optimizer_settings())
        self.ema.load_state_dict(state["ema"])
        self.spikes.load_state_dict(state["spikes"])
        self.adversary.load_state_dict(state["adversary"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.window.load_state_dict(state["window"])
        self.step = state["step"]
        self.reads, self.broken_reads = state["reads"]
        return changed

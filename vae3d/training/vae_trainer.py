"""Training of video autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from vae3d import distributed
from vae3d.adversarial.base import Adversary, UpdatePhase
from vae3d.checkpoints import state
from vae3d.checkpoints.export import link, published_files, replace_export, write_final_model, write_flat
from vae3d.checkpoints.formats import Checkpoint
from vae3d.checkpoints.state import ResumeError
from vae3d.data.batches.clips import Unreadable
from vae3d.data.batches.streaming import StreamingData, StreamingState
from vae3d.data.loader import TrainingData
from vae3d.data.media import DataError
from vae3d.latents.scale import ScaleError, longest_clips, measure, rescaled
from vae3d.layout import place
from vae3d.losses.objective import Objective
from vae3d.metrics import MetricError, MetricSet
from vae3d.metrics.base import Better
from vae3d.metrics.registry import resolve
from vae3d.optim import adamw
from vae3d.precision import DTYPES
from vae3d.training.best import BestExport
from vae3d.training.checkpointer import Outputs, step_folder
from vae3d.training.deepspeed import DeepSpeedZero
from vae3d.training.ema import Ema
from vae3d.training.failures import SpikeGuard
from vae3d.training.freeze import eval_mode
from vae3d.training.loggers import Loggers
from vae3d.training.preflight import preflight
from vae3d.training.proximal import Proximal
from vae3d.training.step_status import StepMetrics
from vae3d.training.strategy import ReplicatedDataParallel
from vae3d.training.student import build_student, reconstruct
from vae3d.training.teacher import Distillation, StudentWithProjections
from vae3d.training.trainer import CLIPS_PER_STEP, Trainer
from vae3d.training.vae_validation import BETTER, ValidatedClip, group_scores, log_clips, mean_scores, validate
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    from vae3d.config.schema import TrainConfig


class VaeTrainer(Trainer[ClipBatch | Unreadable]):
    """Trains the parts of `network` that config.stage names under `objective`, with an adversary and a teacher if any.

    A step calls the student, see build_student.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        network: nn.Module,
        objective: Objective,
        adversary: Adversary,
        data: TrainingData | StreamingData,
        metrics: MetricSet,
        logger: Loggers,
        distillation: Distillation | None = None,
    ) -> None:
        self.objective, self.metrics, self.distillation = objective, metrics, distillation
        robust = config.trainer.robust
        network = place(network, accelerator.device)
        frames = max(shape.frames for shape in data.shapes())
        student, groups = build_student(config, network, objective, distillation, frames)
        self.projections = student.projections if isinstance(student, StudentWithProjections) else nn.ModuleList()

        ema = Ema(network, **asdict(config.trainer.ema))
        proximal = Proximal(network, config.optim.proximal)
        adversary.load(network, accelerator.device, config.run.seed, accelerator.process_index)
        replicated = config.trainer.strategy.name == "replicated"
        device = accelerator.device if replicated else None  # DeepSpeed may step on another
        optimizer = adamw(groups, config.optim, device)
        if replicated:
            reduce_dtype = DTYPES[config.trainer.reduce_dtype]
            strategy = ReplicatedDataParallel(accelerator, student, optimizer, reduce_dtype)
        else:
            strategy = DeepSpeedZero(
                accelerator,
                student,
                optimizer,
                config.trainer.strategy.deepspeed,
                micro_batch=data.schedule.micro_batch,
                accumulate=data.schedule.accumulate,
                grad_clip=config.optim.grad_clip,
            )
        super().__init__(
            config,
            folder,
            accelerator,
            network,
            strategy,
            ema,
            data,
            logger,
            spikes=SpikeGuard(**asdict(config.trainer.spike)),
            max_zero_gradients=robust.zero_gradient,
            adversary=adversary,
            proximal=proximal,
            best=BestExport(config.trainer.best, self.better),
            preflight_enabled=robust.preflight,
            compact_gib=robust.compact_gib,
            metadata={"strategy": config.trainer.strategy.name, CLIPS_PER_STEP: data.clips_per_step()},
        )
        if isinstance(data, StreamingData):
            self.data_changes = StreamingState(data, lambda: self.step)
            self.checkpointer.register("data", self.data_changes, optional_rank_state=True)
        self.checkpointer.register("objective", objective, strict=True)
        self.checkpointer.register("projections", self.projections, strict=True)
        self.checkpointer.register("proximal", proximal)
        self.checkpointer.register("adversary", adversary, optional_rank_state=True, copy_rank_state=False)

    def load_batches(self, stopping: Callable[[], bool]) -> Iterator[ClipBatch | Unreadable]:
        return self.data.clips(self.step, self.config.trainer.max_steps, stopping)

    def is_readable(self, batch: ClipBatch | Unreadable) -> bool:
        return not isinstance(batch, Unreadable)

    def clip_names(self, batch: ClipBatch | Unreadable) -> list[str]:
        return [path for path, _ in batch.errors] if isinstance(batch, Unreadable) else batch.paths

    def copy_to_device(self, batch: ClipBatch) -> ClipBatch:
        return batch.copy_to(self.device)

    def forward_backward(
        self, batches: Sequence[ClipBatch], phase: UpdatePhase, step: int, metrics: StepMetrics
    ) -> None:
        for on_host, batch in zip(batches, self.inputs.each(batches), strict=True):
            batch = batch.to(self.device)
            with torch.set_grad_enabled(phase.model):
                student, network = self.strategy.model, self.network
                batch, out = reconstruct(
                    self.config, student, network, self.objective, self.distillation, batch, step, on_host.video
                )

            if phase.model:
                loss, terms = self.objective(batch, out, step)
                adversarial, gan_metrics = self.adversary.generator_loss(batch, out, loss, step)
                self.strategy.backward((loss + adversarial) / len(batches))
                metrics.add({"loss": loss, **terms, **gan_metrics})

            if phase.discriminator:
                loss, gan_metrics = self.adversary.discriminator_loss(batch, out, step)
                (loss / len(batches)).backward()
                metrics.add({"loss_discriminator": loss, **gan_metrics})

    def preflight(self) -> None:
        accumulate = self.config.trainer.accumulate
        preflight(self.strategy, self.adversary, self.data, accumulate, self.forward_backward, self.sync_status)

    def perf_metrics(self) -> dict[str, float]:
        """Also frames per second, steps and clips of each source and bucket so far, the value of the proximal term,
        and the share of this rank's clips since its start whose targets were in the teacher's cache."""
        perf, steps, schedule = super().perf_metrics(), range(self._timed_from, self.step), self.data.schedule
        if steps:
            clips = [schedule.batch_size_at(step) for step in steps]
            frames = sum(n * schedule.frames_at(step) for n, step in zip(clips, steps, strict=True))
            perf["frames_per_second"] = perf["clips_per_second"] * frames / sum(clips)
        perf |= self.data.counts(self.step)
        if self.distillation is not None and self.distillation.cache is not None:
            perf["teacher_cache_hits"] = self.distillation.cache.hit_rate
        if self.proximal.weight:
            perf["prox"] = self.proximal.value().item()
        return perf

    # ---- validation

    @property
    def better(self) -> Mapping[str, Better]:
        return {**self.metrics.columns, **BETTER}

    def validate(self) -> dict[str, float]:
        """Score the held-out clips with the averaged weights, log the means and show some clips."""
        config, last = self.config.validation, self.step == self.config.trainer.max_steps
        slow = last or (config.slow_metrics_every and self.step % config.slow_metrics_every == 0)
        metrics = self.metrics if slow else self.metrics.subset(resolve(config.metrics))
        clips = self.validate_clips(metrics)
        if not clips:
            return {}
        means = {f"val/{column}": value for column, value in mean_scores(metrics, clips).items()}
        groups = group_scores(metrics, clips, self.data.val_groups)
        self.log.scalars({**means, **groups, "val_clips": len(clips)}, self.step)
        log_clips(self.log, clips, self.step)
        return means

    def validate_clips(self, metrics: MetricSet) -> list[ValidatedClip]:
        """The held-out clips of all ranks, in order, on the first rank with panels; none, with a warning, if a rank
        fails."""
        config, depth = self.config.validation, self.config.data.depth.mapping

        def compute() -> list[ValidatedClip]:
            held_out, shown = self.data.held_out, config.videos
            return validate(self.network, held_out, metrics, self.device, shown, roll=config.roll, depth=depth)

        clips = self.validate_on_all_ranks(compute, memory_hint="lower validation.frames")
        if clips is None:
            return []
        panels = {clip.index: clip.panels for clip in clips}
        ranks = distributed.all_gather_object([replace(clip, panels=None) for clip in clips])
        for rank, theirs in enumerate(ranks):
            for clip in theirs:
                # One clip at a time: NCCL sends by way of the GPUs, and gathering would take the memory of them all.
                if clip.index < config.videos:
                    shown = distributed.broadcast_object(panels.get(clip.index), rank)
                    clip.panels = shown if self.rank == 0 else None
        return sorted((clip for theirs in ranks for clip in theirs), key=lambda clip: clip.index)

    # ---- checkpoints

    def check_same_run(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        changed = state.check_same_run(checkpoint, asdict(self.config))
        changed |= self.changed_clips_per_step(checkpoint)
        before, now = changed.get("loss.logvar", (0.0, 0.0))
        if (before is None) != (now is None):
            raise ResumeError(
                f"{checkpoint} was trained {'without' if before is None else 'with'} loss.logvar; give this run "
                "another run.name, or set loss.logvar as it was"
            )
        return changed

    def outputs(self, step: int, saved: Mapping[str, Any] | None = None) -> Outputs:
        """The export and, with trainer.publish.prefix, the training state and averaged weights under its names."""
        published = self.config.trainer.publish
        files = super().outputs(step, saved)
        if published.prefix is not None:
            training, averaged = published_files(self.folder, published.prefix, step)
            source = step_folder(self.folder / "checkpoints", step) / state.STATE
            weights = self._averaged(saved)
            files |= {
                training: lambda path: link(source, path),
                averaged: lambda path: write_flat(weights, published.layout, path),
            }
        return files

    def final_outputs(self, step: int) -> Outputs:
        published, files = self.config.trainer.publish, {}
        if published.prefix is not None:
            _, averaged = published_files(self.folder, published.prefix, step)
            files[self.folder / f"{published.prefix}_final_ema.pt"] = lambda path: link(averaged, path)
        if published.final_model:  # the last of its three files
            final = self.folder / "final_model.pth"
            files[final] = lambda path: write_final_model(self._averaged(), path.parent)
        return files

    def export_of(self, step: int, saved: Mapping[str, Any], **info: Any) -> Callable[[Path], None]:
        """Of the averaged weights (the current ones without EMA), for vae3d.load, with their latent scale."""
        weights, latents = self._averaged(saved), {}
        if self.config.trainer.publish.measure_scale:
            with self.ema.applied():  # which are those of `saved`
                weights, latents = self._with_measured_scale(weights)
        info = {"stage": self.config.stage.name, "step": step, "ema": self.config.trainer.ema.decay, **info, **latents}
        return lambda folder: replace_export(weights, folder, **info)

    def _averaged(self, saved: Mapping[str, Any] | None = None) -> Checkpoint:
        """The averaged weights of `saved`; None: the current ones."""
        saved = saved or self.current_state()
        averages = self.ema.in_state_dict(self.network, saved["ema"])
        return Checkpoint(self.config.model, {**saved["model"], **averages}, self.folder, "export")

    def _with_measured_scale(self, weights: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
        """The weights with the latent scale of training clips of the largest size, and its statistics."""
        errors: list[tuple[str, str]] = []
        try:
            clips = longest_clips(self.data, self.config.trainer.publish.measure_scale, errors)
            with eval_mode(self.network):
                measured = measure(self.network, clips, self.config.run.seed)
                return rescaled(weights, self.network, measured), {"latents": measured.facts()}
        except (ScaleError, MetricError, DataError) as error:
            self.log.warn(f"the export of step {self.step} has the scale of the configuration: {error}")
            return weights, {}
        finally:
            self.log.errors(errors)

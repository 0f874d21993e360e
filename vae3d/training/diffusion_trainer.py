"""Training of diffusion models on latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vae3d import distributed
from vae3d.adversarial.base import UpdatePhase
from vae3d.arguments import check_fields
from vae3d.checkpoints import state
from vae3d.checkpoints.location import list_some
from vae3d.checkpoints.state import ResumeError
from vae3d.data.batches.batch_schedule import stream_counts
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.data import Batch, LatentData
from vae3d.diffusion.export import DataScale, check_config, write_export
from vae3d.diffusion.processes import QUARTILES, Process, drop_labels, quartile_sums, training_losses
from vae3d.diffusion.quality import sliced_wasserstein
from vae3d.diffusion.sampling import decoded, sample_latents
from vae3d.inference.pictures import captioned_grid
from vae3d.latents.scale import ScaleError, check_normalised
from vae3d.layout import place
from vae3d.optim import adamw
from vae3d.pixels import displayable
from vae3d.precision import DTYPES
from vae3d.seeding import generator_of
from vae3d.training.ema import MultiEma
from vae3d.training.failures import SpikeGuard
from vae3d.training.loggers import Loggers
from vae3d.training.step_status import StepMetrics
from vae3d.training.strategy import ReplicatedDataParallel
from vae3d.training.trainer import CLIPS_PER_STEP, Trainer
from vae3d.transfer import to_device

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig

MAX_SKIPS = 20  # limit of steps that are not finite where failures have none: such a run would never end, nor learn

# Settings that a resumed run must share with its checkpoint.
MUST_MATCH = (
    *("denoiser", "process", "vae.sample", "labels", "data.frames", "data.height", "data.width", "data.stride"),
    *("data.fps", "data.buckets", "run.seed"),
)


class DiffusionTrainer(Trainer[Batch]):
    """Trains `network` to denoise the latents of `data`.

    config: complete, with all settings of network and process. vae: path and vae_metadata of the autoencoder. hint: the
    command that normalises its latents.
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
        logger: Loggers,
        hint: str,
    ) -> None:
        self.process, self.vae, self.hint = process, vae, hint
        network = place(network, accelerator.device)
        optimizer = adamw(network.parameters(), config.optim, accelerator.device)
        super().__init__(
            config,
            folder,
            accelerator,
            network,
            ReplicatedDataParallel(accelerator, network, optimizer, DTYPES[config.trainer.reduce_dtype]),
            MultiEma(network, **asdict(config.trainer.ema)),
            data,
            logger,
            spikes=SpikeGuard(max_consecutive_skips=config.trainer.robust.max_consecutive_failures or MAX_SKIPS),
            metadata={CLIPS_PER_STEP: data.clips_per_step()},
        )
        identity = {name: vae[name] for name in ("encoder", "latents_mean", "latents_std")}
        self.latents = LatentsState(identity, data.classes, config.vae.path)
        self.checkpointer.register("latents", self.latents)
        self.held_out: list[tuple[Tensor, Batch]] = []
        # Held-out latents of all ranks of the samples' size, on the first rank, which compares samples with them.
        self.real: list[Tensor] = []
        self.shown = False  # whether the held-out clips have been logged

    def prepare(self) -> None:
        """Measure the latents, unless a checkpoint has their statistics, and encode the held-out clips.

        Raises ScaleError if the latents do not have mean 0 and standard deviation 1, unless trainer.any_scale is set,
        and FileError if exports could not be read.
        """
        check_config(self._export_metadata(self.step), [*self.ema.rates])
        if not self.latents.scale:
            count = self.config.trainer.scale_samples
            self.log.say(f"measuring mean and standard deviation of {count} latents (trainer.scale_samples)")
            stats = self.data.measure(count, self.device)
            try:
                check_normalised(stats, self.hint)
            except ScaleError as error:
                if not self.config.trainer.any_scale:
                    raise
                self.log.warn(str(error))
            self.latents.scale = {"count": stats.clips, "mean": stats.mean.tolist(), "std": stats.std.tolist()}
            self.log.say(f"mean and standard deviation {stats}")
        self.held_out = [(self.data.latents(batch, self.device), batch) for batch in self.data.held_out]
        ranks = distributed.gather_to_main([z.cpu() for z, _ in self.held_out])
        self.real = [z for rank in ranks for z in rank if z.shape[1:] == self.data.latent_shape]

    def load_batches(self, stopping: Callable[[], bool]) -> Iterator[Batch]:
        return self.data.batches(self.step, self.config.trainer.max_steps, stopping)

    def is_readable(self, batch: Batch) -> bool:
        return batch.values is not None

    def clip_names(self, batch: Batch) -> list[str]:
        return [f"position {position} of the training order" for position in batch.positions]

    def copy_to_device(self, batch: Batch) -> Batch:
        values, labels = (to_device(tensor, self.device) for tensor in (batch.values, batch.labels))
        return batch._replace(values=values, labels=labels)

    def forward_backward(self, batches: Sequence[Batch], phase: UpdatePhase, step: int, metrics: StepMetrics) -> None:
        for batch in self.inputs.each(batches):
            z = self.data.latents(batch, self.device)  # [B, C, t, h, w], normalised
            generators = [
                generator_of(self.config.run.seed, step, position, "diffusion", device=self.device)
                for position in batch.positions
            ]
            classes, labels = self.network.num_classes, None
            if classes:
                labels = drop_labels(batch.labels, self.config.label_dropout, classes, generators)
            with self.accelerator.autocast():
                losses = training_losses(self.network, self.process, z, generators, labels)
            loss = losses["loss"].mean()
            self.strategy.backward(loss / len(batches))
            terms = {f"loss/{name}": losses[name].mean() for name in ("mse", "vlb") if name in losses}
            quartiles = quartile_sums(losses["mse"], losses["t_normalised"])
            sums = {f"sum_q{q}": quartiles[q, 0] for q in range(QUARTILES)}
            counts = {f"count_q{q}": quartiles[q, 1] for q in range(QUARTILES)}
            metrics.add({"loss": loss, **terms, **sums, **counts})

    def step_metrics(self) -> dict[str, float]:
        """With the mean squared error by quarter of the timesteps, loss_q0 to loss_q3, of which there were any."""
        values = super().step_metrics()
        values.pop("loss_max", None)
        for q in range(QUARTILES):
            total, count = values.pop(f"sum_q{q}", 0.0), values.pop(f"count_q{q}", 0.0)
            if count:
                values[f"loss_q{q}"] = total / count
        return values

    def perf_metrics(self) -> dict[str, float]:
        """Also steps and clips of each source and size so far."""
        return super().perf_metrics() | stream_counts(self.data.schedule, self.data.stream_groups, self.step)

    # ---- validation

    @property
    def better(self) -> Mapping[str, bool | None]:
        return {"loss": False, **{f"loss_q{q}": False for q in range(QUARTILES)}, "sliced_wasserstein": False}

    def validate(self) -> dict[str, float]:
        """Log samples, and mean squared errors on the held-out latents of all ranks.

        val/loss, by quarter of the timesteps val/loss_q0 to val/loss_q3, and with clips of several sizes by size, as in
        val_17x256x256/loss.
        """

        def compute() -> tuple[Tensor, dict[str, float]]:
            samples = self._sample_or_warn() if self.accelerator.is_main_process else {}  # the others wait
            return self._held_out_sums(), samples

        computed = self.validate_on_all_ranks(compute, memory_hint="lower data.batch_size")
        if computed is None:
            return {}
        sums, samples = computed
        distributed.all_reduce_mean([sums])
        total, count = sums.sum((0, 1)).tolist()
        values = {"val/loss": total / count} if count else {}
        values |= {f"val/loss_q{q}": total / n for q, (total, n) in enumerate(sums.sum(0).tolist()) if n}
        values |= samples
        by_size = {}
        if len(sizes := self.data.held_out_sizes) > 1:
            for size, (total, count) in zip(sizes, sums.sum(1).tolist(), strict=True):
                by_size |= {f"val_{'x'.join(map(str, size))}/loss": total / count} if count else {}
        self.log.scalars(values | by_size, self.step)
        return values

    @torch.no_grad()
    def _held_out_sums(self) -> Tensor:
        """[sizes, QUARTILES, 2]: by size of the clips and quarter of the timesteps, the sum and the number of mean
        squared errors on this rank.

        Each held-out latent is noised `draws` times, with the same timesteps and noise at every validation.
        """
        shapes = [self.data.codec.latent_shape(*size) for size in self.data.held_out_sizes]
        sums = torch.zeros(len(shapes), QUARTILES, 2, dtype=torch.float64, device=self.device)
        for z, batch in self.held_out:
            of_size = sums[shapes.index(tuple(z.shape[1:]))]
            labels = batch.labels if self.network.num_classes else None
            for draw in range(self.config.validation.draws):
                noise = [
                    generator_of(self.config.run.seed, position, draw, "validation", device=self.device)
                    for position in batch.positions
                ]
                with self.accelerator.autocast():
                    losses = training_losses(self.network, self.process, z, noise, labels)
                of_size += quartile_sums(losses["mse"], losses["t_normalised"])
        return sums

    def _sample_or_warn(self) -> dict[str, float]:
        scores, error = self.catch_validation_error(self._sample, memory_hint="lower validation.samples")
        if error is not None:
            self.log.warn(f"no samples at step {self.step}: {error}")
        return scores or {}

    def _sample(self) -> dict[str, float]:
        """Log samples and, the first time, reconstructed held-out clips. Returns how far they are apart."""
        config, data = self.config.validation, self.data
        sampling = Sampling(config.steps, config.method, config.guidance, shift=config.shift)
        real = torch.cat(self.real) if self.real else None

        classes = data.trained_classes
        labels = [classes[i % len(classes)] for i in range(config.samples)] if classes else None
        with self.accelerator.autocast():
            z = sample_latents(
                self.network,
                self.process,
                data.latent_shape,
                sampling,
                seed=self.config.run.seed,
                indices=range(config.samples),
                labels=labels,
                batch_size=16,
                device=self.device,
            )
        captions = [data.classes[labels[i]] if labels else str(i) for i in range(config.samples)]
        self._show("samples", z, captions)
        if real is not None and not self.shown:
            held_out = real[: len(z)]
            self._show("reconstructions", held_out, list(map(str, range(len(held_out)))))
            self.shown = True
        values = {"val/sample_rms": float(z.square().mean().sqrt())}  # 1 for the data
        if real is not None:
            values["val/sliced_wasserstein"] = sliced_wasserstein(z, real.to(z.device))
        return values

    def _show(self, name: str, z: Tensor, captions: Sequence[str]) -> None:
        """Log latents [N, C, t, h, w], decoded, in a grid."""
        videos = decoded(self.data.codec, z, self.data.size)
        self.log.frames(f"val_samples/{name}", captioned_grid(list(map(displayable, videos)), captions), self.step)

    # ---- checkpoints

    def check_same_run(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        saved = state.saved_config(checkpoint)
        if not all(isinstance(saved.get(part), Mapping) for part in ("denoiser", "process")):
            raise ResumeError(f"{checkpoint} is not of a diffusion model; run.resume_from takes one of those")
        changed = state.check_same_run(checkpoint, asdict(self.config), MUST_MATCH)
        return changed | self.changed_clips_per_step(checkpoint)

    def export_of(self, step: int, saved: Mapping[str, Any], **info: Any) -> Callable[[Path], None]:
        """Of the weights at every averaging rate, and what sampling needs beside them."""
        weights = {
            rate: {**saved["model"], **ema.in_state_dict(self.network, saved["ema"][str(rate)])}
            for rate, ema in self.ema.rates.items()
        }
        metadata = self._export_metadata(step, **info)
        return lambda folder: write_export(folder, metadata, weights)

    def _export_metadata(self, step: int, **info: Any) -> dict[str, Any]:
        return {
            "step": step,
            "network": self.network.config,
            "process": self.config.process,
            "latent_shape": list(self.data.latent_shape),
            "size": list(self.data.size),
            "sizes": [list(size) for size in self.data.sizes],
            "classes": self.data.classes,
            "trained_classes": self.data.trained_classes,
            "label_dropout": self.config.label_dropout,
            "vae": self.vae,
            "latents": self.latents.scale,
            **info,
        }


class _LatentsState(TypedDict):
    vae: Mapping[str, Any]
    classes: Sequence[str]
    scale: DataScale


class LatentsState:
    """What a run's latents come from, which must not change when it resumes, and their measured statistics."""

    def __init__(self, vae: Mapping[str, Any], classes: Sequence[str], path: str) -> None:
        self.vae, self.classes, self.path = vae, classes, path
        self.scale: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"vae": self.vae, "classes": self.classes, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ResumeError for another autoencoder or other classes."""
        check_fields(state, _LatentsState, key="latents")
        if state["classes"] != self.classes:
            ours, theirs = set(self.classes), set(state["classes"])
            gone = list_some(name for name in state["classes"] if name not in ours) or "none"
            new = list_some(name for name in self.classes if name not in theirs) or "none"
            raise ResumeError(
                f"was trained on other classes: not in the data now: {gone}; new: {new}. A class is its index in the "
                "sorted list of all; give the same data, or give this run another run.name"
            )
        if changed := [name for name, value in self.vae.items() if state["vae"].get(name) != value]:
            raise ResumeError(
                f"was trained on latents of another autoencoder than vae.path={self.path}: its {', '.join(changed)} "
                "differs; give the same autoencoder, or another run.name"
            )
        self.scale = state["scale"]

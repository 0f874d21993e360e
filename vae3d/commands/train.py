"""Train a video autoencoder: from configuration to trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from os.path import isfile as is_file
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae3d.checkpoints.export import lost_settings, size_notes
from vae3d.checkpoints.formats import Checkpoint, load_weights, read_checkpoint
from vae3d.commands.builders import build_distillation, build_model, build_objective
from vae3d.commands.closing import command, curves, longer, shown, start_of
from vae3d.commands.meta_check import check_bucket_sizes
from vae3d.commands.summary import data_summary, never_reached, summary
from vae3d.commands.training_data import build_training_data
from vae3d.data.batches.held_out import HELD_OUT, write_held_out
from vae3d.data.batches.streaming import StreamingData
from vae3d.data.loader import TrainingData
from vae3d.distributed import check_ranks_agree, init_training, on_first_rank
from vae3d.errors import UserError
from vae3d.latents.scale import longest_clips
from vae3d.layout import place
from vae3d.loading import build_from_checkpoint, changed_variant, check_scale, initialize, instantiate, load
from vae3d.metrics import build_metrics
from vae3d.models.compiled import compile_blocks
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.registry import is_known
from vae3d.models.spatial import SpatialVAE
from vae3d.models.taehv import TAEHV
from vae3d.models.wan import WanVAE
from vae3d.precision import set_cudnn_benchmark, slow_conv3d
from vae3d.pruning.prune import prune
from vae3d.training.checkpointer import check_may_start, find_checkpoint
from vae3d.training.linear_code import fit_shortcut
from vae3d.training.loggers import Loggers, build_loggers
from vae3d.training.vae_trainer import VaeTrainer

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import TrainConfig


def loggers_of(config: TrainConfig | DiffusionConfig) -> Loggers:
    other = {name: instantiate(node) for name, node in config.logger.other.items()}
    return build_loggers(config.logger, config.run.root, other)


def fit_shortcut_everywhere(
    config: TrainConfig, model: SpatialVAE | OpenSoraVAE, data: TrainingData | StreamingData, device: torch.device
) -> list[str]:
    """Fit the shortcut on the first rank, and give all ranks the result. Moves the model to `device`. Returns lines
    that describe the fit.

    Raises UserError, on every rank, if it cannot be fitted.
    """
    model.to(device)  # to stay there
    vae = model.temporal_vae if isinstance(model, OpenSoraVAE) else model
    layers = nn.ModuleList([vae.shortcut_in, vae.shortcut_out])

    def fit() -> tuple[list[str], dict[str, Tensor]]:
        errors: list[tuple[str, str]] = []
        line = fit_shortcut(model, longest_clips(data, config.stage.fit_shortcut, errors), config.run.seed)
        weights = {name: weight.cpu() for name, weight in layers.state_dict().items()}  # for ranks of other devices
        return [line, *_skipped(errors)], weights

    lines, weights = on_first_rank(fit)
    layers.load_state_dict(weights)
    return lines


def prune_everywhere(
    config: TrainConfig, model: VideoAutoencoder, data: TrainingData | StreamingData, device: torch.device
) -> tuple[list[str], list[str]]:
    """Prune stage.init_from.prune to the model on the first rank, and give all ranks the result. Returns lines that
    describe it, and the parts of the model that became smaller.

    Raises UserError, on every rank, if it cannot be pruned.
    """
    path, settings = config.stage.init_from["prune"], config.stage.prune

    def prune_from_checkpoint() -> tuple[list[str], list[str], dict[str, Tensor]]:
        errors: list[tuple[str, str]] = []
        with torch.random.fork_rng(devices=[]):  # all ranks go on with the same random numbers
            adapter = isinstance(model, DiffusersVAE)
            checkpoint = read_checkpoint(path, getattr(model, "variant", None), adapter=adapter)
            larger = build_from_checkpoint(checkpoint)
        load_weights(larger, checkpoint.state, f"{checkpoint.path} ({checkpoint.layout})")
        lines = [f"the model is pruned from {checkpoint.path} ({checkpoint.layout})", *checkpoint.notes]
        lines += changed_variant(model, checkpoint)
        lines += check_scale(model, checkpoint, any_scale=config.trainer.publish.measure_scale > 0)
        larger = larger.to(device)
        clips = [clip.to(device).video for clip in longest_clips(data, settings.clips, errors)]
        if not clips:
            raise UserError(f"{path} cannot be pruned: no clip could be read")
        options = {"importance": settings.importance, "refit": settings.refit, "seed": config.run.seed}
        lines += [f"{path} {line}" for line in prune(larger, model.to(device), torch.cat(clips), **options)]
        smaller = [part for part in model.trainable_parts() if _sizes(model, part) != _sizes(larger, part)]
        return [*lines, *_skipped(errors)], smaller, model.cpu().state_dict()

    lines, smaller, weights = on_first_rank(prune_from_checkpoint)
    model.load_state_dict(weights)
    return lines, smaller


def _skipped(errors: Sequence[tuple[str, str]]) -> list[str]:
    return [f"skipped: {path}: {reason}" for path, reason in errors]


def _sizes(model: VideoAutoencoder, part: str) -> list[torch.Size]:
    return [p.shape for module in model.trainable_parts()[part] for p in module.parameters()]


def build_trainer(config: TrainConfig, folder: Path) -> VaeTrainer:
    """Build the trainer, resume it, lock the run's folder and open its log; ready to `fit`."""
    if config.trainer.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("trainer.precision is fp16, which needs a GPU; use bf16 or fp32")
    check_may_start(folder, config.run.resume)
    accelerator = init_training(config.trainer.precision)
    check_ranks_agree(asdict(config))
    checkpoint = find_checkpoint(folder, config.run.resume_from)
    resumes = checkpoint is not None
    data = build_training_data(config, accelerator.process_index, accelerator.num_processes)
    check_ranks_agree({**data.fingerprint.digests(), "data: clips per step": data.clips_per_step()})
    check_bucket_sizes(config, data.shapes())
    shapes = {shape._replace(stream=0) for shape in data.shapes()}
    set_cudnn_benchmark(len(shapes))
    objective = build_objective(config.loss)
    objective.load(accelerator.device)
    validation = config.validation
    measured = [*validation.metrics, *validation.slow_metrics] if validation.every else []
    metrics = build_metrics(measured, accelerator.device)
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    anchored = config.optim.proximal > 0  # needs the initial weights also where a checkpoint replaces them
    started, smaller = [], []
    if isinstance(config.stage.init_from, dict) and "prune" in config.stage.init_from:
        if not resumes:
            started, smaller = prune_everywhere(config, model, data, accelerator.device)
    elif anchored or not resumes:
        measures = config.trainer.publish.measure_scale > 0
        started = initialize(model, config.stage.init_from, any_scale=resumes or measures)
    if config.stage.fit_shortcut and not resumes:
        started += fit_shortcut_everywhere(config, model, data, accelerator.device)
    if anchored and resumes:
        started = [f"optim.proximal pulls towards stage.init_from={config.stage.init_from}"]
    if config.trainer.compile:
        compile_blocks(model, dynamic=None if len(shapes) > 1 else False)
    adversary, logger = instantiate(config.adversary), loggers_of(config)
    teacher = None if config.teacher.path is None else place(load(config.teacher.path), accelerator.device)
    distillation = build_distillation(config, teacher, model)
    trainer = VaeTrainer(config, folder, accelerator, model, objective, adversary, data, metrics, logger, distillation)
    trainer.setup(checkpoint)
    if accelerator.is_main_process:
        write_held_out(folder / HELD_OUT, data.held_out_files)
    for line in [*summary(config, model, accelerator.num_processes), *data_summary(config, data), *started]:
        trainer.log.say(line)
    for line in [*never_reached(config), *data.warnings]:
        trainer.log.warn(line)
    for part in smaller:
        if not any(p.requires_grad for module in model.trainable_parts()[part] for p in module.parameters()):
            trainer.log.warn(f"stage.train: the {part} was pruned and does not train, so it stays as pruned")
    if isinstance(model, TAEHV) and config.teacher.path is None and {"all", "encoder"} & config.stage.train.keys():
        trainer.log.warn(f"no teacher (teacher=none): the latents will drift away from those of {model.variant}")
    if not is_known(config.model):
        trainer.log.warn(
            f"{config.model['_target_']} is not in MODELS of vae3d/models/registry.py: only vae3d.load(path, model) "
            "will open the exports of this run"
        )
    if config.trainer.publish.final_model:
        for note in size_notes(Checkpoint(config.model, {}, folder, "export")):
            trainer.log.say(f"final_model.pth: {note}")
    if config.trainer.publish.prefix is not None:
        for note in lost_settings(Checkpoint(config.model, {}, folder, "export")):
            trainer.log.say(f"published weights: {note}")
    if isinstance(model, WanVAE) and config.trainer.precision != "fp32" and (error := slow_conv3d()):
        trainer.log.say(error)
    return trainer


def next_commands(trainer: VaeTrainer) -> list[tuple[str, str]]:
    """(purpose, command) that work with the files of this run."""
    config, run = trainer.config, shown(trainer.folder)
    found = [longer("train", trainer)]
    held_out = [path for clip in trainer.data.held_out for path in clip.paths]
    table = trainer.data.streams[0].table
    files = held_out or [table.path(row) for row in range(min(1, len(table)))]
    if any((trainer.folder / "exports").glob("step-*")) and config.data.depth.mapping is None:
        if files and is_file(files[0]):
            found.append(
                (
                    "one video: side by side, scores, a page",
                    f"{start_of('try')} {quote(shown(Path(files[0])))} {quote(run)}",
                )
            )
        found += _reconstruct(trainer, run)
    return [pair for pair in (*found, curves(trainer.folder)) if pair]


def _reconstruct(trainer: VaeTrainer, run: str) -> list[tuple[str, str]]:
    """Reconstruct held-out files of a run and score them; nothing if it has no table of them. run: its folder."""
    config, table, out = trainer.config, trainer.folder / HELD_OUT, f"{run}/reconstructed-{trainer.step}"
    if not table.is_file():
        return []
    settings = {
        "checkpoint": run,
        "source": shown(table),
        "num_samples": len(trainer.data.val_groups) or config.validation.clips,
        "num_frames": config.validation.frames,
        "height": config.data.height,
        "width": config.data.width,
    }
    if config.teacher.path is not None:
        compared = command("compare", **settings, teacher=config.teacher.path, save_dir=out)
        return [("every encoder with every decoder, of model and teacher", compared)]
    score = f"{start_of('eval')} --base {quote(out)} --metric {' '.join(config.validation.metrics)}"
    return [("reconstruct held-out files", command("infer", **settings, save_dir=out)), ("score them", score)]

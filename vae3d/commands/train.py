"""Train a video autoencoder: from configuration to trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from os.path import exists
from os.path import isfile as is_file
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from vae3d.checkpoints.state import starting_state
from vae3d.commands.closing import command, curves, longer, shown, start_of
from vae3d.commands.summary import data_summary, frame_counts, summary
from vae3d.config.sources import sources_of
from vae3d.data.batch_schedule import BatchSchedule, FrameCounts, Interleaved, Schedule
from vae3d.data.bucket_streams import SourceStreams, bucket_streams
from vae3d.data.buckets import Bucket, buckets_of
from vae3d.data.clips import ClipSettings, Stream, clip_lengths
from vae3d.data.depth import DepthSettings
from vae3d.data.file_table import FileTable, sizes_of
from vae3d.data.fingerprint import DataFingerprint, GroupedFingerprint, SourceFingerprints
from vae3d.data.held_out import HeldOut, held_out_of, in_turn, read_held_out, require_held_out
from vae3d.data.loader import Tables, TrainingData, read_tables, schedule_notes
from vae3d.data.media import DataError
from vae3d.data.readers import check_reader
from vae3d.data.sources import Table
from vae3d.data.streaming import (
    StreamingData,
    StreamingSchedule,
    StreamingSource,
    first_clips,
    is_streaming,
    stream_notes,
)
from vae3d.data.workers import usable_workers
from vae3d.distributed import all_gather_object, check_ranks_agree, init_training
from vae3d.errors import UserError
from vae3d.inference.scale import longest_clips
from vae3d.layout import place
from vae3d.loading import initialize, instantiate, load, load_with_checkpoint
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.metrics import build_metrics
from vae3d.models.compiled import compile_blocks
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.pruning import prune
from vae3d.models.registry import TARGET, is_known, target_of
from vae3d.models.spatial import SpatialVAE
from vae3d.models.taehv import TAEHV
from vae3d.models.wan import WanVAE
from vae3d.precision import DTYPES, set_cudnn_benchmark, slow_conv3d
from vae3d.seeding import seed_of
from vae3d.training.checkpointer import check_may_start
from vae3d.training.linear_code import fit_shortcut
from vae3d.training.loggers import Loggers, build_loggers
from vae3d.training.teacher import Distillation
from vae3d.training.vae_trainer import VaeTrainer
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    from vae3d.config.diffusion import DiffusionConfig
    from vae3d.config.schema import Data, Loss, TrainConfig


def build_objective(config: Loss) -> Objective:
    """The loss; terms of weight 0 are built only if they are logged."""
    terms = {
        name: WeightedTerm(instantiate(term.term), term.weight, tuple(term.ramp), term.log, term.reduction)
        for name, term in config.terms.items()
        if term.weight or term.log
    }
    weight = config.pixel_weight and instantiate(config.pixel_weight)
    return Objective(terms, config.reduction, weight, logvar=config.logvar)


def pixel_channels(model: Mapping[str, Any]) -> int:
    """Channels of the pixels of a configured model, of its 2D VAE if it has one."""
    return model.get("spatial", model).get("pixel_channels", 3)


def build_clip_settings(config: Data, channels: int = 3) -> ClipSettings:
    """channels: that the model takes; see pixel_channels."""
    shared = {field.name for field in fields(ClipSettings)} - {"depth", "channels"}
    depth = DepthSettings(**vars(config.depth)) if config.depth.mapping else None
    return ClipSettings(**{name: getattr(config, name) for name in shared}, depth=depth, channels=channels)


def build_schedule(
    config: TrainConfig | DiffusionConfig,
    lengths: np.ndarray,
    frames: FrameCounts,
    rank: int,
    world_size: int,
    **changes: Any,
) -> BatchSchedule:
    """changes: arguments of BatchSchedule that are not those of `config`."""
    settings = {
        "seed": config.run.seed,
        "batch_size": config.data.batch_size,
        "accumulate": config.trainer.accumulate,
        "rank": rank,
        "world_size": world_size,
        "overfit": config.data.overfit,
        "clips_per_file": config.data.clips_per_file,
    }
    return BatchSchedule(lengths, frames, **settings | changes)


def build_streams(
    config: TrainConfig | DiffusionConfig,
    name: str,
    own: Data,
    table: FileTable,
    settings: ClipSettings,
    rank: int,
    world_size: int,
) -> SourceStreams:
    """The streams of a source. name: empty for the only one. own: its settings. table: its training files.

    Raises DataError if no file has enough frames.
    """
    seed = seed_of(config.run.seed, "source", name) if name else config.run.seed
    overfit = config.data.overfit and not name  # of a mixture the whole schedule does
    make = partial(build_schedule, config, rank=rank, world_size=world_size, clips_per_file=own.clips_per_file)
    counts = frame_counts(own)
    if own.buckets is None:
        schedule = make(
            clip_lengths(table, settings),
            counts,
            by_length=table.stored("by_length"),
            batch_size=own.batch_size,
            seed=seed,
            overfit=overfit,
        )
        return SourceStreams([Stream(table, schedule, settings, name)], schedule)

    def of_bucket(
        lengths: np.ndarray, frames: FrameCounts, batch_size: int, bucket: str, rows: np.ndarray
    ) -> BatchSchedule:
        changes = {"batch_size": batch_size, "seed": seed_of(seed, "bucket", bucket), "overfit": False, "rows": rows}
        return make(lengths, frames, **changes)

    size = (own.height, own.width)
    return bucket_streams(
        table,
        settings,
        buckets_of(own.buckets, counts.all(), size, *sizes_of(table)),
        Bucket(own.frames.max, *size, own.batch_size),
        own.buckets.clips_multiple or world_size * config.trainer.accumulate,
        of_bucket,
        seed,
        name,
        overfit,
    )


@dataclass(frozen=True)
class SourceData:
    """What was read of a source. name: empty for the only one. own: its settings. settings: how its clips are cut, but
    for the sizes of buckets, which its streams have."""

    name: str
    own: Data
    settings: ClipSettings
    tables: Tables
    part: SourceStreams

    def lines(self, of: Iterable[str]) -> list[str]:
        """With the source's name in front."""
        return [f"{self.name}: {line}" if self.name else line for line in of]

    def reasons(self, of: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(path, reason) with the source's name in front of the reason."""
        return [(path, self.lines([reason])[0]) for path, reason in of]


def read_sources(
    config: TrainConfig | DiffusionConfig, channels: int, rank: int, world_size: int
) -> tuple[list[SourceData], Schedule, DataFingerprint | GroupedFingerprint | SourceFingerprints]:
    """Read the tables of all sources, and say in which order training takes their clips. channels: of the model.

    Raises DataError, with the name of the source.
    """
    data, sources = config.data, []
    for name, own in sources_of(data).items():
        settings, bucketed = build_clip_settings(own, channels), own.buckets is not None
        with naming_source(name):
            held_out = own.num_val_files if config.validation.every else 0
            check_reader(own.reader)
            source = instantiate(own.source)
            if is_streaming(source):
                raise DataError("a stream has no table: set streaming=false, or train an autoencoder on it alone")
            tables = read_tables(
                source, settings, held_out, own.max_broken, rank, world_size, stat_files=rank == 0, sizes=bucketed
            )
            part = build_streams(config, name, own, tables.train, settings, rank, world_size)
        sources.append(SourceData(name, own, settings, tables, part))
    schedule = sources[0].part.schedule
    if data.sources:
        weights = [data.sources[source.name].weight for source in sources]
        schedule = Interleaved([source.part.schedule for source in sources], weights, config.run.seed, data.overfit)
    fingerprints = {source.name: source.tables.fingerprint for source in sources}
    return sources, schedule, SourceFingerprints(fingerprints) if data.sources else fingerprints[""]


def build_training_data(config: TrainConfig, rank: int, world_size: int) -> TrainingData | StreamingData:
    """Read the tables of all sources and this rank's held-out clips. Raises DataError, with the name of the source."""
    data, validation = config.data, config.validation
    if not data.sources and is_streaming(source := instantiate(data.source)):
        return build_streaming_data(config, source, rank, world_size)
    sources, schedule, fingerprint = read_sources(config, pixel_channels(config.model), rank, world_size)
    notes, errors, skipped_files, warnings = [], [], [], []
    possible: list[list[HeldOut]] = []
    for source in sources:
        tables, part = source.tables, source.part
        notes += source.lines([*tables.notes, *part.notes, *schedule_notes(part.schedule)])
        errors += source.reasons(tables.errors)
        skipped_files += source.reasons([*tables.skipped_files, *part.skipped_files])
        warnings += source.lines(part.warnings)
        if validation.every:
            buckets = None if source.own.buckets is None else [stream.bucket for stream in part.streams]
            clips = held_out_of(tables.val, source.settings, validation.frames, validation.clips, source.name, buckets)
            possible.append(clips)
            if source.name and not clips:
                notes.append(
                    f"{source.name}: is not validated, since no held-out file has validation.frames={validation.frames}"
                )
    chosen = in_turn(possible, validation.clips)
    held_out: list[ClipBatch] = []
    if validation.every:
        require_held_out(chosen, validation.frames, sum(len(source.tables.val) for source in sources))
        held_out, more = read_held_out(chosen, validation.frames, rank, world_size)
        errors += more
    workers, note = usable_workers(data.workers)
    return TrainingData(
        [stream for source in sources for stream in source.part.streams],
        schedule,
        workers,
        data.prefetch,
        held_out,
        errors,
        [*notes, *note],
        skipped_files,
        data.timeout,
        fingerprint,
        [clip.groups for clip in chosen],
        warnings,
    )


def build_streaming_data(config: TrainConfig, source: StreamingSource, rank: int, world_size: int) -> StreamingData:
    """Raises DataError for a stream that cannot be read, has no rows for validation, or
    needs what only a table gives."""
    data, validation = config.data, config.validation
    check_reader(data.reader)
    settings = build_clip_settings(data, pixel_channels(config.model))
    if data.buckets is not None:
        raise DataError("data.buckets needs the sizes of all files: set data.source.streaming=false")
    if data.clips_per_file > 1:
        raise DataError("data.clips_per_file needs random access to files: set data.source.streaming=false, or 1")
    if data.overfit:
        raise DataError("data.overfit repeats clips, which a stream cannot: set data.source.streaming=false")
    stream = source.stream("train")
    held_out, errors = [], []
    if validation.every:
        rows = source.stream("val")
        if rows is None:
            raise DataError(
                f"{stream.name}: a stream holds no rows out: name a split in data.source.val_split (for shards, others "
                "in data.source.val_path), or set validation.every=0"
            )
        held_out, errors = first_clips(rows, settings, validation.frames, validation.clips, rank, world_size)
    workers, note = usable_workers(data.workers)
    schedule = StreamingSchedule(
        frame_counts(data), config.run.seed, data.batch_size, config.trainer.accumulate, rank, world_size
    )
    notes = [*stream_notes(stream, source.shuffle, world_size * max(1, workers)), *note]
    return StreamingData(
        stream,
        schedule,
        settings,
        source.shuffle,
        workers,
        data.prefetch,
        held_out,
        errors,
        notes,
        timeout=data.timeout,
    )


@contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Put the name of a source in front of the messages of DataErrors; nothing if it is empty."""
    try:
        yield
    except DataError as error:
        if not name:
            raise
        raise DataError(f"data.sources.{name}: {error}") from error


def loggers_of(config: TrainConfig | DiffusionConfig) -> Loggers:
    other = {name: instantiate(node) for name, node in config.logger.other.items()}
    return build_loggers(config.logger, config.run.root, other)


def build_distillation(config: TrainConfig, teacher: nn.Module | None, student: nn.Module) -> Distillation | None:
    if teacher is None:
        return None
    settings = config.teacher
    return Distillation(
        teacher,
        student,
        dtype=DTYPES[settings.precision],
        sample=settings.sample,
        decode=settings.decode,
        features=settings.features,
        seed=config.run.seed,
        cache=settings.cache,
        cache_gib=settings.cache_gib,
    )


def fit_shortcut_everywhere(
    config: TrainConfig, model: SpatialVAE | OpenSoraVAE, data: TrainingData | StreamingData, device: torch.device
) -> list[str]:
    """Fit the shortcut on the first rank, and give all ranks the result. Moves the model to `device`. Returns lines
    that describe the fit.

    Raises UserError, on every rank, if it cannot be fitted.
    """
    errors: list[tuple[str, str]] = []
    line, failure = "", None
    model.to(device)  # to stay there
    if PartialState().is_main_process:
        clips = longest_clips(data, config.stage.fit_shortcut, errors)
        try:
            line = fit_shortcut(model, clips, config.run.seed)
        except UserError as error:
            failure = error
    vae = model.temporal_vae if isinstance(model, OpenSoraVAE) else model
    layers = nn.ModuleList([vae.shortcut_in, vae.shortcut_out])
    fitted = {name: weight.cpu() for name, weight in layers.state_dict().items()}  # for ranks of other devices
    line, failure, errors, weights = all_gather_object((line, failure, errors, fitted))[0]
    if failure is not None:
        raise failure
    layers.load_state_dict(weights)
    return [line, *(f"skipped: {path}: {reason}" for path, reason in errors)]


def prune_everywhere(
    config: TrainConfig, model: VideoAutoencoder, data: TrainingData | StreamingData, device: torch.device
) -> list[str]:
    """Prune stage.init_from.prune to the model on the first rank, and give all ranks the result. Returns lines that
    describe it.

    Raises UserError, on every rank, if it cannot be pruned.
    """
    errors: list[tuple[str, str]] = []
    lines, failure, settings = [], None, config.stage.prune
    if PartialState().is_main_process:
        path = config.stage.init_from["prune"]
        try:
            with torch.random.fork_rng(devices=[]):  # all ranks go on with the same random numbers
                variant = {"variant": model.variant} if hasattr(model, "variant") else {}
                larger = load_with_checkpoint(path, changes=variant, adapter=isinstance(model, DiffusersVAE))[1]
            larger = larger.to(device)
            clips = [clip.to(device).video for clip in longest_clips(data, settings.clips, errors)]
            if not clips:
                raise UserError(f"{path} cannot be pruned: no clip could be read")
            options = {"importance": settings.importance, "refit": settings.refit, "seed": config.run.seed}
            lines = [f"{path} {line}" for line in prune(larger, model.to(device), torch.cat(clips), **options)]
        except UserError as error:
            failure = error
        model.cpu()
    lines, failure, errors, weights = all_gather_object((lines, failure, errors, model.state_dict()))[0]
    if failure is not None:
        raise failure
    model.load_state_dict(weights)
    return [*lines, *(f"skipped: {path}: {reason}" for path, reason in errors)]


def build_trainer(config: TrainConfig, folder: Path) -> VaeTrainer:
    """Build the trainer, resume it, lock the run's folder and open its log; ready to `fit`."""
    if config.trainer.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("trainer.precision is fp16, which needs a GPU; use bf16 or fp32")
    check_may_start(folder, config.run.resume)
    resumes = starting_state(folder / "checkpoints", config.run.resume_from) is not None
    accelerator = init_training(config.trainer.precision)
    check_ranks_agree(asdict(config))
    data = build_training_data(config, accelerator.process_index, accelerator.num_processes)
    check_ranks_agree({**data.fingerprint.digests(), "data: clips per step": data.clips_per_step()})
    shapes = {shape._replace(stream=0) for shape in data.shapes()}
    set_cudnn_benchmark(len(shapes))
    objective = build_objective(config.loss)
    objective.load(accelerator.device)
    validation = config.validation
    measured = [*validation.metrics, *validation.slow_metrics] if validation.every else []
    metrics = build_metrics(measured, accelerator.device)
    torch.manual_seed(config.run.seed)
    model = instantiate(config.model)
    if config.stage.no_micro_batching and hasattr(model, "micro_frames"):
        model.micro_frames = None
    anchored = config.optim.proximal > 0  # needs the initial weights also where a checkpoint replaces them
    started = []
    if isinstance(config.stage.init_from, dict) and "prune" in config.stage.init_from:
        if not resumes:
            started = prune_everywhere(config, model, data, accelerator.device)
    elif anchored or not resumes:
        started = initialize(model, config.stage.init_from)
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
    trainer.setup()
    for line in [*summary(config, model, accelerator.num_processes), *data_summary(config, data), *started]:
        trainer.log.say(line)
    for line in data.warnings:
        trainer.log.warn(line)
    if isinstance(model, TAEHV) and config.teacher.path is None and {"all", "encoder"} & config.stage.train.keys():
        trainer.log.warn(f"no teacher (teacher=none): the latents will drift away from those of {model.variant}")
    if not is_known(config.model):
        trainer.log.warn(
            f"{config.model['_target_']} is not in MODELS of vae3d/models/registry.py: only vae3d.load(path, model) "
            "will open the exports of this run"
        )
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
        has_split = trainer.data.streams[0].table.has("split")
        alone = files[0] if trainer.data.held_out and len(set(files)) == 1 and is_file(files[0]) else None
        found += _reconstruct(config, has_split, alone, run, f"{run}/reconstructed-{trainer.step}")
    return [pair for pair in (*found, curves(trainer.folder)) if pair]


def _reconstruct(
    config: TrainConfig, has_split: bool, held_out: str | None, run: str, out: str
) -> list[tuple[str, str]]:
    """Reconstruct files of the run's data and score them; nothing for data that infer.py does not read.

    Held-out ones, if the table says which they are, or there is just one, `held_out`.
    """
    source, data = config.data.source, config.data
    if source is None or not isinstance(source.get("path"), str):  # None: a mixture
        return []
    if source.get("streaming") and not exists(source["path"]):
        return []
    has_split = has_split and source[TARGET] == target_of(Table)
    alone = held_out is not None and not has_split
    settings = {
        "checkpoint": run,
        "source": shown(Path(held_out)) if alone else source["path"],
        "root": None if alone else source.get("root"),
        "split": "val" if has_split else None,
        "num_samples": config.validation.clips,
        "num_frames": config.validation.frames,
        "height": data.height,
        "width": data.width,
    }
    if config.teacher.path is not None:
        compared = command("compare", **settings, teacher=config.teacher.path, save_dir=out)
        return [("every encoder with every decoder, of model and teacher", compared)]
    score = f"{start_of('eval')} --base {quote(out)} --metric {' '.join(config.validation.metrics)}"
    purpose = "reconstruct held-out files" if alone or has_split else "reconstruct files, some of which were trained on"
    return [(purpose, command("infer", **settings, save_dir=out)), ("score them", score)]

"""From configuration to objects: the only module that calls hydra.utils.instantiate."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import pandas as pd
import torch
from accelerate.utils import gather_object
from torch import nn

from vae3d.checkpoints.formats import Checkpoint, CheckpointError, as_checkpoint_error, load_state, read_checkpoint
from vae3d.checkpoints.state import starting_state
from vae3d.config import CONF
from vae3d.data.clips import ClipSettings
from vae3d.data.depth import DepthSettings
from vae3d.data.loader import TrainingData, lengths_of, look_for_files, read_tables, validation_clips
from vae3d.data.record import record_of
from vae3d.data.sampler import FrameCounts, Lengths, Plan
from vae3d.engine.agreement import check_ranks_agree
from vae3d.engine.distillation import Distillation
from vae3d.engine.freeze import train_parts
from vae3d.engine.start import refuse_to_go_on, training_ranks, working_ranks
from vae3d.engine.trainer import Trainer
from vae3d.errors import UserError
from vae3d.inference.comparison import Comparer, Network
from vae3d.inference.files import command_of, cost_of, reconstruct_files, refuse_own_source, rows_of
from vae3d.inference.reconstruct import Reconstructor, Selection
from vae3d.inference.results import Results
from vae3d.latents.identity import digest_of, weights_hash
from vae3d.losses.objective import Objective, Weighted
from vae3d.metrics import build_metrics
from vae3d.models.compiled import compile_blocks, compile_steps
from vae3d.models.registry import build_model, is_known
from vae3d.models.spatial import SpatialVAE
from vae3d.models.taehv import TAEHV
from vae3d.models.tiling import Tiled
from vae3d.models.wan import WanVAE
from vae3d.precision import in_precision, slow_conv3d, without_tf32
from vae3d.summary import data_summary, frame_counts, summary

if TYPE_CHECKING:
    from vae3d.config import Data, InferConfig, Loss, Teacher, TrainConfig
    from vae3d.diffusion_config import DiffusionConfig

log = logging.getLogger("vae3d")
RANDOM = "random"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def instantiate(node: Mapping[str, Any]) -> Any:
    """The object that a `_target_` node describes; lists and dicts reach it as plain Python."""
    return hydra.utils.instantiate(node, _convert_="all")


def model_config(name: str, *overrides: str) -> dict[str, Any]:
    """The `model` node of conf/model/<name>.yaml with overrides such as "model.temporal.channels=32"."""
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("model", [f"model={name}", *overrides])
    return OmegaConf.to_container(composed.model, resolve=True)


def build(name: str, *overrides: str) -> nn.Module:
    """A randomly initialised model from its config name and overrides, in eval mode.

        vae3d.build("temporal_vae", "model.temporal.channels=32")

    Raises hydra's ConfigCompositionException for a name or key that does not exist.
    """
    return instantiate(model_config(name, *overrides)).eval()


def load(path: str | Path, model: nn.Module | None = None, *, part: str | None = None, **changes: Any) -> nn.Module:
    """A model with the weights at `path`, in eval mode, in fp32 on the CPU.

    path: a run folder, an export, published weights (a folder or a file); the layout is recognised from the
    keys. part: which VAE, of a file that holds several, such as "ema_model"; path may be weights.ckpt::ema_model, too.
    model: load into this one instead of building what the checkpoint describes. changes: constructor
    arguments that differ from the checkpoint's, as in vae3d.load(path, micro_frames=None, spatial={"frame_batch": 1}).
    Nothing in the files is run, and no class is looked up by a name in them; see vae3d.models.registry.
    Raises CheckpointError with everything that is missing or does not fit, and for a configuration beside the weights
    that does not build a model of this project.
    """
    return opened(path, model, changes, part)[1]


def opened(
    path: str | Path,
    model: nn.Module | None = None,
    changes: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> tuple[Checkpoint, nn.Module]:
    """As load, with the checkpoint that was read."""
    changes = changes or {}
    checkpoint = read_checkpoint(
        path, changes.get("variant", getattr(model, "variant", None)), part, own_model=model is not None
    )
    if (Path(path) / "exports").is_dir():
        log.info("%s: using its newest export, %s", path, checkpoint.path.parent.name)
    for note in checkpoint.notes:
        if not ("scaling_factor" in changes and "scaling factor" in note):
            log.info("%s: %s", checkpoint.path, note)
    if model is None:
        model = build_checkpoint(checkpoint, changes)
    elif changes:
        raise ValueError(f"changes to a model's arguments ({', '.join(changes)}) cannot be made to a given model")
    load_state(model, checkpoint.state, f"{checkpoint.path} ({checkpoint.layout})")
    return checkpoint, model.eval()


def build_checkpoint(checkpoint: Checkpoint, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that a checkpoint describes, without its weights. Raises CheckpointError if it describes none."""
    with as_checkpoint_error():
        return build_model(merged(checkpoint.config, changes or {}), checkpoint.path)


def initialize(model: nn.Module, init_from: str | Mapping[str, str]) -> list[str]:
    """Give `model` its first weights: `random`, a checkpoint, or {submodule: checkpoint}. Returns what was done."""
    if isinstance(init_from, str):
        init_from = {"": init_from}
    done = []
    for name, path in init_from.items():
        what = name or "the model"
        if path == RANDOM:
            done.append(f"{what} starts from random weights")
            continue
        target = model.get_submodule(name)
        checkpoint = read_checkpoint(path, getattr(target, "variant", None), own_model=True)
        load_state(
            target, checkpoint.part(name) if name else checkpoint.state, f"{checkpoint.path} ({checkpoint.layout})"
        )
        done += [f"{what} starts from {checkpoint.path} ({checkpoint.layout})", *checkpoint.notes]
        convention = checkpoint.config.get("latent")
        if convention is not None and convention != getattr(target, "latent", convention):
            done.append(f"its latents were {convention} and are {target.latent} from here on")
        if differing := _factors(target, checkpoint):
            if not name and not isinstance(target, SpatialVAE):  # of which only normalize reads its factors
                raise CheckpointError(f"{checkpoint.path} does not fit the model: {differing}")
            done.append(differing)
    return done


def objective(config: Loss) -> Objective:
    """Terms of weight 0 that are not logged are not even built."""
    terms = {
        name: Weighted(instantiate(term.term), term.weight, tuple(term.ramp), term.log, term.reduction)
        for name, term in config.terms.items()
        if term.weight or term.log
    }
    weight = config.pixel_weight and instantiate(config.pixel_weight)
    return Objective(terms, config.reduction, weight, logvar=config.logvar)


def clip_settings(config: Data) -> ClipSettings:
    shared = {field.name for field in fields(ClipSettings)} - {"depth"}
    depth = DepthSettings(**vars(config.depth)) if config.depth.mapping else None
    return ClipSettings(**{name: getattr(config, name) for name in shared}, depth=depth)


def plan_of(
    config: TrainConfig | DiffusionConfig, lengths: Lengths, frames: FrameCounts, rank: int, world_size: int
) -> Plan:
    return Plan(
        lengths,
        frames,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        accumulate=config.trainer.accumulate,
        rank=rank,
        world_size=world_size,
        overfit=config.data.overfit,
    )


def training_data(config: TrainConfig, rank: int, world_size: int) -> TrainingData:
    data, validation = config.data, config.validation
    settings = clip_settings(data)
    tables = read_tables(instantiate(data.source), settings, data.holdout if validation.every else 0, data.max_broken)
    plan = plan_of(config, lengths_of(tables.train, settings), frame_counts(data), rank, world_size)
    held_out, faults = [], tables.faults
    if validation.every:
        held_out, more = validation_clips(tables.val, settings, validation.frames, validation.clips, rank, world_size)
        faults = faults + more
    return TrainingData(
        tables.train,
        plan,
        settings,
        data.workers,
        data.prefetch,
        held_out,
        faults,
        tables.notes,
        tables.left_out,
        data.timeout,
        record_of(pd.concat([tables.train, tables.val], ignore_index=True), look=rank == 0),
    )


def teacher(config: Teacher, device: torch.device | str = "cpu") -> nn.Module | None:
    """The teacher's network. Raises CheckpointError if it cannot be loaded: a run never goes on without it."""
    return None if config.path is None else load(config.path).to(device)


def distillation(config: TrainConfig, teacher: nn.Module | None, student: nn.Module) -> Distillation | None:
    if teacher is None:
        return None
    told = config.teacher
    dtype = DTYPES[told.precision] or torch.float32
    return Distillation(
        teacher,
        student,
        dtype=dtype,
        sample=told.sample,
        decode=told.decode,
        features=told.features,
        seed=config.run.seed,
    )


def trainer(config: TrainConfig, folder: Path) -> Trainer:
    """Everything that a run needs, ready to `fit`."""
    if config.trainer.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("trainer.precision is fp16, which needs a GPU; use bf16 or fp32")
    refuse_to_go_on(folder, config.run.resume)
    resumes = starting_state(folder / "checkpoints", config.run.resume_from) is not None
    accelerator = training_ranks(config.trainer.precision)
    check_ranks_agree(asdict(config))
    with accelerator.main_process_first():  # which probes the files; the others find its answers on disk
        data = training_data(config, accelerator.process_index, accelerator.num_processes)
    check_ranks_agree(data.record.identity())
    terms = objective(config.loss)
    terms.load(accelerator.device)
    validation = config.validation
    measured = [*validation.metrics, *validation.seldom] if validation.every else []
    metrics = build_metrics(measured, accelerator.device)
    torch.manual_seed(config.run.seed)
    model = instantiate(config.model)
    if config.stage.whole_clips and hasattr(model, "micro_frames"):
        model.micro_frames = None
    anchored = config.optim.proximal > 0  # needs the weights of the start, whether or not they are about to be replaced
    started = initialize(model, config.stage.init_from) if anchored or not resumes else []
    if anchored and resumes:
        started = [f"optim.proximal pulls towards stage.init_from={config.stage.init_from}"]
    if config.trainer.compile:
        compile_blocks(model, dynamic=None if len(data.plan.frames.all()) > 1 else False)
    built = Trainer(
        config,
        folder,
        accelerator,
        model,
        terms,
        instantiate(config.adversary),
        data,
        metrics,
        instantiate(config.logger),
        distillation(config, teacher(config.teacher, accelerator.device), model),
    )
    for line in [*summary(config, model, accelerator.num_processes), *data_summary(config, data), *started]:
        built.log.say(line)
    if isinstance(model, TAEHV) and config.teacher.path is None and {"all", "encoder"} & config.stage.train.keys():
        built.log.warn(
            f"no teacher (teacher=none): nothing keeps the latents those of {model.variant}; they become its own"
        )
    if not is_known(config.model):
        built.log.warn(
            f"{config.model['_target_']} is not in MODELS of vae3d/models/registry.py: only vae3d.load(path, model) "
            "will open the exports of this run"
        )
    if isinstance(model, WanVAE) and config.trainer.precision != "fp32" and (fault := slow_conv3d()):
        built.log.say(fault)
    return built


def infer(config: InferConfig) -> None:
    """Reconstruct the files that `config` names."""
    ranks, device = working_ranks(config.device)
    _set_precision(config.precision)
    selection = Selection(
        **{
            name: getattr(config, name)
            for name in ("start", "num_frames", "stride", "fps", "height", "width", "reader")
        }
    )
    metrics = build_metrics(config.metrics, device)
    if config.height and config.width:
        reasons = (m.refuses(config.num_frames or sys.maxsize, config.height, config.width) for m in metrics)
        if faults := [reason for reason in reasons if reason]:
            raise UserError(f"metrics: {'; '.join(faults)}")
    checkpoint, model = opened(config.checkpoint, changes=config.model)
    model = model.to(device)
    if isinstance(spatial := getattr(model, "spatial_vae", model), SpatialVAE):
        spatial.frame_batch = config.frame_batch
    if config.compile:
        compile_steps(model)
    reconstructor = Reconstructor(
        model,
        config.save_dir,
        selection,
        codec=config.codec,
        sample=config.sample,
        seed=config.seed,
        dtype=DTYPES[config.precision],
        metrics=metrics,
        memory_gib=config.memory_gib,
        open_stream=_tiled(model, config.tile, config.tile_overlap).stream if config.tile else None,
    )
    comparer = _comparer(config, reconstructor, ranks.is_main_process)
    table = rows_of(config.source, config.root, config.split, config.num_samples)
    refuse_own_source(reconstructor, config.source)
    main, results = ranks.is_main_process, Results(reconstructor)
    with results.locked() if main else nullcontext():
        if main:
            networks = {"checkpoint": model, "teacher": comparer and comparer.networks["teacher"].model}
            hashes = {name: network and weights_hash(network.state_dict()) for name, network in networks.items()}
            hashes["checkpoint's configuration"] = digest_of(checkpoint.config)
            results.begin(command_of(asdict(config), hashes, table), config.overwrite)
        cost = cost_of(reconstructor, table) if config.cost and main else None
        ranks.wait_for_everyone()
        reconstruct_files(
            reconstructor,
            table,
            skip_errors=config.on_error == "skip",
            rank=ranks.process_index,
            world_size=ranks.num_processes,
            gather=gather_object,
            cost=cost,
            comparer=comparer,
        )


def _comparer(config: InferConfig, reconstructor: Reconstructor, measures: bool) -> Comparer | None:
    """What compares with the teacher, if there is one; of the metrics it takes, beside PSNR and SSIM, LPIPS."""
    path, precision = config.teacher.path, config.teacher.precision
    if path is None:
        return None
    _set_precision(precision)
    teacher = in_precision(load(path).to(reconstructor.device), DTYPES[precision] or torch.float32)
    lpips = [name for name in config.metrics if name.startswith("lpips")]
    return Comparer(
        reconstructor,
        Network(reconstructor.model, config.checkpoint, config.precision, DTYPES[config.precision]),
        Network(teacher, path, precision),
        build_metrics(["psnr", "ssim", *lpips], reconstructor.device),
        pictures=config.strip,
        measures=measures,
    )


def _set_precision(precision: str) -> None:
    if precision == "fp32":
        without_tf32()
    elif fault := slow_conv3d():
        log.warning(fault)


def _tiled(model: nn.Module, tile: int, overlap: int | None) -> Tiled:
    if not isinstance(model, WanVAE):
        raise UserError(f"tile={tile}: a {type(model).__name__} cannot be coded in tiles; set frame_batch instead")
    try:
        return Tiled(model, tile, overlap)
    except ValueError as error:
        raise UserError(f"tile={tile}, tile_overlap={overlap}: {error}") from error


def describe(config: TrainConfig) -> None:
    """Log what a configuration means: parts, parameters, latent shapes, batches, files.

    Builds the model without memory. Opens the table, but no file of it. Raises DataError for data that no run can read.
    """
    with torch.device("meta"):
        model = instantiate(config.model)
    train_parts(model, config.stage.train)
    files = look_for_files(instantiate(config.data.source), config.data.max_broken)
    log.info("\n".join([*summary(config, model), *files]))


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config with changes, node by node."""
    both = {k for k in changes if isinstance(changes[k], Mapping) and isinstance(config.get(k), dict)}
    return {**config, **{k: merged(config[k], v) if k in both else v for k, v in changes.items()}}


def _factors(target: nn.Module, checkpoint: Checkpoint) -> str:
    """How the latent scale that the weights were made for differs from the model's; empty if it does not."""
    spatial = getattr(target, "spatial_vae", target)
    told = checkpoint.config.get("spatial", checkpoint.config)
    differing = [
        f"{name} is {told[name]} in the checkpoint and {getattr(spatial, name)} in the model"
        for name in ("scaling_factor", "shift_factor")
        if hasattr(spatial, name) and told.get(name) not in (None, getattr(spatial, name))
    ]
    return " and ".join(differing)

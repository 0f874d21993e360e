"""Reconstruct videos: from configuration to files."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from torch import nn

from vae3d.errors import UserError
from vae3d.inference.comparison import Comparer, Network
from vae3d.inference.files import check_not_own_source, command_of, cost_of, reconstruct_files, rows_of
from vae3d.inference.reconstruct import Reconstructor, Selection
from vae3d.inference.results import Results
from vae3d.latents.identity import digest_of, weights_hash
from vae3d.loading import load, log, opened
from vae3d.metrics import build_metrics
from vae3d.models.compiled import compile_steps
from vae3d.models.spatial import SpatialVAE
from vae3d.models.tiling import Tiled
from vae3d.models.wan import WanVAE
from vae3d.precision import DTYPES, autocast_dtype, cast_keep_stats, disable_tf32, slow_conv3d
from vae3d.training.start import working_ranks

if TYPE_CHECKING:
    from vae3d.config.schema import InferConfig


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
        reasons = (m.why_unsupported(config.num_frames or sys.maxsize, config.height, config.width) for m in metrics)
        if errors := [reason for reason in reasons if reason]:
            raise UserError(f"metrics: {'; '.join(errors)}")
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
        dtype=autocast_dtype(config.precision),
        metrics=metrics,
        memory_gib=config.memory_gib,
        open_stream=_tiled(model, config.tile, config.tile_overlap).stream if config.tile else None,
    )
    comparer = _comparer(config, reconstructor, ranks.is_main_process)
    table = rows_of(config.source, config.root, config.split, config.num_samples)
    check_not_own_source(reconstructor, config.source)
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
    teacher = cast_keep_stats(load(path).to(reconstructor.device), DTYPES[precision])
    lpips = [name for name in config.metrics if name.startswith("lpips")]
    return Comparer(
        reconstructor,
        Network(reconstructor.model, config.checkpoint, config.precision, autocast_dtype(config.precision)),
        Network(teacher, path, precision),
        build_metrics(["psnr", "ssim", *lpips], reconstructor.device),
        pictures=config.strip,
        measures=measures,
    )


def _set_precision(precision: str) -> None:
    if precision == "fp32":
        disable_tf32()
    elif error := slow_conv3d():
        log.warning(error)


def _tiled(model: nn.Module, tile: int, overlap: int | None) -> Tiled:
    if not isinstance(model, WanVAE):
        raise UserError(f"tile={tile}: a {type(model).__name__} cannot be coded in tiles; set frame_batch instead")
    try:
        return Tiled(model, tile, overlap)
    except ValueError as error:
        raise UserError(f"tile={tile}, tile_overlap={overlap}: {error}") from error

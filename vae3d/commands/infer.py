"""Reconstruct videos and images: from configuration to files."""

from __future__ import annotations

import logging
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig

from vae3d.checkpoints.formats import Checkpoint
from vae3d.distributed import init_inference
from vae3d.errors import UserError
from vae3d.hashing import json_hash, weights_hash
from vae3d.inference.comparison import Comparer
from vae3d.inference.files import (
    check_not_own_source,
    command_record,
    measure_first_file,
    reconstruct_files,
    select_rows,
)
from vae3d.inference.reconstruct import Reconstructor
from vae3d.inference.results import Results
from vae3d.layout import place
from vae3d.loading import load_with_checkpoint, require_file_channels
from vae3d.metrics import build_metrics
from vae3d.models.compiled import compile_steps
from vae3d.models.cuda_graphs import graph_steps
from vae3d.precision import disable_tf32, slow_conv3d

if TYPE_CHECKING:
    from vae3d.config.schema import InferConfig

log = logging.getLogger("vae3d")


def run(config: InferConfig) -> None:
    """Reconstruct the files of config.source, shared among the ranks."""
    ranks, device = init_inference(config.device)
    checkpoint, reconstructor = build_reconstructor(config, device)
    reconstruct(ranks, checkpoint, reconstructor, command_line("infer"))


def command_line(name: str) -> str:
    """The command as it was typed, for pages; empty if Hydra did not start it."""
    if not HydraConfig.initialized():
        return ""
    return shlex.join(["vae3d", name, *(word.lstrip("+") for word in HydraConfig.get().overrides.task)])


def build_reconstructor(config: InferConfig, device: torch.device) -> tuple[Checkpoint, Reconstructor]:
    """Load the model and set it up for inference. Raises UserError for metrics that cannot score such frames."""
    set_precision(config.precision)
    metrics = build_metrics(config.metrics, device)
    checkpoint, model = load_with_checkpoint(config.checkpoint, changes=config.model)
    model = place(model, device)
    require_file_channels(model, config.checkpoint)
    if model.pixel_channels == 4 and config.codec != "lossless":
        raise UserError(f"codec={config.codec} keeps no alpha, which {config.checkpoint} has; use codec=lossless")
    frames, height, width = (size or sys.maxsize for size in (config.num_frames, config.height, config.width))
    if reasons := metrics.reasons(frames, height, width, model.pixel_channels):
        raise UserError(f"metrics: {'; '.join(reasons.values())}")
    model.set_frame_batch(config.frame_batch)
    if config.compile:
        compile_steps(model)
    if config.cuda_graphs:
        try:
            graph_steps(model)
        except UserError as error:
            raise UserError(f"cuda_graphs=true: {error}; use cuda_graphs=false") from error
    if config.tile:
        model.set_tiles(config.tile, config.tile_overlap)
    return checkpoint, Reconstructor(model, config, metrics, model.stream)


def reconstruct(
    ranks: PartialState,
    checkpoint: Checkpoint,
    reconstructor: Reconstructor,
    command: str,
    comparer: Comparer | None = None,
) -> None:
    """Reconstruct all files; those that the same command finished before are kept.

    command: to show on pages. comparer: also compare the model with a teacher. The main process holds the lock of
    save_dir meanwhile.
    """
    config = reconstructor.config
    table = select_rows(config.source, config.root, config.split, config.num_samples)
    check_not_own_source(reconstructor)
    main, results = ranks.is_main_process, Results(reconstructor, comparer)
    with results.locked() if main else nullcontext():
        if main:
            networks = {"checkpoint": reconstructor.model}
            if comparer is not None:
                networks["teacher"] = comparer.networks["teacher"].model
            hashes = {name: weights_hash(network.state_dict()) for name, network in networks.items()}
            hashes["checkpoint's configuration"] = json_hash(checkpoint.config)
            results.begin(command_record(asdict(config), hashes, table), config.overwrite)
        cost = measure_first_file(reconstructor, table) if config.cost and main else None
        ranks.wait_for_everyone()
        reconstruct_files(results, table, ranks.process_index, ranks.num_processes, cost, command)


def set_precision(precision: str) -> None:
    """Turn TF32 off for fp32; warn of slow 3D convolutions in the other precisions."""
    if precision == "fp32":
        disable_tf32()
    elif warning := slow_conv3d():
        log.warning(warning)

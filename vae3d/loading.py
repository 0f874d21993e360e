"""From configuration to objects: the only module that calls hydra.utils.instantiate."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from torch import nn

from vae3d.checkpoints.formats import Checkpoint, CheckpointError, as_checkpoint_error, load_state, read_checkpoint
from vae3d.config.schema import CONF
from vae3d.errors import UserError
from vae3d.latents.codec import LatentCodec
from vae3d.models.registry import build_model
from vae3d.models.spatial import SpatialVAE
from vae3d.precision import DTYPES

log = logging.getLogger("vae3d")
RANDOM = "random"


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


def open_codec(
    path: str | Path,
    *,
    pixel_range: str = "signed",
    precision: str = "fp32",
    chunk_frames: int | None = None,
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> LatentCodec:
    """The codec of whatever vae3d.load opens; see LatentCodec.

    precision: fp32, bf16 or fp16. changes: to the model's arguments, as vae3d.load takes them.
    Raises CheckpointError if it does not load, strictly; UserError for settings that the model does not take.
    """
    checkpoint, model = opened(path, changes=changes)
    config = merged(checkpoint.config, changes or {})
    try:
        codec = LatentCodec(
            model, pixel_range=pixel_range, dtype=DTYPES[precision], chunk_frames=chunk_frames, config=config
        )
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    return codec.to(device)

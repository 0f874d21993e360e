"""Models from names and checkpoints: build, load, initialize, open_codec.

Here, and only here, Hydra turns a `_target_` node into an object.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException, InstantiationException
from torch import nn

from vae3d.arguments import ArgumentError, short
from vae3d.checkpoints.export import WRITERS, check_target
from vae3d.checkpoints.formats import (
    Checkpoint,
    CheckpointError,
    as_checkpoint_error,
    load_weights,
    meta_model,
    read_checkpoint,
)
from vae3d.config.adapter import adapter_issues
from vae3d.config.issues import close_match, walk
from vae3d.config.schema import CONF
from vae3d.errors import UserError
from vae3d.io import FileError, atomic_files, naming, parse_yaml, yaml_text
from vae3d.latents.codec import LatentCodec
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.pixel_channels import RGB, fit_channels
from vae3d.models.registry import TARGET, build_model, config_of, target_of
from vae3d.models.spatial import SpatialVAE
from vae3d.models.wan import WanVAE
from vae3d.precision import DTYPES
from vae3d.text import plural

log = logging.getLogger("vae3d")
RANDOM = "random"


def instantiate(node: Mapping[str, Any], key: str = "") -> Any:
    """The object that a `_target_` node describes. Lists and dicts in it become plain Python ones.

    key: of the node, which its ArgumentErrors then name. Raises what its values raise: a UserError, or another
    ValueError; InstantiationException for errors of other types.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if not isinstance(cause, ValueError):
            raise
    if key and isinstance(cause, ArgumentError):
        raise ArgumentError(f"{key}.{cause}") from cause
    raise cause


def model_config(name: str, *overrides: str) -> dict[str, Any]:
    """The `model` node of conf/model/<name>.yaml with overrides such as "model.temporal.channels=32".

    Raises UserError if the name or a key does not exist, or a value is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = list_models()
    if name not in names:
        raise UserError(f"no model is called {name}; there are {', '.join(names)}")
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("model", [f"model={name}", *overrides])
        missing = sorted(OmegaConf.missing_keys(composed.model))
        if missing:
            raise UserError(f"{name} needs {', '.join(missing)}, as in build({name!r}, '{missing[0]}=...')")
        tree = {"model": OmegaConf.to_container(composed.model, resolve=True)}
        for issue in adapter_issues(tree):
            raise UserError(f"{name}: {issue}")
        return tree["model"]
    except (HydraException, OmegaConfBaseException) as error:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            keys = [key for key, _ in walk(OmegaConf.to_container(hydra.compose("model", [f"model={name}"])))]
        unknown = [key for key in (o.partition("=")[0] for o in overrides) if key not in keys]
        hint = "".join(f"; did you mean {near}?" for key in unknown[:1] if (near := close_match(key, keys)))
        raise UserError(f"{name} with {' '.join(overrides)}: {str(error).splitlines()[0]}{hint}") from error


def list_models() -> list[str]:
    """Names that `build` takes."""
    return sorted(file.stem for file in (CONF / "model").glob("*.yaml"))


def build(name: str, *overrides: str) -> VideoAutoencoder:
    """Build a model with random weights, in eval mode, fp32, on the CPU.

        model = vae3d.build("temporal_vae", "model.temporal.channels=32")

    name: one of list_models(). overrides: `key=value` changes to it. Raises UserError if the name or a key does not
    exist, or a value is missing or wrong.
    """
    config = model_config(name, *overrides)
    try:
        return instantiate(config).eval()
    except ValueError as error:
        raise UserError(f"{name} with {' '.join(overrides)}: {error}") from error


def load(
    path: str | Path, model: nn.Module | None = None, *, part: str | None = None, **changes: Any
) -> VideoAutoencoder:
    """Load a model with its weights, in eval mode, fp32, on the CPU.

        model = vae3d.load("runs/opensora_stage3")                          # newest export of a run
        model = vae3d.load("Wan2.1_VAE.pth", micro_frames=None)             # published weights, changed argument
        model = vae3d.load("lightning.ckpt", part="ema_model")              # one of several VAEs in a file

    path: a run, an export, or published weights (folder or file); the keys tell the layout. `weights.ckpt::ema_model`
    also names a part. model: load the weights into this model instead of the one that the checkpoint describes.
    changes: constructor arguments that replace the checkpoint's; nested ones as spatial={"frame_batch": 1}.

    Safe for files from strangers: no code in them runs, and only models of vae3d.models.registry are built. Raises
    CheckpointError that lists all missing, unexpected and misshapen weights, or what is wrong with the configuration.
    """
    return load_with_checkpoint(path, model, changes, part)[1]


def load_with_checkpoint(
    path: str | Path,
    model: nn.Module | None = None,
    changes: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> tuple[Checkpoint, nn.Module]:
    """`load`, which also returns the checkpoint: layout, configuration and weights."""
    changes = changes or {}
    if model is not None and changes:
        raise UserError(f"{', '.join(changes)}: arguments of a model that is given cannot be changed")
    checkpoint = read_checkpoint(
        path,
        changes.get("variant", getattr(model, "variant", None)),
        part,
        own_model=model is not None,
        adapter=isinstance(model, DiffusersVAE),
    )
    if (Path(path) / "exports").is_dir():
        log.info("%s: using its newest export, %s", path, checkpoint.path.parent.name)
    for note in checkpoint.notes:
        if not ("scaling_factor" in changes and "scaling factor" in note):
            log.info("%s: %s", checkpoint.path, note)
    if model is None:
        model = build_from_checkpoint(checkpoint, changes)
    state = checkpoint.state
    if changes and isinstance(model, VideoAutoencoder):
        state, note = fit_channels(model, state)
        if note:
            log.info("%s: %s", checkpoint.path, note)
    load_weights(model, state, f"{checkpoint.path} ({checkpoint.layout})")
    return checkpoint, model.eval()


def build_from_checkpoint(checkpoint: Checkpoint, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that a checkpoint describes, with random weights. Raises CheckpointError."""
    with as_checkpoint_error():
        return build_model(merge(checkpoint.config, changes or {}), checkpoint.path)


def save(model: VideoAutoencoder, path: str | Path, *, layout: str = "export", **info: Any) -> None:
    """Write a model's weights and its configuration; replaces what an earlier call wrote there.

        vae3d.save(model, "mine")                              # a folder that vae3d.load opens
        vae3d.save(model, "wan_vae", layout="diffusers")       # for AutoencoderKLWan.from_pretrained
        vae3d.save(model, "wan.safetensors", layout="wan")     # one file, like Wan2.1_VAE.pth

    layout: export, or that of another program: diffusers, qwen_image, ldm, opensora, wan, videox_fun, taehv or
    taesd; see docs/checkpoints.md. path: a folder; for ldm, wan, videox_fun and taehv a file. info: plain values that
    an export holds beside the configuration.
    Raises CheckpointError if the model does not fit the layout, UserError for a model of another project, and FileError
    for a folder with other files, and for values in `info` that no export may hold.
    """
    if layout not in WRITERS:
        raise UserError(f"layout is {layout!r}; use one of {', '.join(WRITERS)}")
    if info and layout != "export":
        raise UserError(f"{', '.join(info)}: only an export holds further values; leave them out with layout={layout}")
    path = Path(path)
    check_target(path, layout)
    parse_yaml(yaml_text(info), str(path))  # an export with other values could not be read again
    checkpoint = Checkpoint(config_of(model), model.state_dict(), path, "export")
    with naming(path), atomic_files(path) as tmp:
        written = tmp / path.name
        WRITERS[layout](checkpoint, written, **info)
        if others := sorted(_names_in(path) - _names_in(written)):  # a folder is replaced as a whole
            raise FileError(f"{path} has other files, such as {others[0]}; choose a new folder, or delete them")
    for note in checkpoint.notes:
        log.info("%s: %s", path, note)


def _names_in(folder: Path) -> set[str]:
    """None of a file, and of a folder that another process replaces meanwhile."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def initialize(model: nn.Module, init_from: str | Mapping[str, str], any_scale: bool = False) -> list[str]:
    """Give a model its first weights before training; returns log lines that say where they are from.

    init_from: "random" (leaves the weights as they are), a checkpoint, or {submodule: "random" or checkpoint}.
    any_scale: another latent scale is only a log line, as where training measures its own.
    Raises CheckpointError if weights, or the latent scale that they were trained with, do not fit the model.
    """
    if isinstance(init_from, str):
        init_from = {"": init_from}
    lines = []
    for name, path in init_from.items():
        what = name or "the model"
        if path == RANDOM:
            lines.append(f"{what} starts from random weights")
            continue
        target = model.get_submodule(name)
        checkpoint = read_checkpoint(
            path, getattr(target, "variant", None), own_model=True, adapter=isinstance(target, DiffusersVAE)
        )
        state, note = checkpoint.part(name) if name else checkpoint.state, ""
        if isinstance(target, VideoAutoencoder):
            state, note = fit_channels(target, state)
        try:
            load_weights(target, state, f"{checkpoint.path} ({checkpoint.layout})")
        except CheckpointError as error:
            _check_class(target, checkpoint, name)
            raise CheckpointError(f"{error}{_wan_hint(target, checkpoint)}") from None
        lines += [
            f"{what} starts from {checkpoint.path} ({checkpoint.layout})",
            *checkpoint.notes,
            *([note] if note else []),
        ]
        lines += changed_variant(target, checkpoint)
        lines += check_scale(target, checkpoint, any_scale=any_scale or bool(name))
    return lines


def changed_variant(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Log lines if a TAEHV or TAESD is of another variant than its weights, or has other latents; shapes allow both."""
    if not hasattr(model, "variant") or checkpoint.config.get(TARGET) != target_of(type(model)):
        return []
    before = meta_model(checkpoint.config, checkpoint.path)
    return [
        f"model.{name} was {getattr(before, name)} in {checkpoint.path} and is {getattr(model, name)} from now on"
        for name in ("variant", "latent")
        if getattr(before, name) != getattr(model, name)
    ]


def _check_class(target: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Raises CheckpointError if the checkpoint holds another model, of whose weights `target` has none: a list of all
    tensors would not help. name: the submodule of stage.init_from; "" for the whole model."""
    ours, theirs = target_of(type(target)), checkpoint.config.get(TARGET)
    if theirs in (None, ours) or checkpoint.state.keys() & target.state_dict().keys():
        return
    parts = [] if name else [part for part, module in target.named_children() if target_of(type(module)) == theirs]
    key = f"stage.init_from.{name}" if name else "stage.init_from"
    raise CheckpointError(
        f"{checkpoint.path} ({checkpoint.layout}) does not fit the model: it holds {_a(theirs)}, and {key} needs "
        f"{_a(ours)}{f'; set stage.init_from.{parts[0]} to start this part from it' if parts else ''}"
    )


def _a(target: str) -> str:
    name = target.rpartition(".")[2]
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _wan_hint(model: nn.Module, checkpoint: Checkpoint) -> str:
    """A line with the settings that would make a WanVAE fit the weights; "" where these would not do it."""
    if not isinstance(model, WanVAE) or checkpoint.config.get(TARGET) != target_of(WanVAE):
        return ""
    name = "wan22" if checkpoint.config.get("shortcuts") else "wan"
    channels = checkpoint.config.get("pixel_channels", RGB)
    more = [f"model={name}"] if checkpoint.config.get("patch", 1) != model.patch else []
    more += [f"model.pixel_channels={channels}"] if channels not in (RGB, model.pixel_channels) else []
    return f"\nset {' '.join(more)}" if more else ""


def check_scale(model: nn.Module, checkpoint: Checkpoint, any_scale: bool = False) -> list[str]:
    """A log line if the checkpoint's latent scale differs from the model's, which is then used. Raises CheckpointError
    if it differs, unless `any_scale` is set or `model` is a SpatialVAE."""
    if not (differing := scale_difference(model, checkpoint)):
        return []
    line = " and ".join(
        f"{name} is {short(theirs)} in the checkpoint and {short(ours)} in the model"
        for name, (theirs, ours) in differing.items()
    )
    # A SpatialVAE reads its factors in `normalize` only, so other factors do not change its reconstructions.
    if any_scale or isinstance(model, SpatialVAE):
        return [f"{line}, which is used"]
    settings = " ".join(f"model.{name}={str(theirs).replace(' ', '')}" for name, (theirs, _) in differing.items())
    raise CheckpointError(f"{checkpoint.path} does not fit the model: {line}; set {settings}")


def scale_difference(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """{setting: its values in the checkpoint and the model} of latent scales that differ.

    A value that the checkpoint lacks, or that its reader assumed, fits any model.
    """
    parts = [("", model, checkpoint.config.get("spatial", checkpoint.config))]
    if hasattr(model, "spatial_vae"):
        parts = [("", model, checkpoint.config), ("spatial.", model.spatial_vae, checkpoint.config.get("spatial", {}))]
    found = {}
    for prefix, module, config in parts:
        for name in ("scaling_factor", "shift_factor"):
            if hasattr(module, name) and config.get(name) not in (None, getattr(module, name)):
                found[prefix + name] = (config[name], getattr(module, name))
        if not isinstance(module, VideoAutoencoder) or getattr(module, "latent", None) == "normalized":
            continue
        for name in ("latents_mean", "latents_std"):
            theirs = config.get(name)
            if theirs is None or name in checkpoint.assumed or name in module.state_dict():  # loaded with the weights
                continue
            ours = list(getattr(module.spec, name))
            if len(theirs) != len(ours) or not all(map(_close, theirs, ours)):
                found[prefix + name] = (theirs, ours)
    return found


def _close(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)


def merge(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config with `changes`; nested dicts are merged key by key."""
    nested = {k for k in changes if isinstance(changes[k], Mapping) and isinstance(config.get(k), dict)}
    return {**config, **{k: merge(config[k], v) if k in nested else v for k, v in changes.items()}}


def require_file_channels(model: nn.Module, path: str | Path, channels: Sequence[int] = (3, 4)) -> None:
    """Raises UserError for a model whose pixels no video or image has. path: of its checkpoint, for the message.
    channels: as files are read."""
    if model.pixel_channels not in channels:
        read_as = " or ".join({3: "RGB", 4: "RGBA"}[count] for count in channels)
        raise UserError(
            f"{path} takes {plural(model.pixel_channels, 'channel')} of pixels; files are read as {read_as} here: use "
            "vae3d.load and model(video), or vae3d.open_codec, from Python"
        )


def open_codec(
    path: str | Path,
    *,
    pixel_range: str = "signed",
    precision: str = "fp32",
    chunk_frames: int | None = None,
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
    tile: int | None = None,
    tile_overlap: int | None = None,
    tf32: bool = False,
) -> LatentCodec:
    """Open a checkpoint as a LatentCodec: pixels to normalized latents and back.

    path, changes: as for `load`. precision: fp32, bf16 or fp16. tile, tile_overlap: see VideoAutoencoder.set_tiles.
    tf32: see LatentCodec.
    Raises CheckpointError if the checkpoint does not load; UserError for settings that the model does not support.
    """
    if precision not in DTYPES:
        raise UserError(f"precision is {precision!r}; use one of {', '.join(DTYPES)}")
    checkpoint, model = load_with_checkpoint(path, changes=changes)
    model.set_tiles(tile, tile_overlap)
    config = merge(checkpoint.config, changes or {})
    try:
        codec = LatentCodec(
            model,
            pixel_range=pixel_range,
            dtype=DTYPES[precision],
            chunk_frames=chunk_frames,
            config=config,
            tf32=tf32,
        )
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    return codec.to(device)

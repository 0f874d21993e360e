"""Reading model weights: published layouts and our exports, recognised from their keys, strictly and offline."""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vae3d.checkpoints import ldm, taehv, wan
from vae3d.errors import UserError
from vae3d.models import diffusers_vae

log = logging.getLogger("vae3d")

State = dict[str, Tensor]

EXPORT_CONFIG = "model.yaml"
INDEX = ".index.json"  # of weights in several files
WEIGHT_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    f"diffusion_pytorch_model.safetensors{INDEX}",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PUBLISHED_FACTOR = 0.18215  # hard-coded in Open-Sora 1.2 around its SDXL VAE; needed for its weights (Open-Sora#493)

# A key that only this layout has; what stands in front of it in a file is a wrapper's prefix.
MARKERS = {
    "opensora": "temporal_vae.encoder.conv_in.conv.weight",
    "wan": wan.MARKER,
    "wan_diffusers": wan.MARKER_DIFFUSERS,
    "taehv": taehv.MARKER,
    "diffusers": "encoder.down_blocks.0.resnets.0.norm1.weight",
    "ldm": "encoder.down.0.block.0.norm1.weight",
}
VIDEO_VAE = "encoder.down_blocks.0.resnets.0.conv1.conv.weight"  # a key of what DiffusersVAE holds


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, unknown, or does not fit the model."""


@dataclass
class Checkpoint:
    """A model's weights under this project's keys, and the configuration (`_target_` tree) that builds it.

    layout: what was found at `path`. notes: what the file did not say and was assumed, or held besides.
    """

    config: dict[str, Any]
    state: State
    path: Path
    layout: str
    notes: list[str] = field(default_factory=list)

    def part(self, name: str) -> State:
        """State of the submodule `name`; the whole state if this is a checkpoint of that submodule alone."""
        inner = {k.removeprefix(f"{name}."): v for k, v in self.state.items() if k.startswith(f"{name}.")}
        return inner or self.state


def read_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Read a folder or a file; see README "Checkpoints" for what is recognised.

    variant: of a TAEHV, whose files need not tell.
    Raises CheckpointError if nothing readable is there or no layout fits its keys.
    """
    weights = find_weights(Path(path))
    export, config_json = weights.with_name(EXPORT_CONFIG), weights.with_name("config.json")
    state = read_state(weights)
    if export.is_file():
        return Checkpoint(yaml.safe_load(export.read_text())["model"], state, weights, "export")

    try:
        told = json.loads(config_json.read_text()) if config_json.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{config_json}: cannot be read ({error})") from error
    if told.get("_class_name") in diffusers_vae.KINDS:
        return _diffusers_vae(told, state, weights)
    if VIDEO_VAE in state:
        raise CheckpointError(f"{weights}: looks like a video VAE of diffusers; its config.json must lie beside it")
    layout, state, notes = recognise(state, weights)
    try:
        if layout == "opensora":
            config, state = _opensora(state, told, notes)
        elif layout in ("wan", "wan_diffusers"):
            state = wan.from_diffusers(state) if layout == "wan_diffusers" else state
            config = wan.config_of(state, told, notes)
        elif layout == "taehv":
            config = taehv.config_of(state, weights, variant, notes)
        else:
            inner = ldm.modernize(ldm.from_ldm(state) if layout == "ldm" else state)
            config = _spatial_config(inner, told, notes)
            state = {f"module.{key}": tensor for key, tensor in inner.items()}
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    except KeyError as missing:
        raise CheckpointError(f"{weights}: looks like {layout}, but {missing} is not in it") from missing
    return Checkpoint(config, state, weights, layout, notes)


def find_weights(path: Path) -> Path:
    """The weight file at `path`: a file, an export, a published folder, its `vae` subfolder, or a run folder."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path}: unknown kind of weight file; known: {', '.join(SUFFIXES)}")
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for folder in (path, path / "vae"):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
    if (path / "latest").is_file() or (path / "zero_to_fp32.py").is_file():
        raise CheckpointError(
            f"{path}: a checkpoint in DeepSpeed's own format, whose files hold code; write its weights out by "
            f"python -m deepspeed.utils.zero_to_fp32 {path} OUT --safe_serialization and give OUT/model.safetensors"
        )
    exports = sorted((path / "exports").glob("step-*/model.safetensors"))
    if exports:
        warn_if_older(path, exports[-1].parent)
        return exports[-1]
    raise CheckpointError(
        f"{path}: holds none of {', '.join(WEIGHT_FILES)}, no vae/ folder and no exports/ of a run; "
        f"found {_first(p.name for p in path.iterdir()) or 'nothing'}"
    )


def warn_if_older(run: Path, export: Path) -> None:
    """Say so where a run's newest export is older than its newest checkpoint, as after a kill or on a full disk."""
    checkpoints = sorted(file.parent.name for file in (run / "checkpoints").glob("step-*/run.json"))
    if checkpoints and checkpoints[-1] > export.name:
        log.warning(
            "%s is the newest export of %s, whose newest checkpoint is %s; the command that trained it writes what is "
            "missing",
            *(export.name, run, checkpoints[-1]),
        )


def read_state(path: Path) -> State:
    """Tensors of a weight file, or of all files of an index, in fp32, without running code that they may hold."""
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, struct.error, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read, is it complete? ({error})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, which is refused because loading it would run its code; "
            "save its state dict alone, as .safetensors"
        ) from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if isinstance(content, dict) and {"model", "optimizer"} <= content.keys():
        raise CheckpointError(
            f"{path}: is the state of a training run; go on from it with run.resume_from={path}, or give the run's "
            "folder, or its averaged weights"
        )
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no state dict")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _read_shards(index: Path) -> State:
    """The tensors of the files that an index names, which lie beside it."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is no index of weight files ({error!r})") from error
    if missing := [name for name in files if not index.with_name(name).is_file()]:
        raise CheckpointError(f"{index}: of its {len(files)} files {_first(missing)} are not there")
    return {key: tensor for name in files for key, tensor in read_state(index.with_name(name)).items()}


def recognise(state: State, path: Path) -> tuple[str, State, list[str]]:
    """Name the layout and strip its prefix, as in `first_stage_model.` or DDP's `module.`."""
    for layout, marker in MARKERS.items():
        prefixes = {key.removesuffix(marker) for key in state if key.endswith(marker)}
        prefixes -= {"model_ema."}
        if len(prefixes) == 1:
            prefix = prefixes.pop()
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            ignored = {k: v for k, v in own.items() if k.startswith(("loss.", "model_ema."))}
            others = sorted({k.split(".")[0] for k in [*ignored, *(k for k in state if not k.startswith(prefix))]})
            notes = [f"left out, not part of the VAE: {', '.join(others)}"] if others else []
            return layout, {k: v for k, v in own.items() if k not in ignored}, notes
    raise CheckpointError(
        f"{path}: none of the known layouts (vae3d export, Open-Sora 1.2, Wan, TAEHV, diffusers AutoencoderKL, LDM); "
        f"its keys begin with {_first(state)}"
    )


def load_state(module: nn.Module, state: State, what: str) -> None:
    """module.load_state_dict, strict; raises CheckpointError naming everything that did not fit."""
    own = module.state_dict()
    try:
        state = taehv.fit_time(module, state)
    except ValueError as error:
        raise CheckpointError(f"{what} does not fit the model:\n{error}") from error
    faults = [
        _fault("missing in the file", own.keys() - state.keys()),
        _fault("unknown to the model", state.keys() - own.keys()),
        _fault(
            "of another shape (file, model)",
            [
                f"{k} {list(state[k].shape)} {list(own[k].shape)}"
                for k in own.keys() & state.keys()
                if state[k].shape != own[k].shape
            ],
        ),
    ]
    if any(faults):
        raise CheckpointError(f"{what} does not fit the model:\n" + "\n".join(f for f in faults if f))
    module.load_state_dict(state)


def _fault(kind: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"  {len(names)} tensors {kind}: {_first(names)}" if names else ""


def _first(names: Iterable[str], count: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def _diffusers_vae(told: dict[str, Any], state: State, path: Path) -> Checkpoint:
    kind = told["_class_name"]
    own = {key: value for key, value in told.items() if not key.startswith("_")}
    config = {"_target_": "vae3d.models.diffusers_vae.DiffusersVAE", "kind": kind, "config": own}
    return Checkpoint(config, {f"vae.{key}": tensor for key, tensor in state.items()}, path, kind)


def _opensora(state: State, told: dict[str, Any], notes: list[str]) -> tuple[dict[str, Any], State]:
    prefix = "spatial_vae.module."
    inner = ldm.modernize({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    temporal = {k.removeprefix("temporal_vae."): v for k, v in state.items() if k.startswith("temporal_vae.")}
    config_temporal = _temporal_config(temporal)
    channels = config_temporal["latent_channels"]

    buffers = {}
    for name in ("shift", "scale"):
        if name in state:  # 0-dimensional in files that the original training script wrote
            buffers[name] = state[name].reshape(-1).expand(channels).clone()
        else:
            buffers[name] = torch.full((channels,), 1.0 if name == "scale" else 0.0)
            notes.append(f"the file has no `{name}`; {buffers[name].tolist()} is used")
    known = (prefix, "temporal_vae.", "shift", "scale")
    rest = {k: v for k, v in state.items() if not k.startswith(known)}
    micro = told.get("micro_frame_size", 17)
    if not told:
        notes.append(f"no config.json beside the file; micro_frames {micro} is used, as published")
    config = {
        "_target_": "vae3d.models.opensora.OpenSoraVAE",
        "spatial": _spatial_config(inner, {"scaling_factor": PUBLISHED_FACTOR}, notes),
        "temporal": config_temporal,
        "micro_frames": micro,
        "shift": buffers["shift"].tolist(),
        "scale": buffers["scale"].tolist(),
    }
    ours = {f"{prefix}{k}": v for k, v in inner.items()} | {f"temporal_vae.{k}": v for k, v in temporal.items()}
    ours |= {name: buffer.reshape(1, -1, 1, 1, 1) for name, buffer in buffers.items()}
    return config, ours | rest


def _spatial_config(state: State, told: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Constructor arguments of SpatialVAE read off the shapes, and off a diffusers config.json."""
    levels = _count(state, r"encoder\.down_blocks\.(\d+)\.")
    scaling = told.get("scaling_factor")
    if scaling is None:
        scaling = 0.13025
        notes.append(f"the file does not tell its scaling factor; {scaling} (SDXL) is used, SD 1 and 2 have 0.18215")
    return {
        "_target_": "vae3d.models.spatial.SpatialVAE",
        "channels": [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
        "layers": _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "groups": told.get("norm_num_groups", 32),
        "attention": any(".attentions.0." in key for key in state),
        "quant_convs": "quant_conv.weight" in state,
        **_spatial_factors(scaling, told),
    }


def _spatial_factors(scaling: float, told: dict[str, Any]) -> dict[str, Any]:
    """scaling_factor and shift_factor of SpatialVAE; diffusers' pipelines take (z - mean) * scaling / std where a
    config has latents_mean and latents_std."""
    mean, std, shift = told.get("latents_mean"), told.get("latents_std"), told.get("shift_factor")
    if mean is None and std is None:
        return {"scaling_factor": scaling, "shift_factor": shift or 0.0}
    if None in (mean, std) or shift:
        raise ValueError("config.json has latents_mean and latents_std one without the other, or shift_factor besides")
    return {"scaling_factor": [scaling / value for value in std], "shift_factor": list(mean)}


def _temporal_config(state: State) -> dict[str, Any]:
    """Constructor arguments of TemporalVAE read off the shapes."""
    levels = _count(state, r"encoder\.block_res_blocks\.(\d+)\.")
    widths = [state[f"encoder.block_res_blocks.{i}.0.conv1.conv.weight"].shape[0] for i in range(levels)]
    return {
        "_target_": "vae3d.models.temporal.TemporalVAE",
        "in_channels": state["encoder.conv_in.conv.weight"].shape[1],
        "latent_channels": state["post_quant_conv.conv.weight"].shape[0],
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "downsample": [f"encoder.conv_blocks.{i}.conv.weight" in state for i in range(levels - 1)],
        "layers": _count(state, r"encoder\.res_blocks\.(\d+)\."),
    }


def _count(state: State, pattern: str) -> int:
    return 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)

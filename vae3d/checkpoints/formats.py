"""Reading model weights: published layouts and our exports, recognised from their keys, strictly and offline."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from vae3d.arguments import Count, Deviation, Mean, Width, check_fields
from vae3d.checkpoints import ldm, taehv, wan
from vae3d.checkpoints.location import EXPORT_CONFIG, PART, CheckpointError, find_weights, first, split_part
from vae3d.errors import UserError
from vae3d.io import FileError, read_json, read_yaml
from vae3d.models import diffusers_vae
from vae3d.models.registry import TARGET, build_model, is_known, target_of
from vae3d.weight_files import LazyTensor, open_tensors, open_tree

__all__ = ["EXPORT_CONFIG", "Checkpoint", "CheckpointError", "find_weights", "load_state", "read_checkpoint"]

State = dict[str, Tensor]

OPENSORA_STATS = {"latents_mean": "shift", "latents_std": "scale"}  # our buffers -> keys of Open-Sora's files
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
TINY_VAE = re.compile(r"(^|\.)\d+\.conv\.4\.weight$")  # of a TAESD's blocks
VIDEO_VAE = "encoder.down_blocks.0.resnets.0.conv1.conv.weight"  # a key of what DiffusersVAE holds
# The class that a config.json beside the weights must name, if it is of a VAE at all.
CLASSES = {"wan": "AutoencoderKLWan", "wan_diffusers": "AutoencoderKLWan"} | dict.fromkeys(
    ("diffusers", "ldm"), "AutoencoderKL"
)
# What torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
NO_PART_OF_A_VAE = ("loss.", "model_ema.")  # of latent-diffusion's AutoencoderKL
ROOT = "."  # the part that has no prefix


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


class ConfigJson(TypedDict, total=False):
    """What is read of a config.json that lies beside published weights; diffusers' and Open-Sora's have more."""

    _class_name: str
    scaling_factor: Deviation | None
    shift_factor: Mean | None
    latents_mean: Sequence[Mean] | None
    latents_std: Sequence[Deviation] | None
    norm_num_groups: Width
    micro_frame_size: Count | None


def read_checkpoint(
    path: str | Path, variant: str | None = None, part: str | None = None, *, own_model: bool = False
) -> Checkpoint:
    """Read a folder or a file; see README "Checkpoints" for what is recognised.

    The configuration is checked: it builds a model of this project, which the weights fit.
    variant: of a TAEHV, whose files may not say it. part: which VAE, of a file that holds several; `path` may name it
    too, as in weights.ckpt::ema_model. own_model: for a caller who has a model to load into. Then only what an export
    says is checked, and of a class that this project does not know the configuration is `_target_` alone.
    Raises CheckpointError if nothing readable is there, if no layout fits its keys, if several VAEs are there and
    `part` names none of them, or if the configuration builds no model.
    """
    file, named = split_part(path)
    with as_checkpoint_error():
        return _read(find_weights(file), variant, part or named, own_model)


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Errors of the files and of building a model, as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(str(error)) from error


def _read(weights: Path, variant: str | None, part: str | None, own_model: bool) -> Checkpoint:
    export, config_json = weights.with_name(EXPORT_CONFIG), weights.with_name("config.json")
    if os.path.lexists(export):
        if part is not None:
            raise CheckpointError(f"{weights}: is an export, which holds one model; leave out the part {part!r}")
        config, key, source, layout, prefix = read_export_config(export)["model"], "model", export, "export", ""
        if own_model and not is_known(config):
            name = config.get(TARGET) if isinstance(config, dict) else None
            return Checkpoint({TARGET: name}, read_state(weights), weights, layout)
    else:
        told = _read_config_json(config_json)
        config, key, source, layout, prefix = _diffusers_config(told), "", config_json, told.get("_class_name"), "vae."
    if config is not None:
        model = meta_model(config, source, key)  # before the weights, which may be large
        state = {prefix + key: tensor for key, tensor in read_state(weights).items()}
        checkpoint = Checkpoint(config, state, weights, layout)
    else:
        checkpoint = _published(weights, told, variant, part)
        if own_model:
            return checkpoint
        model = meta_model(checkpoint.config, weights)
    if not own_model:
        check_state(model, checkpoint.state, f"{weights} ({checkpoint.layout})")
    return checkpoint


def read_export_config(file: Path) -> dict[str, Any]:
    """What a model.yaml holds: `model`, and facts about it. Raises FileError."""
    content = read_yaml(file)
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{file}: has no `model`, the configuration that builds the model")
    return content


def meta_model(config: Any, source: object, key: str = "") -> nn.Module:
    """The model of a file's configuration on the meta device, where it takes no memory, however large it is."""
    with torch.device("meta"):
        return build_model(config, source, key)


def _read_config_json(file: Path) -> dict[str, Any]:
    told = read_json(file) if os.path.lexists(file) else {}
    check_fields(told, ConfigJson, str(file))
    return told


def _diffusers_config(told: dict[str, Any]) -> dict[str, Any] | None:
    """Of a video VAE of diffusers; None for other files."""
    if told.get("_class_name") not in diffusers_vae.KINDS:
        return None
    own = {key: value for key, value in told.items() if not key.startswith("_")}
    return {TARGET: target_of(diffusers_vae.DiffusersVAE), "kind": told["_class_name"], "config": own}


def _published(weights: Path, told: dict[str, Any], variant: str | None, part: str | None) -> Checkpoint:
    """Published weights; layout and configuration follow from keys and shapes. told: their config.json."""
    layout, state, notes, others = recognise(weights, part)
    try:
        told = _own_config(told, layout)
        if layout == "opensora":
            config, state = _opensora(state, told, notes)
        elif layout in ("wan", "wan_diffusers"):
            state = wan.from_diffusers(state) if layout == "wan_diffusers" else state
            config = wan.config_of(state, told, notes)
            check_config(told, wan.diffusers_config(config), wan.NOT_NEEDED)
        elif layout == "taehv":
            config = taehv.config_of(state, weights, variant, notes)
        else:
            inner = ldm.modernize(ldm.from_ldm(state) if layout == "ldm" else state)
            config = _spatial_config(inner, told, ldm.factors_of(others, inner), notes)
            state = {f"module.{key}": tensor for key, tensor in inner.items()}
    except FileError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    except KeyError as missing:
        raise CheckpointError(f"{weights}: looks like {layout}, but {missing} is not in it") from missing
    except (IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{weights}: looks like {layout}, but its tensors have other shapes") from error
    return Checkpoint(config, state, weights, layout, notes)


def read_state(path: Path) -> State:
    """All tensors of a weight file, or of all files of an index, in fp32, without running code that they may hold."""
    return _in_fp32(open_tensors(path))


def _in_fp32(tensors: Mapping[str, LazyTensor]) -> State:
    read = {name: tensor.read() for name, tensor in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read.items()}


def recognise(path: Path, part: str | None) -> tuple[str, State, list[str], list[str]]:
    """The layout of the VAE in a file, its tensors without what wraps them (`state_dict.`, `first_stage_model.`, DDP's
    `module.`), notes, and the names of all other tensors; see read_checkpoint."""
    tree = open_tree(path)
    if isinstance(tree, dict) and {"step", "model", "optimizer", "config"} <= tree.keys():
        raise CheckpointError(
            f"{path}: is the state of a training run; resume it with run.resume_from={path}, or give the run's folder, "
            "or its averaged weights"
        )
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in open_tensors(path, tree).items():
        if (short := WRAPPERS.sub("", name)) in tensors:
            raise CheckpointError(f"{path}: two tensors are called {short}, one inside of torch.compile's wrapper")
        tensors[short] = tensor
    prefix, layout = _choose(_candidates(tensors), tensors, path, part)

    inner = [other for other, _ in _candidates(tensors) if other != prefix and other.startswith(prefix)]
    not_own = tuple(prefix + name for name in NO_PART_OF_A_VAE) + tuple(inner if layout != "opensora" else ())
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) and not k.startswith(not_own)}
    others = [key for key in tensors if not key.startswith(prefix) or key.startswith(not_own)]
    notes = [f"skipped, not part of the VAE: {first(sorted({_beside(prefix, key) for key in others}))}"] * bool(others)
    return layout, _in_fp32(own), notes, others


def _candidates(tensors: Collection[str]) -> list[tuple[str, str]]:
    """Prefix and layout of every VAE in a file."""
    found = [
        (prefix, layout)
        for layout, marker in MARKERS.items()
        for key in tensors
        if key.endswith(marker) and ((prefix := key.removesuffix(marker)) == "" or prefix.endswith("."))
    ]
    whole = tuple(f"{prefix}spatial_vae." for prefix, layout in found if layout == "opensora")
    return [(prefix, layout) for prefix, layout in found if not prefix.startswith(whole)] if whole else found


def _choose(found: list[tuple[str, str]], tensors: Collection[str], path: Path, part: str | None) -> tuple[str, str]:
    """The candidate that `part` names by its prefix or by some of its words, or else the only one."""
    if any(key.endswith(VIDEO_VAE) for key in tensors):
        raise CheckpointError(f"{path}: looks like a video VAE of diffusers; its config.json must lie beside it")
    if not found:
        if not tensors:
            raise CheckpointError(f"{path}: holds no tensors")
        if "" in tensors:
            raise CheckpointError(f"{path}: is a single tensor, such as latents, not the weights of a model")
        if any(TINY_VAE.search(key) for key in tensors):
            raise CheckpointError(
                f"{path}: looks like a TAESD (AutoencoderTiny of diffusers), a VAE of single images that is not "
                "supported; TAEHV, for videos, is"
            )
        raise CheckpointError(
            f"{path}: none of the known layouts (vae3d export, Open-Sora 1.2, Wan, TAEHV, diffusers AutoencoderKL, "
            f"LDM); its keys begin with {first(tensors)}"
        )
    names = {prefix.removesuffix(".") or ROOT: (prefix, layout) for prefix, layout in found}
    if part is None:
        chosen = list(names)
    else:
        chosen = [name for name in names if name == part] or [name for name in names if f".{part}." in f".{name}."]
    if len(chosen) == 1:
        return names[chosen[0]]
    listed = ", ".join(f"{name} ({layout})" for name, (_, layout) in names.items())
    if part is None:
        raise CheckpointError(
            f"{path}: holds {len(names)} VAEs: {listed}; say which: vae3d.load(path, part={chosen[0]!r}), or "
            f"{path}{PART}{chosen[0]} as the path of a command"
        )
    raise CheckpointError(f"{path}: part={part} names {len(chosen) or 'none'} of its VAEs; use one of {listed}")


def _beside(prefix: str, key: str) -> str:
    """The first word of a key that is not that of the prefix."""
    words, own = key.split("."), prefix.split(".")[:-1]
    same = next((i for i, word in enumerate(words) if i >= len(own) or word != own[i]), 0)
    return words[same]


def _own_config(told: dict[str, Any], layout: str) -> dict[str, Any]:
    """config.json, if it is of these weights; empty if it is of something else, as in the folder of a diffusion model.

    Raises ValueError if it is of another VAE.
    """
    kind, own = told.get("_class_name"), CLASSES.get(layout)
    if kind is None or kind == own:
        return told
    if own is not None and "Autoencoder" in str(kind):
        raise ValueError(f"config.json is of a {kind}, which is not supported; its weights look like {own}")
    return {}


def check_config(told: Mapping[str, Any], expected: Mapping[str, Any], not_needed: Collection[str]) -> None:
    """Check a config.json against the weights beside it.

    expected: what this project would write for these weights. not_needed: keys that change nothing here.
    Raises ValueError naming every key that differs or is not supported.
    """
    errors = []
    for key, value in told.items():
        if key.startswith("_") or key in not_needed or value is None:  # null: not said
            continue
        if key not in expected:
            errors.append(f"{key}={value} is not supported")
        elif value != expected[key]:
            errors.append(f"{key} is {value}, and must be {expected[key]}")
    if errors:
        raise ValueError(f"config.json does not fit the weights: {'; '.join(errors)}")


def load_state(module: nn.Module, state: State, what: str) -> None:
    """module.load_state_dict, strict; raises CheckpointError naming everything that did not fit."""
    module.load_state_dict(check_state(module, state, what))


def check_state(module: nn.Module, state: State, what: str) -> State:
    """The state for module.load_state_dict; raises CheckpointError naming everything that does not fit."""
    own = module.state_dict()
    try:
        state = taehv.fit_time(module, state)
    except ValueError as error:
        raise CheckpointError(f"{what} does not fit the model:\n{error}") from error
    errors = [
        _error("missing in the file", own.keys() - state.keys()),
        _error("unknown to the model", state.keys() - own.keys()),
        _error(
            "of another shape (file, model)",
            [
                f"{k} {list(state[k].shape)} {list(own[k].shape)}"
                for k in own.keys() & state.keys()
                if state[k].shape != own[k].shape
            ],
        ),
        _error(
            "of whole, logical or complex numbers",
            [k for k in own.keys() & state.keys() if not _real(state[k], own[k])],
        ),
    ]
    if any(errors):
        raise CheckpointError(f"{what} does not fit the model:\n" + "\n".join(f for f in errors if f))
    return state


def _real(tensor: Tensor, own: Tensor) -> bool:
    return tensor.is_floating_point() or not own.is_floating_point()


def _error(kind: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"  {len(names)} tensors {kind}: {first(names)}" if names else ""


def _opensora(state: State, told: dict[str, Any], notes: list[str]) -> tuple[dict[str, Any], State]:
    prefix = "spatial_vae.module."
    inner = ldm.modernize({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    temporal = {k.removeprefix("temporal_vae."): v for k, v in state.items() if k.startswith("temporal_vae.")}
    config_temporal = _temporal_config(temporal)
    channels = config_temporal["latent_channels"]

    buffers = {}
    for name, key in OPENSORA_STATS.items():
        if key in state:  # 0-dimensional in files that the original training script wrote
            buffers[name] = state[key].reshape(-1).expand(channels).clone()
        else:
            buffers[name] = torch.full((channels,), 1.0 if key == "scale" else 0.0)
            notes.append(f"the file has no `{key}`; {buffers[name].tolist()} is used")
    known = (prefix, "temporal_vae.", *OPENSORA_STATS.values())
    rest = {k: v for k, v in state.items() if not k.startswith(known)}
    micro = told.get("micro_frame_size", 17)
    if not told:
        notes.append(f"no config.json beside the file; micro_frames {micro} is used, as published")
    config = {
        "_target_": "vae3d.models.opensora.OpenSoraVAE",
        "spatial": _spatial_config(inner, {}, {"scaling_factor": PUBLISHED_FACTOR}, notes),
        "temporal": config_temporal,
        "micro_frames": micro,
        **{name: buffer.tolist() for name, buffer in buffers.items()},
    }
    ours = {f"{prefix}{k}": v for k, v in inner.items()} | {f"temporal_vae.{k}": v for k, v in temporal.items()}
    ours |= {name: buffer.reshape(1, -1, 1, 1, 1) for name, buffer in buffers.items()}
    return config, ours | rest


def to_opensora(state: State) -> State:
    """An OpenSoraVAE's state under the published keys; other models' states have no key that changes."""
    return {OPENSORA_STATS.get(key, key): tensor for key, tensor in state.items()}


def _spatial_config(
    state: State, told: dict[str, Any], factors: Mapping[str, float], notes: list[str]
) -> dict[str, Any]:
    """Constructor arguments of SpatialVAE read off the shapes, and off a diffusers config.json.

    factors: scaling_factor and shift_factor, where there is no config.json.
    Raises ValueError if the config does not fit the weights.
    """
    config = {
        "_target_": "vae3d.models.spatial.SpatialVAE",
        "channels": [
            state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
            for i in range(_count(state, r"encoder\.down_blocks\.(\d+)\."))
        ],
        "layers": _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "groups": told.get("norm_num_groups", 32),
        "attention": any(".attentions.0." in key for key in state),
        "quant_convs": "quant_conv.weight" in state,
    }
    if told:
        # Absent, it is 0.18215: the default of diffusers' class (models/autoencoders/autoencoder_kl.py).
        config |= _spatial_factors(told.get("scaling_factor", 0.18215), told)
        check_config(told | ldm.SAME.get(str(told.get("act_fn")), {}), ldm.diffusers_config(config), ldm.NOT_NEEDED)
    elif factors:
        config |= {"shift_factor": 0.0, **factors}
    else:
        config |= {"scaling_factor": None, "shift_factor": None}
        notes.append("the scaling factor of its latents is not known; reconstruction works without it")
    return config


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
    """How many numbers, from 0 on, a pattern finds. Raises ValueError if some are left out."""
    found = {int(m[1]) for key in state if (m := re.match(pattern, key))}
    if found != set(range(len(found))):
        raise ValueError(f"its layers {pattern} are numbered {sorted(found)[:6]}")
    return len(found)

"""Reading model weights: published layouts and our exports, recognised from their keys, strictly and offline."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae3d.checkpoints import ldm, opensora, opensora_v1_3, taehv, taesd, wan
from vae3d.checkpoints.location import (
    DIFFUSION_CONFIG,
    EXPORT_CONFIG,
    PART,
    CheckpointError,
    find_weights,
    halves,
    list_some,
    split_part,
)
from vae3d.checkpoints.published import PublishedWeights, State, read_config_json
from vae3d.errors import UserError
from vae3d.io import FileError, read_yaml
from vae3d.models.diffusers_classes import CLASSES, NOT_SERVED
from vae3d.models.diffusers_vae import PREFIX, DiffusersVAE
from vae3d.models.registry import TARGET, build_model, is_known, target_of
from vae3d.text import plural
from vae3d.weight_files import LazyTensor, SavedTensor, named_tensors, open_tensors, open_tree


@dataclass(frozen=True)
class Layout:
    """A published key layout.

    marker: a key that only this layout has; what precedes it in a file is the prefix of the VAE. read: returns our
    configuration and state. config_class: the `_class_name` that its config.json must have.
    """

    marker: str
    read: Callable[[PublishedWeights], tuple[dict[str, Any], State]]
    config_class: str | None = None


LAYOUTS = {
    "opensora": Layout(opensora.MARKER, opensora.read),
    "opensora_v1_3": Layout(opensora_v1_3.MARKER, opensora_v1_3.read),
    "wan": Layout(wan.MARKER, wan.read, "AutoencoderKLWan"),
    "wan_diffusers": Layout(wan.MARKER_DIFFUSERS, wan.read_diffusers, "AutoencoderKLWan"),
    "taehv": Layout(taehv.MARKER, taehv.read),
    "taesd": Layout(taesd.MARKER, taesd.read),
    "taesd_diffusers": Layout(taesd.MARKER_DIFFUSERS, taesd.read_diffusers, "AutoencoderTiny"),
    "diffusers": Layout(ldm.MARKER_DIFFUSERS, ldm.read_diffusers, "AutoencoderKL"),
    "ldm": Layout(ldm.MARKER, ldm.read_ldm, "AutoencoderKL"),
}
# Classes of diffusers that a network of this project opens; DiffusersVAE opens them too, where it is asked to.
NATIVE = {layout.config_class for layout in LAYOUTS.values() if layout.config_class}
# A key of networks that open with their config.json only.
DIFFUSERS_VIDEO_VAE = "encoder.down_blocks.0.resnets.0.conv1.conv.weight"
# What torch.compile, FSDP and activation checkpointing add to names.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
NOT_OF_THE_VAE = ("loss.", "model_ema.")  # beside the VAE in latent-diffusion's AutoencoderKL
ROOT = "."  # name of the VAE without a prefix


@dataclass
class Checkpoint:
    """A model's weights under this project's keys, and the configuration (`_target_` tree) that builds it.

    layout: the one found at `path`. notes: assumptions, and what was skipped. assumed: settings of `config` that `path`
    does not hold, so they are those of the published model.
    """

    config: dict[str, Any]
    state: State
    path: Path
    layout: str
    notes: list[str] = field(default_factory=list)
    assumed: Collection[str] = ()

    def part(self, name: str) -> State:
        """State of the submodule `name`; the whole state if this is a checkpoint of that submodule alone."""
        inner = {k.removeprefix(f"{name}."): v for k, v in self.state.items() if k.startswith(f"{name}.")}
        return inner or self.state


def read_checkpoint(
    path: str | Path,
    variant: str | None = None,
    part: str | None = None,
    *,
    own_model: bool = False,
    adapter: bool = False,
) -> Checkpoint:
    """Read a folder or a file; README "Checkpoints" lists what is recognised.

    The configuration must build a model of this project, and the weights must fit it.
    variant: of a TAEHV whose file does not name it. part: which VAE of a file that holds several; also as in
    weights.ckpt::ema_model. own_model: the caller has a model. The weights are then not compared with the
    configuration, and the configuration of an export with an unknown class is `_target_` alone.
    adapter: read a folder of diffusers for DiffusersVAE, also where this project has the network itself.
    Raises CheckpointError if there is no readable file, no layout matches its keys, it holds several VAEs and `part`
    matches none, or the configuration builds no model.
    """
    path, part_in_path = split_part(path)
    part = part or part_in_path
    with as_checkpoint_error():
        weights = find_weights(path)
        is_export = os.path.lexists(weights.with_name(EXPORT_CONFIG))
        config_json = {} if is_export else read_config_json(weights.with_name("config.json"))
        if is_export:
            checkpoint, model = _read_export(weights, part, own_model)
        elif (kind := config_json.get("_class_name")) == wan.QWEN_IMAGE and own_model and not adapter:
            checkpoint, model = _read_published(weights, wan.from_qwen_image(config_json), variant, part), None
        elif kind in CLASSES and (adapter or kind not in NATIVE):
            checkpoint, model = _read_adapted(weights, config_json)
        elif kind in NOT_SERVED:
            raise CheckpointError(f"{weights}: its config.json is of a {kind}: {NOT_SERVED[kind]}")
        else:
            checkpoint = _read_published(weights, config_json, variant, part)
            model = None if own_model else meta_model(checkpoint.config, weights)
        if not own_model:
            check_state(model, checkpoint.state, f"{weights} ({checkpoint.layout})")
        return checkpoint


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Raise errors of files and of building a model as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(str(error)) from error


def _read_export(weights: Path, part: str | None, own_model: bool) -> tuple[Checkpoint, nn.Module | None]:
    """An export, and its model on the meta device (None if the caller has its own, of an unknown class)."""
    if part is not None:
        raise CheckpointError(f"{weights}: is an export, which holds one model; leave out the part {part!r}")
    file = weights.with_name(EXPORT_CONFIG)
    config = read_export_config(file)["model"]
    if own_model and not is_known(config):
        config, model = {TARGET: config.get(TARGET) if isinstance(config, dict) else None}, None
    else:
        model = meta_model(config, file, "model")  # before the weights, which may be large
    return Checkpoint(config, read_weights(weights), weights, "export"), model


def read_export_config(file: Path) -> dict[str, Any]:
    """The content of a model.yaml: `model`, and information about it. Raises FileError."""
    content = read_yaml(file)
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{file}: has no `model`, the configuration that builds the model")
    return content


def meta_model(config: Any, source: object, key: str = "") -> nn.Module:
    """The model on the meta device, where it takes no memory. source, key: where `config` is from, for errors."""
    with torch.device("meta"):
        return build_model(config, source, key)


def _read_adapted(weights: Path, config_json: dict[str, Any]) -> tuple[Checkpoint, nn.Module]:
    """An autoencoder that runs in diffusers' own code, and its model on the meta device."""
    name = config_json["_class_name"]
    arguments = {key: value for key, value in config_json.items() if not key.startswith("_")}
    config = {TARGET: target_of(DiffusersVAE), "kind": name, "config": arguments}
    model = meta_model(config, weights.with_name("config.json"))  # before the weights, which may be large
    state = {f"{PREFIX}{key}": tensor for key, tensor in read_weights(weights).items()}
    return Checkpoint(config, state, weights, name), model


def _read_published(weights: Path, config_json: dict[str, Any], variant: str | None, part: str | None) -> Checkpoint:
    """Published weights. Layout and configuration follow from keys, shapes and config.json."""
    layout, published = recognise(weights, part)
    published.variant = variant
    try:
        published.config_json = _select_config_json(config_json, layout)
        config, state = LAYOUTS[layout].read(published)
    except FileError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    except KeyError as missing:
        raise CheckpointError(f"{weights}: looks like {layout}, but {missing} is not in it") from missing
    except (IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{weights}: looks like {layout}, but its tensors have other shapes") from error
    return Checkpoint(config, state, weights, layout, published.notes, published.assumed)


def _select_config_json(config_json: dict[str, Any], layout: str) -> dict[str, Any]:
    """{} if config.json describes another part of a pipeline. Raises ValueError if it describes another VAE."""
    found, expected = config_json.get("_class_name"), LAYOUTS[layout].config_class
    if found is None or found == expected:
        return config_json
    if expected is not None and "Autoencoder" in str(found):
        raise ValueError(f"config.json is of a {found}, which is not supported; its weights look like {expected}")
    return {}


def read_weights(path: Path) -> State:
    """All tensors of a weight file, or of all files of an index, in fp32, without running code in them."""
    return _in_fp32(open_tensors(path))


def _in_fp32(tensors: Mapping[str, LazyTensor | SavedTensor]) -> State:
    read = {name: tensor.read() for name, tensor in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read.items()}


def recognise(path: Path, part: str | None) -> tuple[str, PublishedWeights]:
    """Layout and tensors of the VAE in a file.

    The prefix of the VAE (`state_dict.`, `first_stage_model.`, DDP's `module.`) and the names of wrappers are removed.
    """
    tensors = _open_halves(path)
    vaes = _find_vaes(tensors)
    prefix, layout = _choose(vaes, tensors, path, part)
    excluded = [f"{prefix}{name}" for name in NOT_OF_THE_VAE]
    if layout != "opensora":  # which contains a diffusers VAE
        excluded += [other for other, _ in vaes if other != prefix and other.startswith(prefix)]
    own = {key for key in tensors if key.startswith(prefix) and not key.startswith(tuple(excluded))}
    state = _in_fp32({key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key in own})
    weights = PublishedWeights(path, state, other_keys=[key for key in tensors if key not in own])
    if weights.other_keys:
        groups = sorted({_first_difference(key, prefix) for key in weights.other_keys})
        weights.notes.append(f"skipped, not part of the VAE: {list_some(groups)}")
    return layout, weights


def _first_difference(key: str, prefix: str) -> str:
    """The first word of a dotted key that differs from the prefix: `model` for model.x.weight and first_stage_model."""
    words, prefix_words = key.split("."), prefix.split(".")[:-1]
    return next((word for i, word in enumerate(words) if prefix_words[i : i + 1] != [word]), words[0])


def _open(path: Path) -> dict[str, LazyTensor | SavedTensor]:
    """The tensors of a file, without the names of wrappers. Raises CheckpointError for a training state."""
    tree = open_tree(path)
    if isinstance(tree, dict) and {"step", "model", "optimizer", "config"} <= tree.keys():
        raise CheckpointError(
            f"{path}: is the state of a training run; resume it with run.resume_from={path}, or give the run's folder "
            "for its averaged weights"
        )
    tensors: dict[str, LazyTensor | SavedTensor] = {}
    for name, tensor in named_tensors(tree, path).items():
        if (unwrapped := WRAPPERS.sub("", name)) in tensors:
            raise CheckpointError(f"{path}: has {unwrapped} twice, once inside a wrapper such as torch.compile's")
        tensors[unwrapped] = tensor
    return tensors


def _open_halves(path: Path) -> dict[str, LazyTensor | SavedTensor]:
    """The tensors of a file; of a TAESD's encoder or decoder, those of both files, as `encoder.` and `decoder.`."""
    tensors = _open(path)
    if not tensors or not all(taesd.HALF.match(key) for key in tensors):
        return tensors
    files = halves(path)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{path}: is one half of a TAESD; the other one, {file.name}, must lie beside it")
    if not files:
        raise CheckpointError(
            f"{path}: looks like the encoder or the decoder of a TAESD; put both into one folder, as "
            f"NAME_encoder{path.suffix} and NAME_decoder{path.suffix}"
        )
    both = zip(("decoder", "encoder"), files, strict=True)
    return {f"{part}.{key}": tensor for part, file in both for key, tensor in _open(file).items()}


def _find_vaes(keys: Collection[str]) -> list[tuple[str, str]]:
    """Prefix and layout of every VAE in a file. The 2D VAE inside an Open-Sora VAE is not counted."""
    found = [
        (prefix, name)
        for name, layout in LAYOUTS.items()
        for key in keys
        if key.endswith(layout.marker) and ((prefix := key.removesuffix(layout.marker)) == "" or prefix.endswith("."))
    ]
    inner = tuple(f"{prefix}spatial_vae." for prefix, name in found if name == "opensora")
    return [(prefix, name) for prefix, name in found if not inner or not prefix.startswith(inner)]


def _choose(vaes: list[tuple[str, str]], keys: Collection[str], path: Path, part: str | None) -> tuple[str, str]:
    """The VAE whose prefix is `part` or contains it as a word; without `part` the only one. Raises CheckpointError."""
    if any(key.endswith(DIFFUSERS_VIDEO_VAE) for key in keys):
        raise CheckpointError(f"{path}: looks like a video VAE of diffusers; its config.json must lie beside it")
    if not vaes and path.with_name(DIFFUSION_CONFIG).is_file():
        raise CheckpointError(f"{path}: is a diffusion model, not an autoencoder; vae3d sample draws from it")
    if not vaes:
        raise CheckpointError(f"{path}: {_describe_unknown(keys)}")
    names = {prefix.removesuffix(".") or ROOT: (prefix, layout) for prefix, layout in vaes}
    if part is None:
        chosen = list(names)
    else:
        chosen = [name for name in names if name == part] or [name for name in names if f".{part}." in f".{name}."]
    if len(chosen) == 1:
        return names[chosen[0]]
    listed = ", ".join(f"{name} ({layout})" for name, (_, layout) in names.items())
    if part is None:
        raise CheckpointError(
            f"{path}: holds {len(names)} VAEs: {listed}; choose one: vae3d.load(path, part={chosen[0]!r}), or "
            f"{path}{PART}{chosen[0]} as the path in a command"
        )
    raise CheckpointError(f"{path}: part={part} matches {len(chosen) or 'none'} of its VAEs; use one of {listed}")


def _describe_unknown(keys: Collection[str]) -> str:
    """What a file without a known VAE holds."""
    if not keys:
        return "holds no tensors"
    if "" in keys:
        return "is a single tensor, such as latents, not the weights of a model"
    return (
        "matches no known layout (vae3d export, Open-Sora 1.2, Wan, TAEHV, TAESD, diffusers AutoencoderKL, LDM), and "
        f"other autoencoders of diffusers need their config.json beside them; its keys begin with {list_some(keys)}"
    )


def load_weights(module: nn.Module, state: State, name: str) -> None:
    """Strict module.load_state_dict. `name` of the weights is for errors. Raises CheckpointError, see check_state."""
    module.load_state_dict(check_state(module, state, name))


def check_state(module: nn.Module, state: State, name: str) -> State:
    """The state that module.load_state_dict accepts. Raises CheckpointError naming all tensors that do not fit."""
    own = module.state_dict()
    try:
        state = taehv.fit_time(module, state)
    except ValueError as error:
        raise CheckpointError(f"{name} does not fit the model:\n{error}") from error
    both = own.keys() & state.keys()
    shapes = [f"{k} {list(state[k].shape)} {list(own[k].shape)}" for k in both if state[k].shape != own[k].shape]
    types = [key for key in both if own[key].is_floating_point() and not state[key].is_floating_point()]
    errors = {
        "missing in the file": own.keys() - state.keys(),
        "unknown to the model": state.keys() - own.keys(),
        "of another shape (file, model)": shapes,
        "not floating-point": types,
    }
    lines = [
        f"  {plural(len(keys), 'tensor')} {what}: {list_some(sorted(keys))}" for what, keys in errors.items() if keys
    ]
    if lines:
        raise CheckpointError("\n".join([f"{name} does not fit the model:", *lines]))
    return state

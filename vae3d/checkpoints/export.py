"""Writing model weights: this project's export, and the layouts that other programs open."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vae3d import __version__
from vae3d.checkpoints import ldm, taehv, wan
from vae3d.checkpoints.formats import EXPORT_CONFIG, PUBLISHED_FACTOR, Checkpoint, CheckpointError, State
from vae3d.io import atomic_dir, atomic_write, write_text, yaml_text
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.spatial import SpatialVAE, per_channel
from vae3d.models.taehv import TAEHV
from vae3d.models.temporal import TemporalVAE
from vae3d.models.wan import WanVAE

LDM_GROUPS = 32
# Settings that change how a model runs, not what its weights compute.
RUNNING = ("scaling_factor", "shift_factor", "frame_batch", "gradient_checkpointing")


def write_export(checkpoint: Checkpoint, folder: Path, **about: Any) -> None:
    """model.safetensors and model.yaml (the configuration that builds the model, and `about`) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(checkpoint.state, folder / "model.safetensors", metadata_of(checkpoint))
    write_text(folder / EXPORT_CONFIG, yaml_text({"vae3d": __version__, **about, "model": checkpoint.config}))


def replace_export(checkpoint: Checkpoint, folder: Path, **about: Any) -> None:
    """write_export in place of all that is in `folder`: it is whole, or what was there stays."""
    with atomic_dir(folder) as tmp:
        write_export(checkpoint, tmp, **about)


def write_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    """A folder that diffusers' AutoencoderKL.from_pretrained, or AutoencoderKLWan's, opens."""
    if _is(checkpoint, WanVAE):
        state, told = wan.to_diffusers(checkpoint.state), wan.diffusers_config(_wan_config(checkpoint, "diffusers"))
    else:
        state, told = _inner(checkpoint.state), _autoencoder_kl(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    _save(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")


def _autoencoder_kl(checkpoint: Checkpoint) -> dict[str, Any]:
    config = _require(checkpoint, SpatialVAE, "diffusers")
    if config["scaling_factor"] is None:
        raise CheckpointError(f"{checkpoint.path}: the latents' scaling factor is not known; give --scaling_factor")
    return {**ldm.diffusers_config(config), **_factors(config)}


def _factors(config: dict[str, Any]) -> dict[str, Any]:
    """A SpatialVAE's normalisation as diffusers' pipelines read it: (z - mean) * scaling_factor / std, or
    (z - shift_factor) * scaling_factor."""
    scaling, shift = config["scaling_factor"], config["shift_factor"]
    if not (isinstance(scaling, list) or isinstance(shift, list)):
        return {"scaling_factor": scaling, "shift_factor": shift or None}
    channels = config["latent_channels"]
    std = [1 / factor for factor in per_channel(scaling, channels)]
    return {"scaling_factor": 1.0, "latents_mean": list(per_channel(shift, channels)), "latents_std": std}


def write_ldm(checkpoint: Checkpoint, file: Path) -> None:
    """One file with latent-diffusion's keys: a .safetensors, or else torch's with all under `state_dict`, which its
    `ckpt_path` reads (ldm/models/autoencoder.py).

    There is no prefix `first_stage_model.`: the VAE has it inside of whole Stable Diffusion checkpoints only. The file
    does not hold the scaling factor: programs take it from the diffusion model's configuration (`scale_factor`), and a
    note says which to set. latent-diffusion has no shift, and one scaling factor for all channels; others are folded
    into the quant convolutions. A network without quant convolutions has none here either: FLUX's and SD3's code opens
    it, which takes one scale_factor and one shift_factor, while latent-diffusion's own class would leave its quant
    convolutions random.
    Raises CheckpointError if it does not normalise in 32 groups, as all that code does, whatever the file, and for
    factors per channel of a network without quant convolutions.
    """
    config = _require(checkpoint, SpatialVAE, "ldm")
    groups = config["groups"]
    if groups != LDM_GROUPS:
        raise CheckpointError(
            f"{checkpoint.path} normalises in {groups} groups and latent-diffusion's code in {LDM_GROUPS}, so that it "
            "would compute something else; use the layout diffusers"
        )
    state = ldm.to_ldm(_inner(_without_shift(checkpoint, config)))
    if file.suffix == ".safetensors":
        _save_file(state, file)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}}, file)


def write_opensora(checkpoint: Checkpoint, folder: Path) -> None:
    """A folder like hpcai-tech/OpenSora-VAE-v1.2, for the original code.

    That code multiplies the 2D latents by 0.18215 whatever their own factor is, so other factors are folded into the
    2D VAE's quant convolutions: the pipeline computes the same.
    Raises CheckpointError for a network of another size, which the original code cannot build.
    """
    config = _require(checkpoint, OpenSoraVAE, "opensora")
    _require_published_network(config)
    state = _fold_factor(checkpoint.state, config["spatial"])
    folder.mkdir(parents=True, exist_ok=True)
    _save(state, folder / "model.safetensors")
    told = {
        "architectures": ["VideoAutoencoderPipeline"],
        "model_type": "VideoAutoencoderPipeline",
        "cal_loss": False,
        "freeze_vae_2d": False,
        "from_pretrained": None,
        "micro_frame_size": config["micro_frames"],
        "scale": state["scale"].flatten().tolist(),
        "shift": state["shift"].flatten().tolist(),
        "vae_2d": {
            "type": "VideoAutoencoderKL",
            "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "subfolder": "vae",
            "micro_batch_size": 4,
            "local_files_only": False,
        },
        "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
    }
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")


def write_wan(checkpoint: Checkpoint, file: Path) -> None:
    """One file like the published Wan2.1_VAE.pth.

    Programs have the published mean and standard deviation of the latents in their code; others are folded into the
    weights, so that the normalised latents are the same.
    """
    _save_file(_with_published_constants(checkpoint, "wan"), file)


def write_videox_fun(checkpoint: Checkpoint, file: Path) -> None:
    """One file that VideoX-Fun's AutoencoderKLWan loads with a strict load_state_dict; constants as in write_wan."""
    _save_file(wan.videox_fun(_with_published_constants(checkpoint, "videox_fun")), file)


def write_taehv(checkpoint: Checkpoint, file: Path) -> None:
    """One file like the published ones, and what must be known of it: in the file, or in <its stem>.json beside it."""
    told = taehv.facts(_require(checkpoint, TAEHV, "taehv"))
    _save_file(checkpoint.state, file, taehv.metadata(told))
    if file.suffix != ".safetensors":
        file.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")


def write_final_model(checkpoint: Checkpoint, folder: Path) -> None:
    """final_model.pth, a plain state dict in fp32 that the published TAEHV class loads with weights_only=True; the same
    as final_model.safetensors with its metadata; model.json, which holds these for the former."""
    told = taehv.facts(_require(checkpoint, TAEHV, "taehv"))
    state = {key: tensor.float() for key, tensor in checkpoint.state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / taehv.FACTS).write_text(json.dumps(told, indent=2) + "\n")
    _save(state, folder / "final_model.safetensors", taehv.metadata(told))
    write_flat(replace(checkpoint, state=state), "native", folder / "final_model.pth")


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What a weight file's header tells beside its tensors."""
    return taehv.metadata(taehv.facts(checkpoint.config)) if _is(checkpoint, TAEHV) else {}


WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "export": replace_export,
    "diffusers": write_diffusers,
    "ldm": write_ldm,
    "opensora": write_opensora,
    "wan": write_wan,
    "videox_fun": write_videox_fun,
    "taehv": write_taehv,
}


# Keys that other programs give to the same weights, in one flat state dict.
# Raise CheckpointError for the state of a model that they do not know. `native` keys of the Wan VAEs are the official.
FLAT_LAYOUTS: dict[str, Callable[[State], State]] = {
    "native": lambda state: state,
    "videox_fun": lambda state: wan.videox_fun(_require_wan(state)),
    "diffusers": lambda state: wan.to_diffusers(_require_wan(state)),
}


def _require_wan(state: State) -> State:
    if wan.MARKER not in state:
        raise CheckpointError("only the Wan VAEs have the key layouts videox_fun and diffusers here; use native")
    return state


def to_layout(state: State, layout: str) -> State:
    """A model's state dict under the keys of `layout`. Raises CheckpointError if it is unknown or does not fit."""
    if layout not in FLAT_LAYOUTS:
        raise CheckpointError(f"no key layout is called {layout}; there are {', '.join(FLAT_LAYOUTS)}")
    return FLAT_LAYOUTS[layout](state)


def write_flat(checkpoint: Checkpoint, layout: str, file: Path) -> None:
    """One file for torch.load(..., weights_only=True), under the keys of `layout`; complete or not there at all.

    Of a Wan VAE, whose flat files hold no mean and standard deviation of the latents, they are folded as in write_wan.
    """
    state = _with_published_constants(checkpoint, layout) if _is(checkpoint, WanVAE) else checkpoint.state
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in to_layout(state, layout).items()}
    with atomic_write(file) as stream:
        torch.save(tensors, stream)


def _require(checkpoint: Checkpoint, network: type[nn.Module], layout: str) -> dict[str, Any]:
    """The configuration with the network's defaults filled in; raises CheckpointError for another network."""
    if not _is(checkpoint, network):
        target = f"{network.__module__}.{network.__qualname__}"
        raise CheckpointError(
            f"{checkpoint.path} holds a {checkpoint.config['_target_']}; the {layout} layout is for {target}"
        )
    return _defaults(network) | checkpoint.config


def _is(checkpoint: Checkpoint, network: type[nn.Module]) -> bool:
    return checkpoint.config["_target_"] == f"{network.__module__}.{network.__qualname__}"


def _wan_config(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """Every constructor argument; raises CheckpointError for another network."""
    config = _require(checkpoint, WanVAE, layout)
    config["decoder_channels"] = config["decoder_channels"] or config["channels"]
    zeros, ones = [0.0] * config["latent_channels"], [1.0] * config["latent_channels"]
    return config | {"shift": config["shift"] or zeros, "scale": config["scale"] or ones}


def _require_published_network(config: dict[str, Any]) -> None:
    """Raises CheckpointError if the pipeline is not of the size that Open-Sora 1.2 hard-codes."""
    for part, network in (("spatial", SpatialVAE), ("temporal", TemporalVAE)):
        published = _defaults(network)
        for name, value in config[part].items():
            if name not in (*RUNNING, "_target_") and value != published[name]:
                raise CheckpointError(
                    f"the original code builds one network only: {part} {name} is {value}, not {published[name]}; "
                    "use the layout export"
                )


def _defaults(network: type[nn.Module]) -> dict[str, Any]:
    """Default constructor arguments, as YAML would hold them."""
    parameters = inspect.signature(network).parameters.values()
    return {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in parameters
        if p.default is not p.empty
    }


def _inner(state: State) -> State:
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _fold_factor(state: State, spatial: dict[str, Any]) -> State:
    """Weights whose 2D VAE has the scaling factor 0.18215 and computes the same normalised latents."""
    shift, factor = _factors_of_channels(_defaults(SpatialVAE) | spatial)
    gain = factor / PUBLISHED_FACTOR
    return _folded(state, "spatial_vae.module.quant_conv", "spatial_vae.module.post_quant_conv", gain, -shift * gain)


def _with_published_constants(checkpoint: Checkpoint, layout: str) -> State:
    """Weights of a Wan VAE whose latents have the mean and standard deviation that programs apply to bare weights."""
    config = _wan_config(checkpoint, layout)
    shift, scale = (torch.tensor(config[name], dtype=torch.float64) for name in ("shift", "scale"))
    constants = wan.reader_constants(config["latent_channels"], config["shortcuts"])
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in constants)
    gain = std / scale
    folded = _folded(checkpoint.state, "conv1", "conv2", gain, mean - shift * gain)
    if folded is not checkpoint.state:
        checkpoint.notes.append(
            f"{layout} files hold no mean and standard deviation of the latents, and programs apply the published "
            "ones; the weights were changed so that the normalised latents stay the same"
        )
    return folded


def _without_shift(checkpoint: Checkpoint, config: dict[str, Any]) -> State:
    """Weights of a SpatialVAE that need no shift and one scaling factor; notes which."""
    scaling, shift = config["scaling_factor"], config["shift_factor"] or 0.0
    per_channel = isinstance(scaling, list) or isinstance(shift, list)
    if scaling is None:
        if shift:
            raise CheckpointError(f"{checkpoint.path}: has a shift_factor but no scaling factor; give --scaling_factor")
        checkpoint.notes.append("the scaling factor is not known; set the diffusion model's scale_factor")
        return checkpoint.state
    if not config["quant_convs"]:
        if per_channel:
            raise CheckpointError(
                f"{checkpoint.path}: has a scaling or shift factor per channel and no quant convolutions to fold them "
                "into, and the code that reads the layout ldm takes one number; use the layout diffusers"
            )
        checkpoint.notes.append(f"set scale_factor={scaling} and shift_factor={shift} where the file is used")
        return checkpoint.state
    offset, factor = _factors_of_channels(config)
    gain = factor if per_channel else torch.ones_like(factor)
    checkpoint.notes.append(
        f"set scale_factor={1.0 if per_channel else scaling} in the diffusion model's configuration"
    )
    return _folded(checkpoint.state, "module.quant_conv", "module.post_quant_conv", gain, -offset * gain)


def _factors_of_channels(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """shift_factor and scaling_factor of a SpatialVAE, [C] each in fp64."""
    shift, scaling = (
        torch.tensor(per_channel(factor, config["latent_channels"]), dtype=torch.float64)
        for factor in (config["shift_factor"] or 0.0, config["scaling_factor"])
    )
    return shift, scaling


def _folded(state: State, quant: str, post: str, gain: Tensor, offset: Tensor) -> State:
    """Weights whose latents are z * gain + offset, with the same reconstruction; `state` itself if that is z.

    quant, post: names of the 1x1 convolutions that make the moments and that take the latents. gain, offset: [C], fp64.
    """
    if (gain == 1).all() and (offset == 0).all():
        return state
    after_w, after_b, before_w, before_b = (
        state[f"{name}.{kind}"].double() for name in (quant, post) for kind in ("weight", "bias")
    )
    ones = [1] * (after_w.ndim - 2)  # the kernel's sides
    both = torch.cat([gain, torch.ones_like(gain)])  # mean * gain, log-variance + 2 ln gain
    inverse = before_w / gain.reshape(1, -1, *ones)
    new = {
        f"{quant}.weight": after_w * both.reshape(-1, 1, *ones),
        f"{quant}.bias": after_b * both + torch.cat([offset, 2 * gain.log()]),
        f"{post}.weight": inverse,
        f"{post}.bias": before_b - inverse.flatten(1) @ offset,
    }
    return state | {name: tensor.to(state[name].dtype) for name, tensor in new.items()}


def _save_file(state: State, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """One file of the kind that its name says: .safetensors, or else torch's (.pth, .pt)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        _save(state, file, metadata)
    else:
        torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, file)


def _save(state: State, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(contiguous, file, metadata={"format": "pt", **(metadata or {})})

"""Writing model weights: this project's export, and the layouts that other programs open."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae3d import __version__
from vae3d.checkpoints import ldm, opensora, taehv, taesd, wan
from vae3d.checkpoints.formats import EXPORT_CONFIG, Checkpoint, CheckpointError
from vae3d.checkpoints.location import SUFFIXES
from vae3d.checkpoints.published import State, rename_keys
from vae3d.io import atomic_dir, atomic_path, atomic_write, save_tensors, write_json, write_text, yaml_text
from vae3d.models.diffusers_vae import PREFIX, DiffusersVAE
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.registry import RUNNING, target_of
from vae3d.models.spatial import SpatialVAE, per_channel
from vae3d.models.taehv import TAEHV
from vae3d.models.taesd import TAESD
from vae3d.models.temporal import TemporalVAE
from vae3d.models.wan import WanVAE

LDM_GROUPS = 32  # of the normalisation, hard-coded in latent-diffusion
# Settings that change results, and that files of other programs do not hold.
LOST: dict[type[nn.Module], Sequence[str]] = {
    WanVAE: ("pad_w", "pad_h"),
    TAEHV: ("decoder_space_upscale",),
    TAESD: ("latent", "latents_mean", "latents_std"),
    DiffusersVAE: ("pad_w", "decode_timestep"),
}
SIZES = ("channels", "decoder_channels", "decoder_blocks", "decoder_hidden")  # of TAEHV and TAESD


# ---- this project's export


def write_export(checkpoint: Checkpoint, folder: Path, **info: Any) -> None:
    """Write model.safetensors, and model.yaml with the configuration that builds the model and with `info`."""
    metadata = taehv.to_metadata(checkpoint.config) if _is_a(checkpoint, TAEHV) else None
    _save(checkpoint.state, folder / "model.safetensors", metadata)
    write_text(folder / EXPORT_CONFIG, yaml_text({"vae3d": __version__, **info, "model": checkpoint.config}))


def replace_export(checkpoint: Checkpoint, folder: Path, **info: Any) -> None:
    """write_export, atomically and in place of everything in `folder`."""
    with atomic_dir(folder) as tmp:
        write_export(checkpoint, tmp, **info)


# ---- layouts of other programs


def lost_settings(checkpoint: Checkpoint) -> list[str]:
    """Notes on what a file of another program's layout does not say about this model, and changes its results."""
    network = next((kind for kind in LOST if _is_a(checkpoint, kind)), None)
    if network is None:
        return []
    config, defaults = checkpoint.config, _defaults(network)
    changed = {name: config[name] for name in LOST[network] if config.get(name) not in (None, defaults[name])}
    settings = [f"{name}={str(value).replace(' ', '')}" for name, value in changed.items()]
    return [f"{setting} is not in the file; set it where the file is used" for setting in settings]


def size_notes(checkpoint: Checkpoint) -> list[str]:
    """A note if a TAEHV or TAESD has other widths or blocks than the published classes, which cannot load it then."""
    config, defaults = checkpoint.config, _defaults(TAEHV)
    changed = {name: config[name] for name in SIZES if config.get(name) not in (None, defaults[name])}
    settings = " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in changed.items())
    return [f"the published class has other sizes than {settings}; only vae3d.load opens the file"] if changed else []


def write_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder for from_pretrained of diffusers' AutoencoderKL, AutoencoderKLWan or AutoencoderTiny, or of the
    class that a DiffusersVAE runs."""
    if _is_a(checkpoint, DiffusersVAE):
        state = {key.removeprefix(PREFIX): tensor for key, tensor in checkpoint.state.items()}
        config_json = {"_class_name": checkpoint.config["kind"], **(checkpoint.config.get("config") or {})}
    elif _is_a(checkpoint, WanVAE):
        _require_whole_decoder(checkpoint, "diffusers")
        state = wan.to_diffusers(checkpoint.state)
        config_json = wan.diffusers_config(_wan_config(checkpoint))
        checkpoint.notes += _chunk_notes(checkpoint)
    elif _is_a(checkpoint, TAESD):
        config = _require(checkpoint, TAESD, "diffusers")
        try:
            config_json = taesd.diffusers_config(config)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        state = taesd.to_diffusers(checkpoint.state)
    else:
        state = checkpoint.part("module")
        config = _require(checkpoint, SpatialVAE, "diffusers")
        if config["scaling_factor"] is None:
            raise CheckpointError(f"{checkpoint.path}: the latents' scaling factor is not known; give --scaling_factor")
        config_json = ldm.diffusers_config(config) | _diffusers_factors(config)
    checkpoint.notes += lost_settings(checkpoint)
    _save(state, folder / "diffusion_pytorch_model.safetensors")
    write_json(folder / "config.json", config_json)


def write_qwen_image(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder for from_pretrained of diffusers' AutoencoderKLQwenImage, whose network is that of Wan2.1.

    Three channels of pixels are those of Qwen-Image and Qwen-Image-Edit, four of Qwen-Image-Layered.
    """
    _require(checkpoint, WanVAE, "qwen_image", channels=(3, 4))
    _require_whole_decoder(checkpoint, "qwen_image")
    try:
        config_json = wan.qwen_image_config(_wan_config(checkpoint))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}; use the layout diffusers") from error
    checkpoint.notes += [*lost_settings(checkpoint), *_chunk_notes(checkpoint)]
    _save(wan.to_diffusers(checkpoint.state), folder / "diffusion_pytorch_model.safetensors")
    write_json(folder / "config.json", config_json)


def _chunk_notes(checkpoint: Checkpoint) -> list[str]:
    """A note if diffusers codes a WanVAE's clips wrongly: its classes take 4 frames at a time, whatever config.json
    says."""
    if (frames := 2 ** sum(_wan_config(checkpoint)["downsample"])) == 4:
        return []
    return [
        f"diffusers codes 4 frames at a time and this model has {frames} to a latent: there clips lose frames, or fail"
    ]


def _diffusers_factors(config: dict[str, Any]) -> dict[str, Any]:
    """The latent factors of a SpatialVAE in diffusers' config.json.

    Its pipelines compute (z - mean) * scaling_factor / std with latents_mean and latents_std, and
    (z - shift_factor) * scaling_factor without.
    """
    scaling, shift = config["scaling_factor"], config["shift_factor"]
    if not (isinstance(scaling, list) or isinstance(shift, list)):
        return {"scaling_factor": scaling, "shift_factor": shift or None}
    channels = config["latent_channels"]
    std = [1 / factor for factor in per_channel(scaling, channels)]
    return {"scaling_factor": 1.0, "latents_mean": list(per_channel(shift, channels)), "latents_std": std}


def write_ldm(checkpoint: Checkpoint, file: Path) -> None:
    """Write one file with latent-diffusion's keys: .safetensors, or torch.save's with everything under `state_dict`.

    latent-diffusion reads the latter as `ckpt_path`, without the prefix `first_stage_model.` of a whole checkpoint.
    The file holds no scaling factor; a note names the `scale_factor` to set in the diffusion model's configuration.
    latent-diffusion has no shift and one factor for all channels, so others are folded into the quant convolutions.
    A network without these keeps its factors, since the code of FLUX and SD3, which opens it, has both.
    Raises CheckpointError for another number of normalisation groups than 32, which all that code hard-codes, and for
    factors per channel in a network without quant convolutions.
    """
    config = _require(checkpoint, SpatialVAE, "ldm")
    if (groups := config["groups"]) != LDM_GROUPS:
        raise CheckpointError(
            f"{checkpoint.path} normalises in {groups} groups and latent-diffusion's code in {LDM_GROUPS}, so its "
            "results would differ; use the layout diffusers"
        )
    state = ldm.to_ldm(rename_keys(_fold_for_ldm(checkpoint, config), [("^module.", "^")]))
    if file.suffix == ".safetensors":
        _save(state, file)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": _contiguous(state)}, file)


def write_opensora(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder like hpcai-tech/OpenSora-VAE-v1.2, for the original code.

    That code multiplies the 2D latents by 0.18215. Another factor is folded into the 2D VAE's quant convolutions, which
    gives the same results. Raises CheckpointError for a network of another size, which the original code cannot build.
    """
    config = _require(checkpoint, OpenSoraVAE, "opensora")
    _require_published_size(config)
    shift, factor = _factors_per_channel(_defaults(SpatialVAE) | config["spatial"])
    gain = factor / opensora.SCALING_FACTOR
    quant, post_quant = f"{opensora.SPATIAL}quant_conv", f"{opensora.SPATIAL}post_quant_conv"
    state = opensora.to_published(_fold(checkpoint.state, quant, post_quant, gain, -shift * gain))
    _save(state, folder / "model.safetensors")
    write_json(folder / "config.json", opensora.config_json(config, state))


def write_wan(checkpoint: Checkpoint, file: Path) -> None:
    """Write one file like the published Wan2.1_VAE.pth.

    Other programs hard-code the published mean and standard deviation of the latents. Others are folded into the
    weights, which gives the same normalised latents.
    """
    _require(checkpoint, WanVAE, "wan")
    _require_whole_decoder(checkpoint, "wan")
    checkpoint.notes += lost_settings(checkpoint)
    _save(_with_published_constants(checkpoint, "wan"), file)


def write_videox_fun(checkpoint: Checkpoint, file: Path) -> None:
    """Write one file for VideoX-Fun's AutoencoderKLWan; constants as in write_wan."""
    _require(checkpoint, WanVAE, "videox_fun")
    _require_whole_decoder(checkpoint, "videox_fun")
    checkpoint.notes += lost_settings(checkpoint)
    _save(wan.to_videox_fun(_with_published_constants(checkpoint, "videox_fun")), file)


def write_taehv(checkpoint: Checkpoint, file: Path) -> None:
    """Write one file like the published ones. Its metadata is in the file, or in <its stem>.json beside it."""
    config = _require(checkpoint, TAEHV, "taehv")
    checkpoint.notes += [*lost_settings(checkpoint), *size_notes(checkpoint)]
    _save(checkpoint.state, file, taehv.to_metadata(config))
    if file.suffix != ".safetensors":
        write_json(file.with_suffix(".json"), taehv.info_of(config))


def write_taesd(checkpoint: Checkpoint, folder: Path) -> None:
    """Write VARIANT_encoder.pth and VARIANT_decoder.pth, like the published ones."""
    variant = _require(checkpoint, TAESD, "taesd")["variant"]
    checkpoint.notes += [*lost_settings(checkpoint), *size_notes(checkpoint)]
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("encoder", "decoder"):
        state = rename_keys({k: t for k, t in checkpoint.state.items() if k.startswith(part)}, [(f"^{part}.", "^")])
        with atomic_write(folder / f"{variant}_{part}.pth") as stream:
            torch.save(_contiguous(state), stream)


def check_final_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of a model that write_final_model takes, whole. Raises CheckpointError for another."""
    return _require(checkpoint, TAEHV, "taehv")


def write_final_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a TAEHV in fp32 as final_model.pth, final_model.safetensors and model.json.

    final_model.pth is a plain state dict, which the published TAEHV class loads with weights_only=True, unless
    size_notes says otherwise; model.json is its metadata. final_model.safetensors contains both. Raises CheckpointError
    as check_final_model does.
    """
    config = check_final_model(checkpoint)
    state = {key: tensor.float() for key, tensor in checkpoint.state.items()}
    _save(state, folder / "final_model.safetensors", taehv.to_metadata(config))
    write_json(folder / taehv.INFO_FILE, taehv.info_of(config))
    write_flat(replace(checkpoint, state=state), "native", folder / "final_model.pth")


WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "export": replace_export,
    "diffusers": write_diffusers,
    "qwen_image": write_qwen_image,
    "ldm": write_ldm,
    "opensora": write_opensora,
    "wan": write_wan,
    "videox_fun": write_videox_fun,
    "taehv": write_taehv,
    "taesd": write_taesd,
}
FILE_LAYOUTS = ("ldm", "wan", "videox_fun", "taehv")  # the others are folders


def check_target(path: Path, layout: str) -> None:
    """Raises CheckpointError for . and /, and if a folder would be written under the name of a file."""
    if not path.name:
        raise CheckpointError(f"{path} cannot be replaced; give the name of a new file or folder")
    if layout not in FILE_LAYOUTS and (path.suffix in SUFFIXES or path.is_file()):
        raise CheckpointError(f"{path} is the name of a file, and the layout {layout} is a folder; choose another name")


# ---- flat state dicts during training


# Key layouts of one flat state dict. The native keys are those of the published files.
FLAT_LAYOUTS: dict[str, Callable[[State], State]] = {
    "native": opensora.to_published,
    "videox_fun": wan.to_videox_fun,
    "diffusers": wan.to_diffusers,
}


def to_layout(state: State, layout: str) -> State:
    """Rename a model's state dict to the keys of `layout`. Raises CheckpointError if it is unknown or does not fit."""
    if layout not in FLAT_LAYOUTS:
        raise CheckpointError(f"no key layout is called {layout}; there are {', '.join(FLAT_LAYOUTS)}")
    if layout in ("videox_fun", "diffusers") and wan.MARKER not in state:
        raise CheckpointError("only the Wan VAEs have the key layouts videox_fun and diffusers here; use native")
    return FLAT_LAYOUTS[layout](state)


def flat_state(checkpoint: Checkpoint, layout: str) -> State:
    """The weights under the keys of `layout`. Raises CheckpointError if it is unknown, or does not fit the model."""
    if layout == "diffusers" and _is_a(checkpoint, WanVAE):
        _require_whole_decoder(checkpoint, layout, "use native")
    return to_layout(checkpoint.state, layout)


def write_flat(checkpoint: Checkpoint, layout: str, file: Path) -> None:
    """Write one file for torch.load(..., weights_only=True), under the keys of `layout`, atomically.

    Constants of a Wan VAE are folded as in write_wan. Its pixels may have any number of channels, and its decoder, but
    for diffusers, any widths: programs that open the file must build their network with the same.
    Raises CheckpointError as flat_state does.
    """
    if _is_a(checkpoint, WanVAE):
        checkpoint = replace(checkpoint, state=_with_published_constants(checkpoint, layout))
    state = flat_state(checkpoint, layout)
    with atomic_write(file) as stream:
        torch.save(_contiguous(state), stream)


# ---- file names that other programs expect, in a run's folder


def published_files(folder: Path, prefix: str, step: int) -> tuple[Path, Path]:
    """<prefix>_step<N>.pt, the training state, and <prefix>_ema_step<N>.pt, the averaged weights."""
    return folder / f"{prefix}_step{step}.pt", folder / f"{prefix}_ema_step{step}.pt"


def link(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy where the file system has no hard links."""
    with atomic_path(target) as tmp:
        try:
            os.link(source, tmp)
        except OSError:
            shutil.copyfile(source, tmp)


# ---- configurations


def _is_a(checkpoint: Checkpoint, network: type[nn.Module]) -> bool:
    return checkpoint.config["_target_"] == target_of(network)


def _require(
    checkpoint: Checkpoint, network: type[nn.Module], layout: str, channels: Sequence[int] = (3,)
) -> dict[str, Any]:
    """The configuration with the network's defaults filled in. Raises CheckpointError for another network, or other
    `channels` of pixels than the layout knows."""
    if not _is_a(checkpoint, network):
        found = checkpoint.config["_target_"]
        raise CheckpointError(f"{checkpoint.path} holds a {found}; the {layout} layout is for {target_of(network)}")
    if checkpoint.config.get("shortcut"):
        raise CheckpointError(f"{checkpoint.path} has a shortcut, which the {layout} layout does not know")
    config = _defaults(network) | checkpoint.config
    if (found := config.get("pixel_channels", 3)) not in channels:
        raise CheckpointError(
            f"{checkpoint.path} has {found} channels of pixels, which the {layout} layout does not know; use the "
            "layout export"
        )
    return config


def _defaults(network: type[nn.Module]) -> dict[str, Any]:
    """Default constructor arguments, with lists in place of tuples as in YAML."""
    parameters = inspect.signature(network).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def _require_whole_decoder(checkpoint: Checkpoint, layout: str, hint: str = "use the layout export") -> None:
    """Raises CheckpointError for a WanVAE whose decoder has other widths or blocks, as no other program builds."""
    for name in ("decoder_widths", "decoder_blocks"):
        if (found := checkpoint.config.get(name)) is not None:
            raise CheckpointError(
                f"{checkpoint.path} has {name}={list(found)}, which the {layout} layout does not know; {hint}"
            )


def _wan_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every constructor argument of a WanVAE."""
    config = _defaults(WanVAE) | checkpoint.config
    config["decoder_channels"] = config["decoder_channels"] or config["channels"]
    zeros, ones = [0.0] * config["latent_channels"], [1.0] * config["latent_channels"]
    return config | {"latents_mean": config["latents_mean"] or zeros, "latents_std": config["latents_std"] or ones}


def _require_published_size(config: dict[str, Any]) -> None:
    """Raises CheckpointError if an Open-Sora VAE is not the network that the original code hard-codes."""
    for part, network in (("spatial", SpatialVAE), ("temporal", TemporalVAE)):
        published = _defaults(network) | {"_target_": target_of(network)}
        for name, value in config[part].items():
            if name not in ("scaling_factor", "shift_factor", *RUNNING) and value != published.get(name):
                raise CheckpointError(
                    f"the original code builds one network only: {part} {name} is {value}, not {published[name]}; "
                    "use the layout export"
                )


# ---- folding of latent factors into weights


def _with_published_constants(checkpoint: Checkpoint, layout: str) -> State:
    """Weights of a Wan VAE whose latents have the mean and standard deviation that other programs hard-code."""
    config = _wan_config(checkpoint)
    mean, std = (torch.tensor(config[name], dtype=torch.float64) for name in ("latents_mean", "latents_std"))
    constants = wan.published_constants(config["latent_channels"], config["shortcuts"])
    published_mean, published_std = (torch.tensor(values, dtype=torch.float64) for values in constants)
    gain = published_std / std
    folded = _fold(checkpoint.state, "conv1", "conv2", gain, published_mean - mean * gain)
    if folded is not checkpoint.state:
        checkpoint.notes.append(
            f"{layout} files do not hold the latents' mean and standard deviation, and other programs use the "
            "published ones; the weights were changed so that the normalised latents stay the same"
        )
    return folded


def _fold_for_ldm(checkpoint: Checkpoint, config: dict[str, Any]) -> State:
    """Weights of a SpatialVAE that need no shift and one scaling factor, named in a note."""
    scaling, shift = config["scaling_factor"], config["shift_factor"] or 0.0
    is_per_channel = isinstance(scaling, list) or isinstance(shift, list)
    if scaling is None:
        if shift:
            raise CheckpointError(f"{checkpoint.path}: has a shift_factor but no scaling factor; give --scaling_factor")
        checkpoint.notes.append("the scaling factor is not known; set the diffusion model's scale_factor")
        return checkpoint.state
    if not config["quant_convs"]:
        if is_per_channel:
            raise CheckpointError(
                f"{checkpoint.path}: has a scaling or shift factor per channel and no quant convolutions to fold them "
                "into, and the code that reads the layout ldm takes one number; use the layout diffusers"
            )
        checkpoint.notes.append(f"set scale_factor={scaling} and shift_factor={shift} where the file is used")
        return checkpoint.state
    offset, factor = _factors_per_channel(config)
    gain = factor if is_per_channel else torch.ones_like(factor)
    remaining = 1.0 if is_per_channel else scaling
    checkpoint.notes.append(f"set scale_factor={remaining} in the diffusion model's configuration")
    return _fold(checkpoint.state, "module.quant_conv", "module.post_quant_conv", gain, -offset * gain)


def _factors_per_channel(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """shift_factor and scaling_factor of a SpatialVAE, [C] each in fp64."""
    shift, scaling = (
        torch.tensor(per_channel(factor, config["latent_channels"]), dtype=torch.float64)
        for factor in (config["shift_factor"] or 0.0, config["scaling_factor"])
    )
    return shift, scaling


def _fold(state: State, quant: str, post_quant: str, gain: Tensor, offset: Tensor) -> State:
    """Weights with the latents z * gain + offset and the same reconstruction; `state` itself if that is z.

    quant, post_quant: names of the 1x1 convolutions after the encoder and before the decoder. gain, offset: [C], fp64.
    """
    if (gain == 1).all() and (offset == 0).all():
        return state
    quant_w, quant_b, post_w, post_b = (
        state[f"{name}.{kind}"].cpu().double() for name in (quant, post_quant) for kind in ("weight", "bias")
    )
    kernel = [1] * (quant_w.ndim - 2)
    both = torch.cat([gain, torch.ones_like(gain)])  # mean * gain, log-variance + 2 ln gain
    new_post_w = post_w / gain.reshape(1, -1, *kernel)
    new = {
        f"{quant}.weight": quant_w * both.reshape(-1, 1, *kernel),
        f"{quant}.bias": quant_b * both + torch.cat([offset, 2 * gain.log()]),
        f"{post_quant}.weight": new_post_w,
        f"{post_quant}.bias": post_b - new_post_w.flatten(1) @ offset,
    }
    return state | {name: tensor.to(state[name].dtype) for name, tensor in new.items()}


def _save(state: State, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write .safetensors, or by torch.save for another suffix (.pth, .pt). The folder is created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_tensors(_contiguous(state), file, {"format": "pt", **(metadata or {})})
    else:
        torch.save(_contiguous(state), file)


def _contiguous(state: State) -> State:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}

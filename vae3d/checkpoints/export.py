"""Writing model weights: this project's export, and the layouts that other programs open."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from vae3d import __version__
from vae3d.checkpoints import ldm
from vae3d.checkpoints.formats import EXPORT_CONFIG, PUBLISHED_FACTOR, Checkpoint, CheckpointError, State

SPATIAL = "vae3d.models.spatial.SpatialVAE"
OPENSORA = "vae3d.models.opensora.OpenSoraVAE"


def write_export(checkpoint: Checkpoint, folder: Path, **about: Any) -> None:
    """model.safetensors and model.yaml (the configuration that builds the model, and `about`) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(checkpoint.state, folder / "model.safetensors")
    text = {"vae3d": __version__, **about, "model": checkpoint.config}
    (folder / EXPORT_CONFIG).write_text(yaml.safe_dump(text, sort_keys=False))


def write_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    """A folder that diffusers' AutoencoderKL.from_pretrained opens."""
    config = _require(checkpoint, SPATIAL, "diffusers")
    levels = len(config["channels"])
    folder.mkdir(parents=True, exist_ok=True)
    _save(_inner(checkpoint.state), folder / "diffusion_pytorch_model.safetensors")
    told = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(config["channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config["layers"],
        "latent_channels": config["latent_channels"],
        "norm_num_groups": config["groups"],
        "mid_block_add_attention": config["attention"],
        "use_quant_conv": config["quant_convs"],
        "use_post_quant_conv": config["quant_convs"],
        "scaling_factor": config["scaling_factor"],
        "shift_factor": config["shift_factor"] or None,
    }
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")


def write_ldm(checkpoint: Checkpoint, file: Path) -> None:
    """One file with latent-diffusion's keys, without prefix."""
    _require(checkpoint, SPATIAL, "ldm")
    file.parent.mkdir(parents=True, exist_ok=True)
    _save(ldm.to_ldm(_inner(checkpoint.state)), file)


def write_opensora(checkpoint: Checkpoint, folder: Path) -> None:
    """A folder like hpcai-tech/OpenSora-VAE-v1.2, for the original code.

    That code multiplies the 2D latents by 0.18215 whatever their own factor is, so another factor is folded
    into the 2D VAE's quant convolutions: the pipeline computes the same.
    Raises CheckpointError for a network of another size, which the original code cannot build.
    """
    config = _require(checkpoint, OPENSORA, "opensora")
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


WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "export": write_export,
    "diffusers": write_diffusers,
    "ldm": write_ldm,
    "opensora": write_opensora,
}


def _require(checkpoint: Checkpoint, target: str, layout: str) -> dict[str, Any]:
    if checkpoint.config["_target_"] != target:
        raise CheckpointError(
            f"{checkpoint.path} holds a {checkpoint.config['_target_']}; the {layout} layout is for {target}"
        )
    return checkpoint.config


def _inner(state: State) -> State:
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _fold_factor(state: State, spatial: dict[str, Any]) -> State:
    """Weights whose 2D VAE has the scaling factor 0.18215 and computes the same normalised latents."""
    ratio = spatial["scaling_factor"] / PUBLISHED_FACTOR
    if ratio == 1.0:
        return state
    state = dict(state)
    quant, post = ("spatial_vae.module.quant_conv", "spatial_vae.module.post_quant_conv")
    half = state[f"{quant}.bias"].shape[0] // 2
    gain = torch.cat([torch.full((half,), ratio), torch.ones(half)])  # mean * r, log-variance + 2 ln r
    offset = torch.cat([torch.zeros(half), torch.full((half,), 2 * math.log(ratio))])
    state[f"{quant}.weight"] = state[f"{quant}.weight"] * gain[:, None, None, None]
    state[f"{quant}.bias"] = state[f"{quant}.bias"] * gain + offset
    state[f"{post}.weight"] = state[f"{post}.weight"] / ratio
    return state


def _save(state: State, file: Path) -> None:
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(contiguous, file, metadata={"format": "pt"})

"""The key layouts of the Wan VAEs: official (also this project's), diffusers, and VideoX-Fun (prefix `model.`).

Source of diffusers' keys: `loaders/single_file_utils.py` (convert_wan_vae_to_diffusers) and
`scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from vae3d.checkpoints.published import RENAMES, PublishedWeights, State, check_config_json, count_layers, rename_keys
from vae3d.io import read_yaml

CONF = Path(__file__).parents[1] / "conf/model"
# Keys of AutoencoderKLWan's config.json that do not change the network, or are read separately.
IGNORED = ("dropout", "clip_output", "latents_mean", "latents_std")
MAX_LEVELS = 10  # of a WanVAE
QWEN_IMAGE = "AutoencoderKLQwenImage"  # the network of Wan2.1 under another name
PREFIX = "model."  # VideoX-Fun's AutoencoderKLWan
MARKER = "encoder.middle.0.residual.0.gamma"  # a key that only these networks have
MARKER_DIFFUSERS = "encoder.mid_block.resnets.0.norm1.gamma"

# Names of blocks differ too, see _block_names.
TO_DIFFUSERS = RENAMES["wan to diffusers"]


def read(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """Configuration and state of a WanVAE, from official keys and shapes and from diffusers' config.json.

    Raises KeyError for a missing tensor, ValueError for a network of another form or a config.json with one constant.
    """
    state = weights.state
    shortcuts = _has_shortcuts(state)
    widths, time = _levels(state, shortcuts)
    base = state["encoder.conv1.weight"].shape[0]
    if any(width % base for width in widths):
        raise ValueError(f"its levels have {widths} channels, which are no multiples of the first convolution's {base}")
    latents = state["conv2.weight"].shape[0]
    mean, std = (weights.config_json.get(name) for name in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise ValueError("config.json must have both latents_mean and latents_std, or neither")
    if mean is None:
        mean, std = published_constants(latents, shortcuts)
        used = "those of the published weights" if any(mean) else "0 and 1"
        weights.notes.append(f"the file does not hold its latents' mean and standard deviation; {used} are used")
        weights.assumed += ["latents_mean", "latents_std"]
    pixel_channels, patch = _pixels(state["encoder.conv1.weight"].shape[1], shortcuts)
    config = {
        "_target_": "vae3d.models.wan.WanVAE",
        "channels": base,
        "decoder_channels": state["decoder.head.2.weight"].shape[1] // (widths[0] // base),
        "multipliers": [width // base for width in widths],
        "downsample": time,
        "layers": _layers(state),
        "latent_channels": latents,
        "patch": patch,
        "shortcuts": shortcuts,
        "pixel_channels": pixel_channels,
        "latents_mean": list(mean),
        "latents_std": list(std),
    }
    check_config_json(weights.config_json, diffusers_config(config), IGNORED)
    return config, state


def read_diffusers(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """As read, from diffusers' keys."""
    return read(replace(weights, state=from_diffusers(weights.state)))


def from_qwen_image(config_json: dict[str, Any]) -> dict[str, Any]:
    """config.json of AutoencoderKLWan for the same network, from that of AutoencoderKLQwenImage."""
    config = {name: value for name, value in config_json.items() if name not in ("_class_name", "input_channels")}
    channels = config_json.get("input_channels", 3)
    return {"_class_name": "AutoencoderKLWan", **config, "in_channels": channels, "out_channels": channels}


def qwen_image_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKLQwenImage. config: all arguments of WanVAE.

    Raises ValueError for a network that this class does not build, such as Wan2.2's.
    """
    others = {"patch": 1, "shortcuts": False, "decoder_channels": config["channels"]}
    if different := [f"{name}={config[name]}" for name, value in others.items() if config[name] != value]:
        raise ValueError(f"{QWEN_IMAGE} is the network of Wan2.1, which has no {', '.join(different)}")
    theirs = diffusers_config(config)
    shared = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
    config_json = {name: theirs[name] for name in (*shared, "latents_mean", "latents_std")}
    return {"_class_name": QWEN_IMAGE, **config_json, "input_channels": config["pixel_channels"]}


def to_diffusers(state: State) -> State:
    """Official keys -> diffusers' AutoencoderKLWan."""
    return rename_keys(state, [*TO_DIFFUSERS, *_block_names(_layers(state), _has_shortcuts(state))])


def from_diffusers(state: State) -> State:
    """Inverse of to_diffusers."""
    layers = count_layers(state, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1
    shortcuts = any(".upsampler." in key for key in state)
    return rename_keys(state, [*TO_DIFFUSERS, *_block_names(layers, shortcuts)], inverse=True)


def _block_names(layers: int, shortcuts: bool) -> list[tuple[str, str]]:
    """(official, diffusers) names of the levels' blocks. Wan2.1's are numbered across levels, Wan2.2's per level."""
    encoder = [*(f"resnets.{i}" for i in range(layers)), "downsampler"]
    decoder = [*(f"resnets.{i}" for i in range(layers + 1)), "upsampler" if shortcuts else "upsamplers.0"]
    names = [] if shortcuts else [("^encoder.downsamples.", "^encoder.down_blocks.")]
    for level in range(MAX_LEVELS):
        for i, block in enumerate(decoder):
            number = f"{level}.upsamples.{i}" if shortcuts else level * len(decoder) + i
            names.append((f"^decoder.upsamples.{number}.", f"^decoder.up_blocks.{level}.{block}."))
        for i, block in enumerate(encoder if shortcuts else ()):
            names.append((f"^encoder.downsamples.{level}.downsamples.{i}.", f"^encoder.down_blocks.{level}.{block}."))
    return names


def to_videox_fun(state: State) -> State:
    """Official keys -> VideoX-Fun's AutoencoderKLWan."""
    return {PREFIX + key: tensor for key, tensor in state.items()}


def published_constants(channels: int, shortcuts: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that other programs apply to the latents of weights without a config.

    They hard-code those of Wan2.1 or (shortcuts) Wan2.2. 0 and 1 for another number of channels.
    """
    published = read_yaml(CONF / ("wan22.yaml" if shortcuts else "wan.yaml"))
    if channels == len(published["latents_mean"]):
        return published["latents_mean"], published["latents_std"]
    return [0.0] * channels, [1.0] * channels


def diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKLWan. config: all arguments of WanVAE."""
    time = config["downsample"]
    pixels = config["pixel_channels"] * config["patch"] ** 2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config["channels"],
        "decoder_base_dim": config["decoder_channels"],
        "z_dim": config["latent_channels"],
        "dim_mult": config["multipliers"],
        "num_res_blocks": config["layers"],
        "attn_scales": [],
        "temperal_downsample": time,
        "dropout": 0.0,
        "latents_mean": config["latents_mean"],
        "latents_std": config["latents_std"],
        "is_residual": config["shortcuts"],
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": config["patch"] if config["patch"] > 1 else None,
        "scale_factor_temporal": 2 ** sum(time),
        "scale_factor_spatial": config["patch"] * 2 ** len(time),
    }


def _pixels(channels: int, shortcuts: bool) -> tuple[int, int]:
    """Channels of the pixels and side of the patches, from the channels that the network takes. Patches of one or two
    pixels: a network with shortcuts, Wan2.2's, has those of two; three channels are assumed where they fit."""
    patch = math.isqrt(channels // 3)
    if patch and channels == 3 * patch**2:
        return 3, patch
    return (channels // 4, 2) if shortcuts and channels % 4 == 0 else (channels, 1)


def _has_shortcuts(state: State) -> bool:
    """Whether it is a Wan2.2, whose levels are nested."""
    return any(key.startswith("encoder.downsamples.0.downsamples.") for key in state)


def _layers(state: State) -> int:
    """Residual blocks per level of the encoder."""
    if _has_shortcuts(state):
        return count_layers(state, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\.")
    numbers = [int(match[1]) for key in state if (match := re.match(r"encoder\.downsamples\.(\d+)\.resample\.", key))]
    return min(numbers, default=count_layers(state, r"encoder\.downsamples\.(\d+)\."))


def _levels(state: State, shortcuts: bool) -> tuple[list[int], list[bool]]:
    """Width of every level, and which boundaries halve the frame rate."""
    widths: list[int] = []
    time: list[bool] = []
    layers = _layers(state)
    while True:
        level = len(widths)
        block = f"{level}.downsamples.0" if shortcuts else str(level * (layers + 1))
        down = f"{level}.downsamples.{layers}" if shortcuts else str(level * (layers + 1) + layers)
        widths.append(state[f"encoder.downsamples.{block}.residual.2.weight"].shape[0])
        if f"encoder.downsamples.{down}.resample.1.weight" not in state:
            return widths, time
        time.append(f"encoder.downsamples.{down}.time_conv.weight" in state)

"""Files of TAESD: madebyollin/taesd's pairs of an encoder and a decoder, and diffusers' AutoencoderTiny.

The shapes do not tell Stable Diffusion from SDXL, or SD3 from FLUX.1. These variants have the same network; only the
name of the diffusion model differs, which the file's name may give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vae3d.checkpoints.published import PublishedWeights, State, check_config_json
from vae3d.models.taesd import VARIANTS

MARKER = "encoder.8.conv.0.weight"  # keys that only these networks have
MARKER_DIFFUSERS = "encoder.layers.8.conv.0.weight"
HALF = re.compile(r"\d+\.(weight|bias|conv\.|pool\.)")  # the keys of an encoder or a decoder alone
# Names of the variants in file names, beside their own.
NAMES = {"taesdxl": ("taesd_xl", "sdxl"), "taesd3": ("taesd_3", "sd3"), "taef1": ("taesd_f", "flux1", "flux_1")}
# Settings of AutoencoderTiny that do not change its network.
IGNORED = ("force_upcast", "latent_magnitude", "latent_shift", "block_out_channels", "scaling_factor", "shift_factor")


def read(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """Configuration and state of a TAESD, from the keys of its encoder and decoder.

    Raises ValueError if the shapes are those of no variant, or of another than the one given.
    """
    state = weights.state
    channels = state["decoder.1.weight"].shape[1]
    shape = decoder_shape(state)
    stages = len(shape["decoder_blocks"]) - 1
    pool = any(".pool.0." in key for key in state)
    possible = [
        name
        for name, kind in VARIANTS.items()
        if (kind.latent_channels, len(kind.widths), kind.pool) == (channels, stages, pool)
    ]
    form = f"{channels} latent channels and {stages} stages{', with pooling' if pool else ''}"
    if not possible:
        raise ValueError(f"has {form}, which is no variant of TAESD ({', '.join(VARIANTS)})")
    if weights.variant not in (None, *possible):
        raise ValueError(f"has {form}, so its variant is {' or '.join(possible)}, not {weights.variant}")
    variant = weights.variant or _named(weights.path, possible)
    if variant is None:
        variant = possible[0]
        if len(possible) > 1:
            weights.notes.append(f"read as {variant}; {' and '.join(possible)} have the same network")
    kind = VARIANTS[variant]
    published = {
        "decoder_channels": kind.decoder_channels,
        "decoder_blocks": kind.decoder_blocks,
        "decoder_hidden": shape["decoder_channels"],
    }
    other = {name: value for name, value in shape.items() if value != list(published[name])}
    return {"_target_": "vae3d.models.taesd.TAESD", "variant": variant, **other}, state


def decoder_shape(state: State) -> dict[str, list[int]]:
    """Arguments of TAESD for the decoder's channels, blocks and their inner channels, stage by stage."""
    channels, blocks, hidden = [], [], []
    layers = sorted({int(key.split(".")[1]) for key in state if key.startswith("decoder.")})
    for layer in layers:
        if f"decoder.{layer}.conv.0.weight" in state:
            blocks[-1] += 1
            hidden[-1] = state[f"decoder.{layer}.conv.0.weight"].shape[0]
        elif layer < layers[-1]:  # a convolution that begins a stage
            channels.append(state[f"decoder.{layer}.weight"].shape[0])
            blocks.append(0)
            hidden.append(channels[-1])
    return {"decoder_channels": channels, "decoder_blocks": blocks, "decoder_hidden": hidden}


def _named(path: Path, possible: list[str]) -> str | None:
    """The variant that the name of the file, or of its folder, contains; the longest name if there are several."""
    text = f"{path.parent.name}/{path.name}".lower()
    names = {name: variant for variant in possible for name in (variant, *NAMES.get(variant, ()))}
    found = max((name for name in names if name in text), key=len, default=None)
    return names.get(found)


def read_diffusers(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """As `read`, from the keys of AutoencoderTiny. Raises ValueError if config.json contradicts the weights."""
    weights.state = _renumber(weights.state, 1)
    config, state = read(weights)
    if weights.config_json:
        check_config_json(weights.config_json, diffusers_config(config), IGNORED)
    return config, state


def to_diffusers(state: State) -> State:
    """Inverse of the renaming in read_diffusers."""
    return _renumber(state, -1)


def _renumber(state: State, offset: int) -> State:
    """Between `decoder.1` and AutoencoderTiny's `decoder.layers.0`, which does not count the clamp of the latents."""
    renamed = {}
    for key, tensor in state.items():
        part, _, rest = key.replace(".layers.", ".").partition(".")
        index, _, rest = rest.partition(".")
        number = int(index) + (offset if part == "decoder" else 0)
        renamed[f"{part}.{'' if offset > 0 else 'layers.'}{number}.{rest}"] = tensor
    return renamed


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of AutoencoderTiny. Raises ValueError for a variant that it cannot build."""
    kind = VARIANTS[config["variant"]]
    changed = [name for name in ("decoder_channels", "decoder_blocks", "decoder_hidden") if config.get(name)]
    if kind.pool or len(kind.widths) != 3 or changed:
        network = config["variant"] + (f" with {', '.join(changed)}" if changed else "")
        raise ValueError(f"diffusers' AutoencoderTiny has no network like {network}; use the layout taesd")
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "latent_channels": kind.latent_channels,
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "force_upcast": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }

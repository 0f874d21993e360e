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

MARKER = "decoder.7.weight"  # keys that only these networks have
MARKER_DIFFUSERS = "decoder.layers.6.weight"
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
    stages = sum(key.startswith("decoder.") and key.count(".") == 2 and key.endswith(".weight") for key in state) - 2
    pool = "decoder.3.pool.0.weight" in state
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
    return {"_target_": "vae3d.models.taesd.TAESD", "variant": variant}, state


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
    if kind.pool or len(kind.widths) != 3:
        raise ValueError(f"diffusers' AutoencoderTiny has no network like {config['variant']}; use the layout taesd")
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

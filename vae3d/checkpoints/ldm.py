"""The 2D VAE of Stable Diffusion and FLUX: diffusers' AutoencoderKL and latent-diffusion's (CompVis `ldm`, Stability
`sgm`) are one network under two sets of keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vae3d.checkpoints.published import RENAMES, PublishedWeights, State, check_config_json, count_layers, rename_keys

MARKER = "encoder.down.0.block.0.conv1.weight"  # a key that only this layout has
MARKER_DIFFUSERS = "encoder.down_blocks.0.resnets.0.norm1.weight"

TO_LDM = RENAMES["diffusers to ldm"]  # LDM also counts `up` from the smallest resolution, see _flip_up
OLD_ATTENTION = RENAMES["diffusers before 0.18 to diffusers"]
# Keys of AutoencoderKL's config.json that do not change the network, or are read separately.
IGNORED = ("sample_size", "force_upcast", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
DEFAULT_SCALING_FACTOR = 0.18215  # of diffusers' class (models/autoencoders/autoencoder_kl.py)
# A VAE file does not say its latent factors, and VAEs of different families have equal shapes. In a whole pipeline,
# the keys of the diffusion model or text encoder identify the family: (part of a key, latent channels, factors).
FAMILIES = (
    ("conditioner.embedders.", 4, {"scaling_factor": 0.13025}),  # SDXL: generative-models, sd_xl_base.yaml
    ("cond_stage_model.", 4, {"scaling_factor": 0.18215}),  # SD 1 and 2: v1-inference.yaml
    (".joint_blocks.", 16, {"scaling_factor": 1.5305, "shift_factor": 0.0609}),  # SD 3: sd3_impls.py
    (".double_blocks.", 16, {"scaling_factor": 0.3611, "shift_factor": 0.1159}),  # FLUX.1: flux/util.py
)


def read_diffusers(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """Configuration and state of a SpatialVAE, from diffusers' keys."""
    state = rename_keys(weights.state, OLD_ATTENTION)
    factors = pipeline_factors(weights.other_keys, state)
    config = spatial_config(state, weights.config_json, factors, weights.notes)
    return config, {f"module.{key}": tensor for key, tensor in state.items()}


def read_ldm(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """As read_diffusers, from latent-diffusion's keys."""
    return read_diffusers(replace(weights, state=from_ldm(weights.state)))


def spatial_config(
    state: State, config_json: Mapping[str, Any], factors: Mapping[str, float], notes: list[str]
) -> dict[str, Any]:
    """Constructor arguments of SpatialVAE, from diffusers' keys and shapes and from config.json.

    factors: scaling_factor and shift_factor, used without a config.json.
    Raises ValueError if config.json contradicts the weights.
    """
    config = {
        "_target_": "vae3d.models.spatial.SpatialVAE",
        "channels": [
            state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
            for i in range(count_layers(state, r"encoder\.down_blocks\.(\d+)\."))
        ],
        "layers": count_layers(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "groups": config_json.get("norm_num_groups", 32),
        "attention": any(".attentions.0." in key for key in state),
        "quant_convs": "quant_conv.weight" in state,
    }
    if config_json:
        config |= _factors(config_json)
        if config_json.get("act_fn") == "swish":  # another name of silu
            config_json = {**config_json, "act_fn": "silu"}
        check_config_json(config_json, diffusers_config(config), IGNORED)
    elif factors:
        config |= {"shift_factor": 0.0, **factors}
    else:
        config |= {"scaling_factor": None, "shift_factor": None}
        notes.append("the scaling factor of its latents is not known; reconstruction works without it")
    return config


def _factors(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """scaling_factor and shift_factor of SpatialVAE. diffusers' pipelines compute (z - mean) * scaling / std if a
    config.json has latents_mean and latents_std."""
    scaling = config_json.get("scaling_factor", DEFAULT_SCALING_FACTOR)
    mean, std, shift = (config_json.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is None and std is None:
        return {"scaling_factor": scaling, "shift_factor": shift or 0.0}
    if None in (mean, std) or shift:
        raise ValueError("config.json must have both latents_mean and latents_std or neither, and then no shift_factor")
    return {"scaling_factor": [scaling / value for value in std], "shift_factor": list(mean)}


def pipeline_factors(other_keys: Iterable[str], state: State) -> dict[str, float]:
    """Latent factors of a VAE (diffusers keys), from the other keys of its file; {} if they identify no family."""
    channels = state["decoder.conv_in.weight"].shape[1]
    levels = {key.split(".")[2] for key in state if key.startswith("encoder.down_blocks.")}
    keys = list(other_keys)
    for part, expected, factors in FAMILIES:
        if (channels, len(levels)) == (expected, 4) and any(part in key for key in keys):
            return factors
    return {}


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKL without its latent factors. config: arguments of SpatialVAE."""
    levels = len(config["channels"])
    return {
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
    }


def to_ldm(state: State) -> State:
    """Rename diffusers keys to LDM's; the attention's linear weights [C, C] become 1x1 convolutions."""
    renamed = _flip_up(rename_keys(state, TO_LDM))
    return {k: t[:, :, None, None] if _is_attention(k) and t.ndim == 2 else t for k, t in renamed.items()}


def from_ldm(state: State) -> State:
    """Inverse of to_ldm."""
    linear = {k: t[:, :, 0, 0] if _is_attention(k) and t.ndim == 4 else t for k, t in state.items()}
    return rename_keys(_flip_up(linear), TO_LDM, inverse=True)


def _flip_up(state: State) -> State:
    """Number the decoder's levels (LDM keys) from the other end."""
    top = count_layers(state, r"decoder\.up\.(\d+)\.") - 1
    pattern = re.compile(r"^decoder\.up\.(\d+)\.")
    return {pattern.sub(lambda match: f"decoder.up.{top - int(match[1])}.", key): t for key, t in state.items()}


def _is_attention(ldm_key: str) -> bool:
    return bool(re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", ldm_key))

"""Key names of the 2D VAE: diffusers' AutoencoderKL <-> latent-diffusion's (CompVis `ldm`, Stability `sgm`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

# (diffusers, latent-diffusion); {i} and {j} stand for numbers. LDM counts `up` from the smallest resolution.
RENAMES = (
    ("down_blocks.{i}.resnets.{j}.", "down.{i}.block.{j}."),
    ("down_blocks.{i}.downsamplers.0.", "down.{i}.downsample."),
    ("up_blocks.{i}.resnets.{j}.", "up.{i}.block.{j}."),
    ("up_blocks.{i}.upsamplers.0.", "up.{i}.upsample."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
    ("mid_block.attentions.0.to_q.", "mid.attn_1.q."),
    ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
    ("mid_block.attentions.0.to_v.", "mid.attn_1.v."),
    ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
)
# Keys of a config.json of AutoencoderKL that change nothing in the network, or are read on their own.
NOT_NEEDED = ("sample_size", "force_upcast", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
SAME = {"swish": {"act_fn": "silu"}}  # two names of one function
# Latent factors, by a word that only the keys of the diffusion model or text encoder beside the VAE have. In their
# order: Stable Diffusion XL (generative-models, sd_xl_base.yaml), 1 and 2 (v1-inference.yaml), 3 (sd3_impls.py),
# FLUX.1 (flux/util.py). Their VAEs alone have equal shapes, so that a lone VAE does not say its factors.
FAMILIES = (
    ("conditioner.embedders.", 4, {"scaling_factor": 0.13025}),
    ("cond_stage_model.", 4, {"scaling_factor": 0.18215}),
    (".joint_blocks.", 16, {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    (".double_blocks.", 16, {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
)
# Attention as diffusers before 0.18 wrote it.
LEGACY = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


def factors_of(others: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, float]:
    """The latent factors of the VAE `state` (diffusers keys) by the names of what else its file holds; empty if that
    does not say them."""
    channels = state["decoder.conv_in.weight"].shape[1]
    levels = {key.split(".")[2] for key in state if key.startswith("encoder.down_blocks.")}
    names = list(others)
    for word, expected, factors in FAMILIES:
        if (channels, len(levels)) == (expected, 4) and any(word in name for name in names):
            return factors
    return {}


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKL, without its latent factors. config: arguments of SpatialVAE."""
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


def to_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers keys to LDM's; the attention's linear weights [C, C] become 1x1 convolutions."""
    top = max(int(m[1]) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", key)))
    renamed = {_flip(_rename(key, 0, 1), top): tensor for key, tensor in state.items()}
    return {k: t[:, :, None, None] if _attention_matrix(k) and t.ndim == 2 else t for k, t in renamed.items()}


def from_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of to_ldm."""
    top = max(int(m[1]) for key in state if (m := re.match(r"decoder\.up\.(\d+)\.", key)))
    squeezed = {k: t[:, :, 0, 0] if _attention_matrix(k) and t.ndim == 4 else t for k, t in state.items()}
    return {_rename(_flip(key, top), 1, 0): tensor for key, tensor in squeezed.items()}


def modernize(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention of old diffusers files (query, key, value, proj_attn) to today's names."""
    for old, new in LEGACY:
        state = {re.sub(rf"(attentions\.0\.){old}\.", rf"\g<1>{new}.", key): t for key, t in state.items()}
    return state


def _rename(key: str, source: int, target: int) -> str:
    for pair in RENAMES:
        pattern = re.escape(pair[source]).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        key = re.sub(rf"(?<![a-z_]){pattern}", _filler(pair[target]), key)
    return key


def _filler(template: str) -> Callable[[re.Match[str]], str]:
    return lambda match: template.format(**match.groupdict())


def _flip(key: str, top: int) -> str:
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{top - int(m[1])}.", key)


def _attention_matrix(ldm_key: str) -> bool:
    return bool(re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", ldm_key))

"""Files of the TAEHV networks (keys and shapes of madebyollin/taehv).

A published file does not name its variant, and the shapes do not always identify it: four variants with 16 latent
channels have equal shapes but other frame rules and latents. The variant comes from the user, or else from metadata in
or beside the file, from the shapes, or (with a note) from the file's name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from vae3d import __version__
from vae3d.arguments import Deviation, Mean, check_fields, short
from vae3d.checkpoints.published import PublishedWeights, State
from vae3d.io import MAX_BYTES, FileError, parse_json, read_json
from vae3d.models.layers.taehv_blocks import TGrow
from vae3d.models.taehv import BLOCKS, TAEHV, VARIANTS, WIDTHS
from vae3d.weight_files import read_metadata

MARKER = "encoder.2.conv.weight"  # a key that only these networks have
INFO_FILE = "model.json"  # beside a file without <its stem>.json
# LightX2V's network for HunyuanVideo 1.5: the same keys, but LeakyReLU and other latents.
UNSUPPORTED = ("lighttaehy",)


def read(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """Configuration and state of a TAEHV.

    Raises ValueError if the variant or its frame rule is unknown or does not fit, KeyError for a missing tensor.
    """
    state, info = weights.state, read_info(weights.path)
    variant = _find_variant(weights, info)
    spec = VARIANTS[variant]
    rule, latent = spec.rule, spec.latent
    if info.get("variant") == variant:  # else the user gave another
        rule, latent = info.get("frame_rule", rule), info.get("latent", latent)
    if rule != spec.rule:
        raise ValueError(f"its metadata gives {variant} the frame rule {rule!r}; it must be {spec.rule!r}")
    tgrow = _decoder_layers(state, "conv.weight")
    growing = [state[f"decoder.{index}.conv.weight"] for index in tgrow]
    if len(growing) != len(BLOCKS):
        raise ValueError(f"its decoder has {len(growing)} stages; a TAEHV has {len(BLOCKS)}")
    widths = [weight.shape[1] for weight in growing]
    if spec.decoder == "super":
        widths = [state["decoder.0.weight"].shape[0], *widths]
    else:
        last = _decoder_layers(state, "weight")[-1]
        widths = [*widths, state[f"decoder.{last}.weight"].shape[1]]
    counts, hidden = _decoder_blocks(state, tgrow, widths, spec.decoder)
    time_up = [len(weight) == 2 * weight.shape[1] for weight in growing]
    config = {
        "_target_": "vae3d.models.taehv.TAEHV",
        "variant": variant,
        "channels": state["encoder.0.weight"].shape[0],
        "decoder_channels": None if widths == list(WIDTHS[spec.decoder]) else widths,
        "decoder_blocks": None if counts == list(BLOCKS) else counts,
        "decoder_hidden": hidden,
        "decoder_time_upscale": None if time_up == list(spec.time_up) else time_up,
        "latent": latent,
    }
    if latent == "raw":
        config |= {name: info[name] for name in ("latents_mean", "latents_std") if info.get(name)}
    return config, state


def _decoder_layers(state: State, tensor: str) -> list[int]:
    """Indices of the decoder's layers that have this tensor."""
    return sorted(int(match[1]) for key in state if (match := re.fullmatch(rf"decoder\.(\d+)\.{tensor}", key)))


def _decoder_blocks(
    state: State, tgrow: Sequence[int], widths: Sequence[int], decoder: str
) -> tuple[list[int], list[int] | None]:
    """Blocks of every stage, and the channels inside them; None if as published."""
    inner, factor = ("conv.1.weight", 4) if decoder == "super" else ("conv.0.weight", 1)
    blocks = _decoder_layers(state, "conv.0.weight")
    counts, hidden = [], []
    for start, end, width in zip([0, *tgrow], tgrow, widths, strict=False):
        stage = [index for index in blocks if start <= index < end]
        counts.append(len(stage))
        hidden.append(state[f"decoder.{stage[0]}.{inner}"].shape[0] if stage else factor * width)
    return counts, None if hidden == [factor * width for width in widths[:3]] else hidden


class Info(TypedDict, total=False):
    """The keys of the metadata that are read."""

    variant: str | None
    latent: str | None
    frame_rule: str | None
    latents_mean: Sequence[Mean] | None
    latents_std: Sequence[Deviation] | None


def info_of(config: dict[str, Any]) -> dict[str, Any]:
    """The metadata that is written with the weights. config: constructor arguments of TAEHV."""
    spec = VARIANTS[config["variant"]]
    return {
        "architecture": "TAEHV",
        "vae3d": __version__,
        "variant": config["variant"],
        "latent": config.get("latent") or spec.latent,
        "frame_rule": spec.rule,
        "decoder": spec.decoder,
        "patch": spec.patch,
        "latent_channels": spec.latent_channels,
        "time_stride": 2 ** sum(spec.time_down),
        "space_stride": 8 * spec.patch,
        "decoder_time_upscale": list(config.get("decoder_time_upscale") or spec.time_up),
        "latents_mean": config.get("latents_mean"),
        "latents_std": config.get("latents_std"),
    }


def to_metadata(config: dict[str, Any]) -> dict[str, str]:
    """`info_of` for the header of a .safetensors file."""
    return {"taehv": json.dumps(info_of(config))}


def read_info(path: Path) -> dict[str, Any]:
    """The metadata in or beside a weight file; {} if there is none. Raises FileError if it cannot be read."""
    header = read_metadata(path).get("taehv")
    if header is not None:
        source = f"{path}, metadata `taehv`"
        if len(header) > MAX_BYTES:
            raise FileError(f"{source}: has more than {MAX_BYTES} characters, the maximum")
        return _check_info(parse_json(header, source), source)
    for file in (path.with_suffix(".json"), path.with_name(INFO_FILE)):
        if os.path.lexists(file):
            info = read_json(file)
            if isinstance(info, dict) and info.get("architecture") == "TAEHV":
                return _check_info(info, str(file))
    return {}


def _check_info(info: Any, source: str) -> dict[str, Any]:
    check_fields(info, Info, source)
    if (variant := info.get("variant")) not in (None, *VARIANTS):
        raise FileError(f"{source}: variant is {short(variant)}; give one of {', '.join(VARIANTS)}")
    return info


def fit_time(model: nn.Module, state: State) -> State:
    """State for a TAEHV whose decoder doubles the frame rate in fewer stages than the weights. Other states stay.

    Such a stage keeps the weights of the last frame of each pair (`patch_tgrow_layers` of the published code).
    Raises ValueError if the decoder doubles the frame rate in more stages than the weights.
    """
    if not isinstance(model, TAEHV):
        return state
    fitted = dict(state)
    for index, layer in enumerate(model.decoder):
        key = f"decoder.{index}.conv.weight"
        if not isinstance(layer, TGrow) or key not in state:
            continue
        own = layer.conv.weight
        if state[key].shape[1:] != own.shape[1:]:
            continue
        if len(state[key]) < len(own):
            raise ValueError(f"  {key} makes fewer frames than the model's; set its decoder_time_upscale to false")
        fitted[key] = state[key][-len(own) :]
    return fitted


def _find_variant(weights: PublishedWeights, info: dict[str, Any]) -> str:
    state, path = weights.state, weights.path
    given, written = weights.variant, info.get("variant")
    if given is not None and given not in VARIANTS:
        raise ValueError(f"variant is {given!r}; use one of {', '.join(VARIANTS)}")
    if any(name in path.stem.lower() for name in UNSUPPORTED):
        raise ValueError("LightTAE of HunyuanVideo 1.5 has these keys but another network (LeakyReLU); not supported")
    channels = state["encoder.17.weight"].shape[0]
    patch = math.isqrt(state["encoder.0.weight"].shape[1] // 3)
    wide = any(re.fullmatch(r"decoder\.\d+\.conv\.6\.weight", key) for key in state)
    decoder = "super" if "decoder.0.weight" in state else "wide" if wide else "base"
    possible = [v for v, k in VARIANTS.items() if (k.latent_channels, k.patch, k.decoder) == (channels, patch, decoder)]
    form = f"a {decoder} decoder, {channels} latent channels and patches of {patch}"
    for source, variant in (("the variant you gave", given), ("the variant in its metadata", written)):
        if variant is not None and variant not in possible:
            choices = " or ".join(possible) or "no variant"
            raise ValueError(f"has {form}, so {source} cannot be {variant}, but {choices}")
    if given is not None:
        if written not in (None, given):
            weights.notes.append(f"its metadata says {written}; it is read as {given}, the variant you gave")
        return given
    if written is not None:
        return written
    if not possible:
        raise ValueError(f"has {form}, which is no variant of TAEHV ({', '.join(VARIANTS)})")
    if len(possible) == 1:
        return possible[0]
    named = [name for name in possible if name in path.stem.lower()]
    if len(named) != 1:
        raise ValueError(
            f"has {form}, and so have {', '.join(possible)}, which differ in their frames and latents; name the "
            f"variant: vae3d.load(path, variant={possible[0]!r}), model.variant={possible[0]} for vae3d infer, or a "
            f"file name with it, as {possible[0]}.pth, for any command"
        )
    weights.notes.append(f"read as {named[0]} because of its name; otherwise give variant={' or '.join(possible)}")
    return named[0]

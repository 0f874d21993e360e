"""Files of the TAEHV networks: which variant one holds, and what is written beside our own.

Keys and shapes are those of madebyollin/taehv. A published file does not say what it is for: four variants of 16
channels have the same shapes, but other frames and other latents. So the variant is what the user says, or what was
written with the file, or what the shapes allow, or else, with a note, what the file's name says.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor, nn

from vae3d import __version__
from vae3d.arguments import Deviation, Mean, check_fields, short
from vae3d.io import MAX_BYTES, FileError, parse_json, read_json
from vae3d.models.layers.taehv_blocks import TGrow
from vae3d.models.taehv import BASE, SUPER, TAEHV, VARIANTS
from vae3d.weight_files import read_metadata

State = dict[str, Tensor]
MARKER = "encoder.4.conv.0.weight"  # a key that only these networks have
FACTS = "model.json"  # beside a file, if there is no <its stem>.json
TGROW = {"base": (7, 13, 19), "super": (7, 14, 21)}  # places in the decoder
OTHER_NETWORKS = ("lighttaehy",)  # LightX2V's for HunyuanVideo 1.5: the same keys, but LeakyReLU and other latents


def config_of(state: State, path: Path, variant: str | None, notes: list[str]) -> dict[str, Any]:
    """Constructor arguments of TAEHV for the file at `path`. variant: what the user says.

    Raises ValueError if the variant or its frame rule is not known or does not fit, KeyError for a tensor that should
    be there.
    """
    told = read_facts(path)
    variant = _variant(state, path, variant, told, notes)
    kind = VARIANTS[variant]
    if told.get("variant") == variant and told.get("frame_rule", kind.rule) != kind.rule:
        raise ValueError(
            f"says that frames of {variant} follow the rule {told['frame_rule']!r}, here it is {kind.rule!r}"
        )
    widths = _widths(state, kind.decoder)
    time = [len(state[_tgrow(kind.decoder, s)]) == 2 * state[_tgrow(kind.decoder, s)].shape[1] for s in range(3)]
    config = {
        "_target_": "vae3d.models.taehv.TAEHV",
        "variant": variant,
        "channels": state["encoder.0.weight"].shape[0],
        "decoder_channels": None if widths == list(SUPER if kind.decoder == "super" else BASE) else widths,
        "decoder_time_upscale": None if time == list(kind.time_up) else time,
        "latent": told.get("latent", kind.latent) if told.get("variant") == variant else kind.latent,
    }
    constants = {
        name: told[name] for name in ("latents_mean", "latents_std") if config["latent"] == "raw" and told.get(name)
    }
    return config | constants


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What a user of the weights must know, as it is written with them. config: constructor arguments of TAEHV."""
    kind = VARIANTS[config["variant"]]
    return {
        "architecture": "TAEHV",
        "vae3d": __version__,
        "variant": config["variant"],
        "latent": config.get("latent") or kind.latent,
        "frame_rule": kind.rule,
        "decoder": kind.decoder,
        "patch": kind.patch,
        "latent_channels": kind.latent_channels,
        "time_stride": 2 ** sum(kind.time_down),
        "space_stride": 8 * kind.patch,
        "decoder_time_upscale": list(config.get("decoder_time_upscale") or kind.time_up),
        "latents_mean": config.get("latents_mean"),
        "latents_std": config.get("latents_std"),
    }


def metadata(told: dict[str, Any]) -> dict[str, str]:
    """`facts` for the header of a .safetensors file."""
    return {"taehv": json.dumps(told)}


class Facts(TypedDict, total=False):
    """What is read of the metadata of a weight file."""

    variant: str | None
    latent: str | None
    frame_rule: str | None
    latents_mean: Sequence[Mean] | None
    latents_std: Sequence[Deviation] | None


def read_facts(path: Path) -> dict[str, Any]:
    """What is written in or beside a weight file; empty if nothing is. Raises FileError if it cannot be read."""
    header = read_metadata(path).get("taehv")
    if header is not None:
        if len(header) > MAX_BYTES:
            raise FileError(f"{path}: its metadata `taehv` has more than {MAX_BYTES} characters, the maximum")
        return _checked(parse_json(header, f"{path}, metadata `taehv`"), f"{path}, metadata `taehv`")
    for beside in (path.with_suffix(".json"), path.with_name(FACTS)):
        if os.path.lexists(beside):
            told = read_json(beside)
            if isinstance(told, dict) and told.get("architecture") == "TAEHV":
                return _checked(told, str(beside))
    return {}


def _checked(told: Any, source: str) -> dict[str, Any]:
    check_fields(told, Facts, source)
    if (variant := told.get("variant")) not in (None, *VARIANTS):
        raise FileError(f"{source}: variant is {short(variant)}; give one of {', '.join(VARIANTS)}")
    return told


def fit_time(model: nn.Module, state: State) -> State:
    """State for a TAEHV whose decoder doubles the frame rate less often than the weights': of every group of frames
    that they make, the last are made (`patch_tgrow_layers` of the published code). Other states stay as they are.

    Raises ValueError if the decoder doubles it more often: weights for more frames are not there.
    """
    if not isinstance(model, TAEHV):
        return state
    fitted = dict(state)
    for number, layer in enumerate(model.decoder):
        key, own = f"decoder.{number}.conv.weight", getattr(getattr(layer, "conv", None), "weight", None)
        if not isinstance(layer, TGrow) or key not in state or state[key].shape[1:] != own.shape[1:]:
            continue
        if len(state[key]) < len(own):
            raise ValueError(
                f"  {key} makes fewer frames than the model's; leave its stage out of decoder_time_upscale"
            )
        fitted[key] = state[key][-len(own) :]
    return fitted


def _variant(state: State, path: Path, said: str | None, told: dict[str, Any], notes: list[str]) -> str:
    if said is not None and said not in VARIANTS:
        raise ValueError(f"variant is {said!r}; use one of {', '.join(VARIANTS)}")
    if any(name in path.stem.lower() for name in OTHER_NETWORKS):
        raise ValueError(
            "LightTAE of HunyuanVideo 1.5 is another network (LeakyReLU) under the same keys; not supported"
        )
    channels, patch = state["encoder.17.weight"].shape[0], math.isqrt(state["encoder.0.weight"].shape[1] // 3)
    decoder = "super" if "decoder.0.weight" in state else "base"
    possible = [v for v, k in VARIANTS.items() if (k.latent_channels, k.patch, k.decoder) == (channels, patch, decoder)]
    what = f"a {decoder} decoder, {channels} latent channels and patches of {patch}"
    for source, name in (("asked for", said), ("told by the file", told.get("variant"))):
        if name is not None and name not in possible:
            raise ValueError(f"has {what}, which is not {name} ({source}) but {' or '.join(possible) or 'unknown'}")
    if said is not None and told.get("variant", said) != said:
        notes.append(f"the file says that it is {told['variant']}; it is read as {said}, as asked for")
    if said or told.get("variant"):
        return said or told["variant"]
    if len(possible) > 1:
        return _by_name(path, possible, what, notes)
    if not possible:
        raise ValueError(f"has {what}, as no variant of TAEHV ({', '.join(VARIANTS)})")
    return possible[0]


def _by_name(path: Path, possible: list[str], what: str, notes: list[str]) -> str:
    named = [name for name in possible if name in path.stem.lower()]
    if len(named) != 1:
        raise ValueError(
            f"has {what}, as {', '.join(possible)}, which differ in their frames and latents, and nothing tells which "
            f"it is; say so: vae3d.load(path, variant={possible[0]!r}), or +model.variant={possible[0]} for infer.py"
        )
    notes.append(f"taken for {named[0]} by its name alone; if it is not, give variant={' or '.join(possible)}")
    return named[0]


def _tgrow(decoder: str, stage: int) -> str:
    return f"decoder.{TGROW[decoder][stage]}.conv.weight"


def _widths(state: State, decoder: str) -> list[int]:
    """decoder_channels."""
    if decoder == "base":
        return [state[_tgrow(decoder, stage)].shape[1] for stage in range(3)] + [state["decoder.22.weight"].shape[1]]
    return [state["decoder.0.weight"].shape[0]] + [state[_tgrow(decoder, stage)].shape[1] for stage in range(3)]

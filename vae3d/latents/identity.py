"""What a latent cache is of: the autoencoder, by its weights, and the way from files to pixels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vae3d.hashing import weights_hash
from vae3d.inference.folder import settings_difference
from vae3d.latents.codec import LatentCodec
from vae3d.models.registry import MODELS

FACTORS = ("shift", "scale", "scaling_factor", "shift_factor")  # of a model, not of what it is made of
RUNNING = ("frame_batch", "gradient_checkpointing", "chunk_latents")  # change memory, not latents


def vae_facts(codec: LatentCodec, checkpoint: str) -> dict[str, Any]:
    """What meta.json tells of an autoencoder. checkpoint: where it was loaded from, for readers.

    encoder: hash of the weights that make latents; another decoder, or other factors, leave a cache valid.
    """
    model, spec = codec.model, codec.model.spec
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in FACTORS}
    return {
        "checkpoint": checkpoint,
        "model": type(model).__name__,
        "config": None if codec.config is None else dict(codec.config),
        "encoder": encoder_hash(codec),
        "weights": weights_hash(weights),
        "channels": spec.channels,
        "time_stride": spec.time_stride,
        "space_stride": spec.space_stride,
        "causal": spec.causal,
        "shift": list(spec.shift),
        "scale": list(spec.scale),
    }


def encoder_hash(codec: LatentCodec) -> str:
    modules = codec.model.trainable_parts()["encoder"]
    states = [(index, module.state_dict()) for index, module in enumerate(modules)]
    return weights_hash({f"{index}.{name}": tensor for index, state in states for name, tensor in state.items()})


def vae_difference(told: Mapping[str, Any], codec: LatentCodec) -> str | None:
    """How the autoencoder that meta.json tells of differs from the codec's in the latents it makes, or None."""
    here = encoder_hash(codec)
    if told["encoder"] != here:
        return f"the encoder's weights have sha256 {told['encoder'][:12]} there and {here[:12]} here"
    if told["config"] is None or codec.config is None:
        return None
    return settings_difference(latent_config(told["config"]), latent_config(codec.config))


def latent_config(config: Mapping[str, Any], top: bool = True) -> dict[str, Any]:
    """What of a model's configuration changes its raw latents, flat, with the defaults of what it leaves out."""
    kept: dict[str, Any] = {}
    for name, value in {**_defaults(config.get("_target_")), **config}.items():
        if name in RUNNING or name.startswith("decoder") or (top and name in FACTORS):
            continue
        if isinstance(value, Mapping):
            kept |= {f"{name}.{inner}": v for inner, v in latent_config(value, top=False).items()}
        else:
            kept[name] = list(value) if isinstance(value, tuple) else value
    return kept


def _defaults(target: Any) -> dict[str, Any]:
    """Of the arguments of a model of this project, which layouts of published weights leave out."""
    if not isinstance(target, str) or target not in MODELS:
        return {}
    arguments = inspect.signature(MODELS[target]).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}

"""Identity of the autoencoder whose latents a cache or a diffusion model holds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import nn

from vae3d.arguments import Deviation, Mean
from vae3d.hashing import weights_hash
from vae3d.latents.codec import LatentCodec
from vae3d.models.registry import MODELS, RUNNING, TARGET, is_known
from vae3d.result_folder import settings_difference

FACTORS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")  # settings of the normalisation


class VaeMetadata(TypedDict):
    """What files record about an autoencoder and are checked for; vae_metadata has more, for information."""

    model: str
    encoder: str
    config: Mapping[str, Any] | None
    latents_mean: Sequence[Mean]
    latents_std: Sequence[Deviation]


def vae_metadata(codec: LatentCodec, checkpoint: str) -> dict[str, Any]:
    """Metadata of an autoencoder for meta.json and diffusion.yaml. checkpoint: its path, for information.

    encoder: hash of the encoder's weights; a cache stays valid with another decoder or normalisation.
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
        "latents_mean": list(spec.latents_mean),
        "latents_std": list(spec.latents_std),
    }


def encoder_hash(codec: LatentCodec) -> str:
    """Hash of all weights that a latent depends on: those of a video autoencoder's 2D encoder too."""
    modules = codec.model.trainable_parts()["encoder"]
    return weights_hash(nn.ModuleList(modules).state_dict())


def vae_difference(metadata: Mapping[str, Any], codec: LatentCodec) -> str | None:
    """Why the codec's raw latents differ from those of the autoencoder with this metadata; None if they are equal."""
    here = encoder_hash(codec)
    if metadata["encoder"] != here:
        return f"the encoder's weights have sha256 {metadata['encoder'][:12]} there and {here[:12]} here"
    if metadata["config"] is None or codec.config is None:
        return None
    return settings_difference(latent_config(metadata["config"]), latent_config(codec.config))


def latent_config(config: Mapping[str, Any], top: bool = True) -> dict[str, Any]:
    """The settings of a model configuration that change its raw latents, flat, with defaults for what it leaves out."""
    arguments = inspect.signature(MODELS[config[TARGET]]).parameters.values() if is_known(config) else ()
    defaults = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    settings: dict[str, Any] = {}
    for name, value in {**defaults, **config}.items():
        if name in RUNNING or name.startswith("decoder") or (top and name in FACTORS):
            continue
        if isinstance(value, Mapping):
            settings |= {f"{name}.{inner}": v for inner, v in latent_config(value, top=False).items()}
        else:
            settings[name] = list(value) if isinstance(value, tuple) else value
    return settings

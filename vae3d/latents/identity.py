"""What a latent cache is of: the autoencoder, by its weights, and the way from files to pixels."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae3d.data.dataset_rows import is_row, version_of
from vae3d.data.images import sequence_files
from vae3d.data.media import MediaError
from vae3d.io import FileError, check_regular
from vae3d.latents.codec import LatentCodec
from vae3d.models.registry import MODELS

FACTORS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")  # of a model, not of what it is made of
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
        "latents_mean": list(spec.latents_mean),
        "latents_std": list(spec.latents_std),
    }


def encoder_hash(codec: LatentCodec) -> str:
    modules = codec.model.trainable_parts()["encoder"]
    states = [(index, module.state_dict()) for index, module in enumerate(modules)]
    return weights_hash({f"{index}.{name}": tensor for index, state in states for name, tensor in state.items()})


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vae_difference(told: Mapping[str, Any], codec: LatentCodec) -> str | None:
    """How the autoencoder that meta.json tells of differs from the codec's in the latents it makes, or None."""
    here = encoder_hash(codec)
    if told["encoder"] != here:
        return f"the encoder's weights have sha256 {told['encoder'][:12]} there and {here[:12]} here"
    if told["config"] is None or codec.config is None:
        return None
    return difference(latent_config(told["config"]), latent_config(codec.config))


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The settings that differ, by name, or None."""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    told = ((name, _short(there.get(name)), _short(here.get(name))) for name in names)
    return ", ".join(f"{name} is {one} there and {other} here" for name, one, other in told) or None


def _short(value: Any) -> Any:
    """A hash by its first digits, as everything else."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def source_version(path: str, hashed: bool = False) -> dict[str, Any] | None:
    """What changes when a source file is replaced: size and modification time, and with `hashed` the sha256 of its
    content; of numbered images of all of them, of a dataset's row of the dataset's files. None if it is not there."""
    if is_row(path):
        return {"dataset": version_of(path)}
    try:
        files = sequence_files(path)
        stats = [os.stat(file) for file in files]
        hashes = [file_hash(file) for file in files] if hashed else []
    except (OSError, MediaError, FileError):
        return None
    times = [stat.st_mtime_ns for stat in stats]
    single = len(files) == 1
    version = {"bytes": sum(stat.st_size for stat in stats), "modified": times[0] if single else digest_of(times)}
    return version | ({"sha256": hashes[0] if single else digest_of(hashes)} if hashed else {})


def file_hash(file: Path) -> str:
    """sha256. Raises OSError, and FileError for a pipe or a device."""
    check_regular(file)
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(content: Any) -> str:
    """16 digits that tell whether two JSON contents are the same."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


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

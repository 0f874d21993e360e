"""Exports of diffusion models: EMA weights, and diffusion.yaml with all that sampling needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from vae3d import __version__
from vae3d.arguments import Count, Range, Size, check_fields, short
from vae3d.checkpoints.formats import CheckpointError, as_checkpoint_error, check_state, load_weights, read_weights
from vae3d.checkpoints.location import DIFFUSION_CONFIG as CONFIG
from vae3d.checkpoints.location import step_folders, warn_if_older
from vae3d.diffusion.build import build_network, build_process
from vae3d.diffusion.processes import Process
from vae3d.io import FileError, atomic_dir, parse_yaml, read_yaml, save_tensors, write_text, yaml_text
from vae3d.latents.codec import LatentCodec
from vae3d.latents.identity import VaeMetadata, vae_difference
from vae3d.latents.scale import LatentStats

MAX_CONFIG_BYTES = 2**20  # enough for 40,000 classes; a file of 4 MiB takes 12 s to read
MAX_LATENTS, MAX_PIXELS = 2**28, 2**31  # per sample; larger sizes are not plausible
ROUNDING = 1e-6  # relative tolerance of latent statistics


class VaeConfig(VaeMetadata):
    """The autoencoder whose latents the model was trained on, in diffusion.yaml."""

    path: str


Shape = Annotated[Sequence[Count], Size(3, 3)]  # frames, height, width


class DataScale(TypedDict):
    """Statistics of the latents of the training data, per channel."""

    count: Count
    mean: Annotated[Sequence[float], Size(1, 10**4)]
    std: Annotated[Sequence[float], Size(1, 10**4)]


class TrainedSizes(TypedDict, total=False):
    """sizes: of the training clips; without it, `size` only."""

    sizes: Annotated[Sequence[Shape], Size(1, 10**4)]


class ExportConfig(TrainedSizes):
    """The keys of diffusion.yaml; build_network and build_process check `network` and `process`."""

    network: Mapping[str, Any]
    process: Mapping[str, Any]
    latent_shape: Annotated[Sequence[Count], Size(4, 4)]  # C, t, h, w
    size: Shape  # of samples, by default
    classes: Sequence[str]
    trained_classes: Sequence[Annotated[int, Range(0, 2**31)]]  # indices of `classes`
    label_dropout: Annotated[float, Range(0, 1)]
    ema: Annotated[Sequence[Annotated[float, Range(0, 1)]], Size(1, 100)]
    vae: VaeConfig
    latents: DataScale


@dataclass(frozen=True)
class Export:
    """config: diffusion.yaml. weights: EMA weights of one rate."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    def network(self) -> nn.Module:
        """The network in eval mode. Raises CheckpointError if the weights do not fit diffusion.yaml."""
        network = build_network(self.config["network"], self.config["latent_shape"])
        load_weights(network, self.weights, str(self.folder))
        return network.eval()

    def process(self) -> Process:
        return build_process(self.config["process"])

    def data_rms(self) -> float:
        """Root mean square of the latents of the training data."""
        scale = self.config["latents"]
        mean, std = (torch.tensor(scale[name], dtype=torch.float64) for name in ("mean", "std"))
        return LatentStats(scale["count"], mean, std).rms()


def weights_file(folder: Path, decay: float, first: bool) -> Path:
    return folder / ("model.safetensors" if first else f"ema_{decay}.safetensors")


def check_config(config: Mapping[str, Any], rates: Sequence[float]) -> None:
    """Raises FileError if read_export would not read the configuration, as for some names of classes."""
    text = _config_text(config, rates)
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise FileError(
            f"exports would have a {CONFIG} of {len(text.encode())} bytes, with its {len(config['classes'])} classes; "
            f"the maximum is {MAX_CONFIG_BYTES}: use fewer classes, or shorter names"
        )
    parse_yaml(text, f"{CONFIG} of the exports")


def _config_text(config: Mapping[str, Any], rates: Iterable[float]) -> str:
    return yaml_text({"vae3d": __version__, **config, "ema": list(rates)})


def write_export(folder: Path, config: Mapping[str, Any], weights: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Replace `folder` atomically by an export. weights: EMA rate -> state dict, the default rate first."""
    with atomic_dir(folder) as unfinished:
        for number, (decay, state) in enumerate(weights.items()):
            kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
            save_tensors(kept, weights_file(unfinished, decay, first=number == 0))
        write_text(unfinished / CONFIG, _config_text(config, weights))


def read_export(path: str | Path, decay: float | None = None) -> Export:
    """Read an export, or the newest export of a run. decay: EMA rate; None: the default rate.

    Raises CheckpointError if there is no export, if it cannot be read, if diffusion.yaml and weights do not match, or
    if there are no weights of that rate.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        exports = step_folders(folder / "exports", CONFIG)
        if not exports:
            raise CheckpointError(
                f"{folder} is not a diffusion model: neither it nor exports/step-* in it has a {CONFIG}"
            )
        warn_if_older(folder, exports[-1])
        folder = exports[-1]
    with as_checkpoint_error():
        config, network = _read_config(folder / CONFIG)
    rates = config["ema"]
    if decay is not None and decay not in rates:
        raise CheckpointError(f"{folder} has no averages of ema={decay}; it has {', '.join(map(str, rates))}")
    file = weights_file(folder, decay or rates[0], first=decay in (None, rates[0]))
    try:
        weights = read_weights(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    check_state(network, weights, f"{file} ({CONFIG} beside it)")
    return Export(folder, config, weights)


def _read_config(file: Path) -> tuple[dict[str, Any], nn.Module]:
    """The checked content of diffusion.yaml, and its network on the meta device, where it takes no memory."""
    config = read_yaml(file, MAX_CONFIG_BYTES)
    check_fields(config, ExportConfig, str(file))
    sizes = config.get("sizes", [config["size"]])
    limits = [("latent_shape", config["latent_shape"], MAX_LATENTS), ("size", config["size"], MAX_PIXELS)]
    for name, shape, limit in (*limits, *(("sizes", size, MAX_PIXELS) for size in sizes)):
        if math.prod(shape) > limit:
            raise FileError(f"{file}: {name} is {short(shape)}; a sample has at most {limit} values")
    try:
        build_process(config["process"], file)
        with torch.device("meta"):
            network = build_network(config["network"], config["latent_shape"], file)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{file}: {error}") from error
    classes, trained = len(config["classes"]), config["trained_classes"]
    if classes > network.num_classes:
        raise FileError(f"{file}: there are {classes} classes, and the network has {network.num_classes}")
    if outside := [index for index in trained if index >= classes]:
        raise FileError(f"{file}: trained_classes has {outside[0]}, and there are {classes} classes")
    if network.num_classes and not trained:
        raise FileError(f"{file}: trained_classes is empty, and the network has {network.num_classes} classes")
    return {**config, "sizes": sizes, "network": network.config}, network


def check_same_vae(trained: Mapping[str, Any], codec: LatentCodec, path: str) -> None:
    """Raises CheckpointError if the autoencoder at `path` makes other latents than the one of training.

    trained: vae_metadata of the autoencoder of training.
    """
    why = vae_difference(trained, codec)
    for name in ("latents_mean", "latents_std"):
        there, here = trained[name], list(getattr(codec.model.spec, name))
        if why is None and (len(there) != len(here) or not np.allclose(there, here, rtol=ROUNDING, atol=ROUNDING)):
            short = [", ".join(f"{value:.4f}" for value in values) for values in (there, here)]
            why = f"the {name} of its latents is [{short[0]}] there and [{short[1]}] here"
    if why:
        raise CheckpointError(
            f"{path} is another autoencoder than {trained['path']} ({trained['model']}), on whose latents this "
            f"diffusion model was trained: {why}"
        )

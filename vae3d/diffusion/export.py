"""Diffusion models on disk: averaged weights, and everything that sampling needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vae3d import __version__
from vae3d.arguments import Count, Deviation, Mean, Range, Size, check_fields, short
from vae3d.checkpoints.formats import CheckpointError, as_checkpoint_error, check_state, load_state, read_state
from vae3d.checkpoints.location import warn_if_older
from vae3d.diffusion.build import build_network, build_process
from vae3d.diffusion.processes import Process
from vae3d.io import FileError, atomic_folder, read_yaml, write_text, yaml_text
from vae3d.latents.codec import LatentCodec
from vae3d.latents.identity import vae_difference

CONFIG = "diffusion.yaml"
MAX_CONFIG_BYTES = 2**19  # of 20,000 classes
MAX_LATENTS, MAX_PIXELS = 2**28, 2**31  # of one sample; more is not what anybody trained on
ROUNDING = 1e-6  # relative, of scale factors


class VaeFacts(TypedDict):
    """What is read of the autoencoder that a model was trained with."""

    path: str
    model: str
    encoder: str
    config: Mapping[str, Any] | None
    shift: Sequence[Mean]
    scale: Sequence[Deviation]


class Facts(TypedDict):
    """What is read of a diffusion.yaml; `network` and `process` are checked where they are built."""

    network: Mapping[str, Any]
    process: Mapping[str, Any]
    latent_shape: Annotated[Sequence[Count], Size(4, 4)]  # C, t, h, w
    size: Annotated[Sequence[Count], Size(3, 3)]  # frames, height, width
    classes: Sequence[str]
    known: Sequence[Annotated[int, Range(0, 2**31)]]  # indices of `classes`
    label_dropout: Annotated[float, Range(0, 1)]
    ema: Annotated[Sequence[Annotated[float, Range(0, 1)]], Size(1, 100)]
    vae: VaeFacts


@dataclass(frozen=True)
class Export:
    """A folder, what its diffusion.yaml tells, and the weights of one of its averages."""

    folder: Path
    told: dict[str, Any]
    weights: dict[str, Tensor]

    def network(self) -> nn.Module:
        """As it was trained. Raises CheckpointError if the weights are of another network than diffusion.yaml tells."""
        network = build_network(self.told["network"], self.told["latent_shape"])
        load_state(network, self.weights, str(self.folder))
        return network.eval()

    def process(self) -> Process:
        return build_process(self.told["process"])


def weights_file(folder: Path, decay: float, first: bool) -> Path:
    return folder / ("model.safetensors" if first else f"ema_{decay:g}.safetensors")


def write_export(folder: Path, told: Mapping[str, Any], weights: Mapping[float, Mapping[str, Tensor]]) -> None:
    """In place of all that is in `folder`: it is whole, or what was there stays.

    weights: of each rate of averaging, the first one first.
    """
    with atomic_folder(folder) as unfinished:
        for number, (decay, state) in enumerate(weights.items()):
            kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
            save_file(kept, weights_file(unfinished, decay, first=number == 0))
        write_text(unfinished / CONFIG, yaml_text({"vae3d": __version__, **told, "ema": list(weights)}))


def read_export(path: str | Path, decay: float | None = None) -> Export:
    """Of a run (its newest), or an export. decay: of the averages; None: the run's first rate.

    Raises CheckpointError if there is none, if it cannot be read, if what diffusion.yaml says builds no network and
    process that its weights fit, or if it has no averages of that rate.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        exports = sorted(file.parent for file in folder.glob(f"exports/step-*/{CONFIG}"))
        if not exports:
            raise CheckpointError(f"{folder} is no diffusion model: neither it nor its exports have a {CONFIG}")
        warn_if_older(folder, exports[-1])
        folder = exports[-1]
    with as_checkpoint_error():
        told, network = _read_config(folder / CONFIG)
    rates = told["ema"]
    if decay is not None and decay not in rates:
        raise CheckpointError(f"{folder} has no averages of ema={decay:g}; it has {', '.join(f'{r:g}' for r in rates)}")
    file = weights_file(folder, decay or rates[0], first=decay in (None, rates[0]))
    try:
        weights = read_state(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    check_state(network, weights, f"{file} ({CONFIG} beside it)")
    return Export(folder, told, weights)


def _read_config(file: Path) -> tuple[dict[str, Any], nn.Module]:
    """What a diffusion.yaml says, checked, and its network on the meta device, where it takes no memory."""
    told = read_yaml(file, MAX_CONFIG_BYTES)
    check_fields(told, Facts, str(file))
    for name, limit in (("latent_shape", MAX_LATENTS), ("size", MAX_PIXELS)):
        if math.prod(told[name]) > limit:
            raise FileError(f"{file}: {name} is {short(told[name])}; of one sample {limit} values are the maximum")
    try:
        build_process(told["process"], file)
        with torch.device("meta"):
            network = build_network(told["network"], told["latent_shape"], file)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{file}: {error}") from error
    classes = len(told["classes"])
    if classes > network.num_classes:
        raise FileError(f"{file}: there are {classes} classes, and the network has {network.num_classes}")
    if strange := [number for number in told["known"] if number >= classes]:
        raise FileError(f"{file}: known has {strange[0]}, and there are {classes} classes")
    if network.num_classes and not told["known"]:
        raise FileError(f"{file}: known is empty, and the network has {network.num_classes} classes")
    return {**told, "network": network.config}, network


def check_same_vae(told: Mapping[str, Any], codec: LatentCodec, path: str) -> None:
    """Raises CheckpointError if the autoencoder at `path` has not the latents that a diffusion model learned.

    told: vae_facts of the autoencoder that it was trained with.
    """
    why = vae_difference(told, codec)
    for name in ("shift", "scale"):
        there, here = told[name], list(getattr(codec.model.spec, name))
        if why is None and not _close(there, here):
            short = [", ".join(f"{value:.4f}" for value in values) for values in (there, here)]
            why = f"the {name} of its latents is [{short[0]}] there and [{short[1]}] here"
    if why:
        raise CheckpointError(
            f"{path} is another autoencoder than {told['path']} ({told['model']}), on whose latents this diffusion "
            f"model was trained: {why}"
        )


def _close(there: Sequence[float], here: Sequence[float]) -> bool:
    same = len(there) == len(here)
    return same and all(abs(a - b) <= ROUNDING * max(1.0, abs(a)) for a, b in zip(there, here, strict=True))

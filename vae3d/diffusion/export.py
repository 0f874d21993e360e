"""Diffusion models on disk: averaged weights, and everything that sampling needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae3d import __version__
from vae3d.checkpoints.formats import CheckpointError, load_state, warn_if_older
from vae3d.diffusion.build import build_network, build_process
from vae3d.diffusion.processes import Process
from vae3d.io import atomic_folder
from vae3d.latents.codec import LatentCodec
from vae3d.latents.identity import vae_difference

CONFIG = "diffusion.yaml"
ROUNDING = 1e-6  # relative, of scale factors


@dataclass(frozen=True)
class Export:
    """A folder, what its diffusion.yaml tells, and the weights of one of its averages."""

    folder: Path
    told: dict[str, Any]
    weights: dict[str, Tensor]

    def network(self) -> nn.Module:
        """As it was trained. Raises CheckpointError if the weights are of another network than diffusion.yaml tells."""
        try:
            network = build_network(self.told["network"], self.told["latent_shape"])
        except ValueError as error:
            raise CheckpointError(f"{self.folder / CONFIG} does not build a network: {error}") from error
        load_state(network, self.weights, str(self.folder))
        return network.eval()

    def process(self) -> Process:
        return build_process(self.told["process"])


def weights_file(folder: Path, decay: float, first: bool) -> Path:
    return folder / ("model.safetensors" if first else f"ema_{decay:g}.safetensors")


def write_export(folder: Path, told: Mapping[str, Any], weights: Mapping[float, Mapping[str, Tensor]]) -> None:
    """In place of what is there, whole or not at all. weights: of each rate of averaging, the first one first."""
    with atomic_folder(folder) as unfinished:
        for number, (decay, state) in enumerate(weights.items()):
            kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
            save_file(kept, weights_file(unfinished, decay, first=number == 0))
        text = {"vae3d": __version__, **told, "ema": list(weights)}
        (unfinished / CONFIG).write_text(yaml.safe_dump(text, sort_keys=False))


def read_export(path: str | Path, decay: float | None = None) -> Export:
    """Of a run (its newest), or an export. decay: of the averages; None: the run's first rate.

    Raises CheckpointError if there is none, if it cannot be read, or if it has no averages of that rate.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        exports = sorted(file.parent for file in folder.glob(f"exports/step-*/{CONFIG}"))
        if not exports:
            raise CheckpointError(f"{folder} is no diffusion model: neither it nor its exports have a {CONFIG}")
        warn_if_older(folder, exports[-1])
        folder = exports[-1]
    told = yaml.safe_load((folder / CONFIG).read_text())
    rates = told["ema"]
    if decay is not None and decay not in rates:
        raise CheckpointError(f"{folder} has no averages of ema={decay:g}; it has {', '.join(f'{r:g}' for r in rates)}")
    file = weights_file(folder, decay or rates[0], first=decay in (None, rates[0]))
    try:
        return Export(folder, told, load_file(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error


def refuse_other_vae(told: Mapping[str, Any], codec: LatentCodec, path: str) -> None:
    """Raises CheckpointError if the autoencoder at `path` has not the latents that a diffusion model learned.

    told: vae_facts of the autoencoder that it was trained with.
    """
    why = vae_difference(told, codec)
    for name in ("shift", "scale"):
        there, here = told[name], list(getattr(codec.model.spec, name))
        if why is None and any(abs(a - b) > ROUNDING * max(1.0, abs(a)) for a, b in zip(there, here, strict=True)):
            short = [", ".join(f"{value:.4f}" for value in values) for values in (there, here)]
            why = f"the {name} of its latents is [{short[0]}] there and [{short[1]}] here"
    if why:
        raise CheckpointError(
            f"{path} is another autoencoder than {told['path']} ({told['model']}), on whose latents this diffusion "
            f"model was trained: {why}"
        )

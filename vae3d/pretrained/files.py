"""Published weight files: reading their tensors, and giving them to the networks built here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Size, Tensor, nn

from vae3d.io import FileError
from vae3d.pretrained.weights import WeightsMissing
from vae3d.weight_files import read_tensors


def read(file: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a weight file of torch.save or safetensors; also where they are nested under
    `state_dict`. Nothing that the file holds is run.

    Raises WeightsMissing if the file is damaged or holds no tensors.
    """
    try:
        found = read_tensors(file)
    except FileError as error:
        raise WeightsMissing(str(error)) from error
    if not found:
        raise WeightsMissing(f"{file}: holds no tensors")
    return {name.removeprefix("state_dict."): tensor for name, tensor in found.items()}


def assign(network: nn.Module, state: Mapping[str, Tensor], file: Path, name: str | None = None) -> None:
    """Give `network` its tensors of `state`, read from `file`, as fp32, and freeze it. What it has no place for is
    ignored: a classifier, counts of batches.

    name: what an error calls the network, by default its class.
    Raises WeightsMissing with the first tensors that are missing or of another shape.
    """
    shapes = {key: t.shape for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    refuse(misfits(state, shapes), file, name or type(network).__name__)
    network.load_state_dict({key: state[key].float() for key in shapes}, assign=True)
    network.eval().requires_grad_(False)


def misfits(state: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> list[str]:
    """Which of the tensors `shapes` are not in `state`, or in another shape."""
    missing = [f"{key} is missing" for key in shapes if key not in state]
    return missing + [
        f"{key} has shape {list(state[key].shape)}, not {list(shape)}"
        for key, shape in shapes.items()
        if key in state and state[key].shape != shape
    ]


def refuse(errors: list[str], file: Path, name: str) -> None:
    """Raises WeightsMissing with the first errors, if there are any."""
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise WeightsMissing(f"{file} does not hold the weights of {name}: {'; '.join(errors[:3])}{more}")

"""The smaller model's weights: copied, merged and refitted."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.interface import VideoAutoencoder
from vae3d.pruning.choose import Kept
from vae3d.pruning.layers import CONVS, PruningError, channel_axis, hooked, is_per_channel, is_rms, run
from vae3d.pruning.measure import Statistics, equal_channels

POSITIONS = 12_000  # of a layer's output, that its weights are refitted on
RIDGE = 1e-4  # of the refit, relative to the mean power of a layer's inputs
ROUNDING = 1000  # differences of so many eps of a layer's outputs are not fitted


@torch.no_grad()
def copy_channels(
    source: VideoAutoencoder,
    student: VideoAutoencoder,
    pairs: dict[str, str],
    kept: Kept,
    statistics: dict[str, Statistics],
) -> None:
    """Copy the kept channels; weights that read removed ones are added to those of the channels that predict them."""
    for mine, theirs in pairs.items():
        layer, large = student.get_submodule(mine), source.get_submodule(theirs)
        inside, outside = kept.channels.get((theirs, "in")), kept.channels.get((theirs, "out"))
        tensors = {**large._parameters, **large._buffers}
        for name, target in {**layer._parameters, **layer._buffers}.items():
            tensor = tensors[name]
            if target is None or tensor is None or outside is None or tensor.dim() == 0:
                if target is not None and tensor is not None:
                    _set(target, tensor, f"{mine}.{name}")
                continue
            if is_per_channel(large):
                axis = max(range(tensor.dim()), key=lambda d: tensor.shape[d]) if not isinstance(large, CONVS) else 0
                value = tensor.index_select(axis, outside.to(tensor.device))
                if is_rms(large) and name != "bias":
                    value = kept.scale(value, (theirs, "out"), axis)
                _set(target, value, f"{mine}.{name}")
                continue
            value = tensor
            if value.dim() > 1 and len(inside) < value.shape[1]:
                value = kept.scale(_merge_inputs(value, inside, statistics[theirs]), (theirs, "in"), 1)
            value = kept.scale(value[outside.to(value.device)], (theirs, "out"))
            _set(target, value, f"{mine}.{name}")
    state, own = source.state_dict(), student.state_dict()
    for key in own.keys() - {f"{mine}.{name}" for mine in pairs for name in student.get_submodule(mine).state_dict()}:
        _set(own[key], state[key], key)


def _merge_inputs(weight: Tensor, kept: Tensor, statistics: Statistics) -> Tensor:
    """Weights over the kept inputs: those of each removed one are added as the kept ones predict it."""
    moment = statistics.moment.cpu() / statistics.count
    removed = torch.tensor([i for i in range(weight.shape[1]) if i not in set(kept.tolist())])
    power = moment.diagonal()
    inner = moment[kept][:, kept]
    ridge = RIDGE * (inner.diagonal().mean().item() or 1.0)
    equal = equal_channels(moment)
    coefficients = torch.linalg.solve(inner + ridge * torch.eye(len(kept)), moment[kept][:, removed])
    for column, index in enumerate(removed.tolist()):
        same = equal[kept, index]
        if power[index] == 0 or same.any():
            coefficients[:, column] = 0
            if power[index] > 0:
                coefficients[same.nonzero()[0, 0], column] = 1
    added = torch.einsum(
        "oi...,ki->ok...", weight[:, removed.to(weight.device)].double(), coefficients.to(weight.device)
    )
    return (weight[:, kept.to(weight.device)].double() + added).to(weight)


def _set(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise PruningError(f"{name} is {list(target.shape)} in the smaller model and {list(value.shape)} after pruning")
    target.copy_(value)


@torch.no_grad()
def refit_layers(
    source: VideoAutoencoder,
    student: VideoAutoencoder,
    pairs: dict[str, str],
    kept: Kept,
    video: Tensor,
    layers: dict[str, nn.Module],
    seed: int,
) -> None:
    """Fit each dense layer of the student to the outputs of the source's, as soon as it runs."""
    dense = {mine: theirs for mine, theirs in pairs.items()
             if theirs in layers and _can_refit(layers[theirs])}  # fmt: skip
    targets: dict[str, Tensor] = {}

    def positions(name: str, y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        total = y.numel() // y.shape[channel_axis(source.get_submodule(name))]
        return torch.randperm(total, generator=generator)[:POSITIONS].to(y.device)

    def keep_target(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name not in targets:
                y = output[0] if isinstance(output, tuple) else output
                target = _rows(y, positions(name, y), channel_axis(layer))[:, kept.channels[name, "out"].to(y.device)]
                targets[name] = kept.scale(target, (name, "out"), 1)

        return hook

    def fit(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if name not in targets:
                return None
            y = output[0] if isinstance(output, tuple) else output
            chosen = positions(name, y)
            missing = (targets.pop(name) - _rows(y, chosen, channel_axis(layer))).double()
            if missing.abs().max() <= ROUNDING * torch.finfo(y.dtype).eps * y.abs().max():
                return None
            _add_least_squares(layer, _patches(layer, args[0], chosen, y).double(), missing)
            return type(layer).forward(layer, *args)  # of the new weights

        return hook

    with ExitStack() as stack:
        for theirs in dense.values():
            stack.enter_context(hooked(layers[theirs], keep_target(theirs)))
        run(source, video)
    with ExitStack() as stack:
        for mine, theirs in dense.items():
            stack.enter_context(hooked(student.get_submodule(mine), fit(theirs)))
        run(student, video)


def _add_least_squares(layer: nn.Module, x: Tensor, missing: Tensor) -> None:
    """Add to a layer's weights what makes of its inputs x [positions, inputs * kernel] what its outputs lack."""
    if layer.bias is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    square = x.T @ x
    ridge = RIDGE * (square.diagonal().mean().item() or 1.0)
    change = torch.linalg.solve(square + ridge * torch.eye(len(square), device=x.device), x.T @ missing).T
    if layer.bias is not None:
        layer.bias += change[:, -1].to(layer.bias)
        change = change[:, :-1]
    layer.weight += change.reshape(layer.weight.shape).to(layer.weight)


def _can_refit(layer: nn.Module) -> bool:
    """A dense layer whose inputs `_patches` knows: not those of other projects that pad in their own way."""
    dense = isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear) and not is_per_channel(layer)
    return dense and type(layer).__module__.split(".")[0] in ("torch", "vae3d")


def _rows(y: Tensor, positions: Tensor, axis: int) -> Tensor:
    """[positions, channels] of a layer's output."""
    return y.movedim(axis, -1).flatten(0, -2)[positions]


def _patches(layer: nn.Module, x: Tensor, positions: Tensor, y: Tensor) -> Tensor:
    """[positions, inputs * kernel] that the layer's weights multiply at these positions of its output."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)[positions]
    if hasattr(layer, "conv_input"):
        x = layer.conv_input(x)
    x = F.pad(x, [side for size in reversed(layer.padding) for side in (size, size)])
    for axis, (size, stride) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
        x = x.unfold(2 + axis, size, stride)
    x = x.movedim(1, y.dim() - 1)  # [N, *places, C, *kernel]
    index = torch.unravel_index(positions, (len(y), *y.shape[2:]))
    return x[index].flatten(1)

"""Statistics of layers on the calibration clips."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.models.interface import VideoAutoencoder
from vae3d.pruning.layers import PruningError, channel_axis, hooked, is_per_channel, is_rms

EQUAL = 1e-12


@dataclass
class Statistics:
    """Of a layer on the calibration clips. moment: sum of x x^T over `count` positions of its inputs' channels.
    outputs: as moment, of its outputs, if they are queries or keys. gradient: mean square, per output channel, of the
    gradient of a random projection of the video."""

    moment: Tensor | None = None
    outputs: Tensor | None = None
    count: int = 0
    gradient: Tensor | None = None


def measure(
    source: VideoAutoencoder, video: Tensor, layers: dict[str, nn.Module], attention: set[str]
) -> dict[str, Statistics]:
    """Statistics of every dense layer and RMS norm on the clips, one after the other. attention: layers whose outputs
    are queries or keys."""
    found = {name: Statistics() for name, layer in layers.items() if not is_per_channel(layer) or is_rms(layer)}
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Callable[..., Any]:
        def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            own, axis = found[name], channel_axis(layer)
            x = args[0].detach().transpose(axis, -1).flatten(0, -2).double()
            moment = x.T @ x
            own.moment = moment if own.moment is None else own.moment + moment
            own.count += len(x)
            y = (output[0] if isinstance(output, tuple) else output).clone()  # a hook on a view is lost if it changes
            if name in attention:
                rows = y.detach().transpose(axis, -1).flatten(0, -2).double()
                own.outputs = rows.T @ rows if own.outputs is None else own.outputs + rows.T @ rows

            def add(gradient: Tensor) -> None:
                power = gradient.transpose(axis, -1).flatten(0, -2).double().square().sum(0)
                own.gradient = power if own.gradient is None else own.gradient + power

            y.register_hook(add)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return record

    with ExitStack() as stack, torch.enable_grad():
        for name in found:
            stack.enter_context(hooked(layers[name], hook(name)))
        for clip in video.split(1):
            start, out = _start(source, clip, layers)
            noise = torch.randn(out.shape, generator=generator).to(out)
            torch.autograd.grad((out * noise).sum(), start)
    if idle := [name for name, own in found.items() if own.moment is None]:
        raise PruningError(f"{idle[0]} does not run on clips of {video.shape[2]} frames; prune on longer ones")
    return found


def _start(source: VideoAutoencoder, clip: Tensor, layers: dict[str, nn.Module]) -> tuple[Tensor, Tensor]:
    """What the layers' gradients can be computed to, the clip or, if only a decoder changes, its latents, and the
    reconstruction."""
    decoder = {inner for part in source.trainable_parts()["decoder"] for inner in part.modules()}
    if any(layer not in decoder for layer in layers.values()):
        start = clip.detach().requires_grad_()
        return start, source(start, sample=False).video
    with torch.no_grad():
        z = source.encode(clip).mode()
    start = z.requires_grad_()
    return start, source(clip, latents=start).video


def equal_channels(moment: Tensor) -> Tensor:
    """[C, C], which channels are equal: they have the same power, and the same product, but for rounding."""
    power = moment.diagonal()
    same_power = (power - power[:, None]).abs() <= EQUAL * power
    return same_power & ((moment - power).abs() <= EQUAL * power)

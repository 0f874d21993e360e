"""Which channels belong together.

A residual stream, the halves of a concatenation, the frames of a TGrow: two layers share a channel if the input of one
depends on the output of the other with no layer between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vae3d.models.interface import VideoAutoencoder
from vae3d.pruning.layers import PruningError, channel_axis, hooked, is_per_channel, sizes_of

TRACED_LATENTS = 2  # sides of the latents of the clip that finds the groups

Node = tuple[str, str, int]  # layer, "in" or "out", channel


@dataclass
class Channels:
    """Channels that are kept or removed together: channels of each (layer, "in" or "out")."""

    nodes: dict[tuple[str, str], list[int]]
    slot: tuple[int, ...] = ()  # group of each GroupNorm that it passes; each group keeps as many
    unnormalised: frozenset[str] = frozenset()  # layers that read it without a norm
    queries: dict[str, list[int]] = field(default_factory=dict)  # output channels of layers that are queries


def channel_classes(model: VideoAutoencoder, layers: dict[str, nn.Module]) -> list[list[Channels]]:
    """Channels of `layers` (name: module) that belong together, in classes that may exchange them.

    The model runs once on a small clip. Every layer returns random numbers instead of its output, so that the gradient
    of a layer's input is not zero exactly where it depends on the output of another layer. They are positive, so that
    they pass a ReLU. Attention of one head returns the mean of its values: all of its output depends on all queries and
    keys, but channels of these can be removed in pairs.
    Raises PruningError for a layer that its parent does not call.
    """
    trace = _Trace(layers)
    with ExitStack() as stack, torch.enable_grad(), _TracedAttention(trace.pair):
        for name, layer in layers.items():
            stack.enter_context(hooked(layer, trace.before(name), before=True))
            stack.enter_context(hooked(layer, trace.after(name)))
        model(_trace_clip(model), sample=False)
    if missing := sorted(set(layers) - trace.seen):
        raise PruningError(f"{', '.join(missing[:3])} cannot be traced: its parent does not call it, but reads its "
                           "weights; give the smaller model the same width there")  # fmt: skip
    for name, layer in layers.items():
        if is_per_channel(layer):
            for channel in range(sizes_of(name, layer)[0]):
                trace.join((name, "in", channel), (name, "out", channel))
    return _sort_classes(layers, trace)


class _Trace:
    """Which channels one run of a model joins. outputs: of the layers that ran so far.

    unnormalised: layers that read the output of a dense layer without a norm in between. queries: output channels of
    layers that are queries.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.parent: dict[Node, Node] = {}
        self.outputs: list[tuple[str, Tensor]] = []
        self.seen: set[str] = set()
        self.unnormalised: set[str] = set()
        self.queries: dict[str, set[int]] = defaultdict(set)
        self.generator = torch.Generator().manual_seed(0)

    def find(self, node: Node) -> Node:
        """The node that stands for all that this one is joined with."""
        parent = self.parent
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(self, a: Node, b: Node) -> None:
        self.parent[self.find(a)] = self.find(b)

    def before(self, name: str) -> Callable[..., None]:
        """A hook that joins a layer's input with the outputs that it depends on."""

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in self.seen:
                return
            self.seen.add(name)
            for node in _own_nodes(name, layer):
                self.find(node)
            for channel, nodes in enumerate(self.sources(args[0], channel_axis(layer))):
                for node in nodes:
                    self.join((name, "in", channel), node)
                    if not is_per_channel(self.layers[node[0]]):
                        self.unnormalised.add(name)

        return hook

    def after(self, name: str) -> Callable[..., Any]:
        """A hook that replaces a layer's output by random numbers."""

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            noise = (torch.rand(y.shape, generator=self.generator) + 0.5).to(y).requires_grad_()
            self.outputs.append((name, noise))
            return (noise.clone(), *output[1:]) if isinstance(output, tuple) else noise.clone()

        return hook

    def pair(self, query: Tensor, key: Tensor) -> None:
        """Join the channels of queries and keys that attention multiplies."""
        for asks, answers in zip(self.sources(query, -1), self.sources(key, -1), strict=True):
            for name, _, index in asks:
                self.queries[name].add(index)
            for node in (*asks, *answers):
                self.join(node, asks[0])

    def sources(self, x: Tensor, axis: int) -> list[list[Node]]:
        """Of each channel of x, the output channels of layers that it depends on."""
        count = x.shape[axis]
        if not self.outputs or not x.requires_grad:
            return [[] for _ in range(count)]
        # Most outputs are read by one channel. The bits of its number say which: two gradients for each bit.
        numbers, bits = torch.arange(count), (count - 1).bit_length()
        several, codes = count <= 2 * bits + 1, 0
        for bit in range(0 if several else bits):
            on, off = (torch.cat(self.reached(x, axis, (numbers >> bit) % 2 == value)) for value in (1, 0))
            codes = codes + (on.long() << bit)
            several = several or bool((on & off).any())
        nodes = [(name, "out", index) for name, y in self.outputs
                 for index in range(y.shape[channel_axis(self.layers[name])])]  # fmt: skip
        if several:
            found = [torch.cat(self.reached(x, axis, numbers == channel)) for channel in range(count)]
        else:
            found = [(codes == channel) & (on | off) for channel in range(count)]
        return [[nodes[index] for index in mask.nonzero().flatten().tolist()] for mask in found]

    def reached(self, x: Tensor, axis: int, channels: Tensor) -> list[Tensor]:
        """Which channels of each of `outputs` some of these channels (mask) of x depend on."""
        ones = torch.zeros_like(x).transpose(axis, -1)
        shape = (*ones.shape[:-1], int(channels.sum()))
        ones[..., channels.to(x.device)] = (torch.rand(shape, generator=self.generator) + 0.5).to(x)
        ones = ones.transpose(axis, -1)
        outputs = [y for _, y in self.outputs]
        gradients = torch.autograd.grad(x, outputs, ones, retain_graph=True, allow_unused=True)
        found = []
        for (name, y), gradient in zip(self.outputs, gradients, strict=True):
            own = channel_axis(self.layers[name])
            nonzero = torch.zeros(1, y.shape[own]) if gradient is None else gradient.movedim(own, -1)
            found.append((nonzero != 0).flatten(0, -2).any(0).cpu())
        return found


class _TracedAttention(TorchFunctionMode):
    """Attention of one head as the mean of its values. pair: called with its queries and keys."""

    def __init__(self, pair: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.pair = pair

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            q, k, v = args[:3] if len(args) > 2 else (kwargs[name] for name in ("query", "key", "value"))
            if q.dim() < 4 or q.shape[-3] == 1:
                self.pair(q, k)
                return v.mean(-2, keepdim=True).expand(*v.shape[:-2], q.shape[-2], -1)
        return func(*args, **kwargs)


def _sort_classes(layers: dict[str, nn.Module], trace: _Trace) -> list[list[Channels]]:
    queries = trace.queries
    members: dict[Node, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, side, channel in sorted(trace.parent):
        members[trace.find((name, side, channel))][name, side].append(channel)
    classes: dict[Any, list[Channels]] = defaultdict(list)
    for nodes in members.values():
        slot = []
        for (name, side), channels in sorted(nodes.items()):
            layer = layers[name]
            if isinstance(layer, nn.GroupNorm) and side == "in" and layer.num_groups < layer.num_channels:
                slot.append(channels[0] // (layer.num_channels // layer.num_groups))
        signature = frozenset((key, len(channels)) for key, channels in nodes.items())
        raw = frozenset(name for name, side in nodes if side == "in" and name in trace.unnormalised)
        asked = {name: sorted(queries[name].intersection(channels)) for (name, side), channels in nodes.items()
                 if side == "out" and name in queries}  # fmt: skip
        asked = {name: channels for name, channels in asked.items() if channels}
        key = (signature, frozenset((name, len(channels)) for name, channels in asked.items()))
        classes[key].append(Channels(dict(nodes), tuple(slot), raw, asked))
    found = sorted(classes.values(), key=lambda group: min(group[0].nodes))
    for group in found:
        first = min(group[0].nodes)
        group.sort(key=lambda channels: channels.nodes[first])
    return found


def _own_nodes(name: str, layer: nn.Module) -> Iterator[Node]:
    inner, outer = sizes_of(name, layer)
    yield from ((name, "in", channel) for channel in range(inner))
    yield from ((name, "out", channel) for channel in range(outer))


def _trace_clip(model: VideoAutoencoder) -> Tensor:
    spec, parameter = model.spec, next(model.parameters())
    frames = next(n for n in range(1 + spec.time_stride, 100) if model.frames_valid(n) and model.latent_frames(n) > 1)
    return torch.zeros(1, model.pixel_channels, frames, *[TRACED_LATENTS * spec.space_stride] * 2).to(parameter)

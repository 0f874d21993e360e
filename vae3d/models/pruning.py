"""Structured pruning: fill a smaller autoencoder with the channels and blocks of a larger one that matter most.

    prune(teacher, student, video)

The student is any model built from its configuration; its shapes say how many channels and blocks each layer keeps.
Which channels belong together (a residual stream, the halves of a concatenation, the frames of a TGrow) is found by
tracing: two layers share a channel if the input of one depends on the output of the other with no layer between them.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vae3d.errors import UserError
from vae3d.models.interface import VideoAutoencoder, latent_space
from vae3d.precision import no_tf32

IMPORTANCE = ("weight", "activation", "sensitivity", "redundancy")
TRACED_LATENTS = 2  # sides of the latents of the clip that finds the groups
POSITIONS = 12_000  # of a layer's output, that its weights are refitted on
RIDGE = 1e-4  # of the refit, relative to the mean power of a layer's inputs
NEARLY_ZERO = 1e-9  # added to the diagonal of a correlation matrix, which may be singular
EQUAL = 1e-12
ROUNDING = 1000  # differences of so many eps of a layer's outputs are not fitted
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)

Node = tuple[str, str, int]  # layer, "in" or "out", channel


class PruningError(UserError):
    """A student that a larger model cannot be pruned to."""


@dataclass
class Channels:
    """Channels that are kept or removed together: channels of each (layer, "in" or "out")."""

    nodes: dict[tuple[str, str], list[int]]
    slot: tuple[int, ...] = ()  # group of each GroupNorm that it passes; each group keeps as many
    unnormalised: frozenset[str] = frozenset()  # layers that read it without a norm
    queries: dict[str, list[int]] = field(default_factory=dict)  # output channels of layers that are queries


@dataclass
class Kept:
    """Which channels of the source the student keeps, and what they are multiplied by.

    channels: {(layer, "in" or "out"): kept channels, sorted}. factors: of these, for the weights that write ("out") or
    read ("in") them; missing: 1.
    """

    channels: dict[tuple[str, str], Tensor]
    factors: dict[tuple[str, str], Tensor]

    def scale(self, tensor: Tensor, key: tuple[str, str], axis: int = 0) -> Tensor:
        """A tensor of the kept channels, along `axis`, times their factors."""
        if key not in self.factors:
            return tensor
        shape = [-1 if d == axis else 1 for d in range(tensor.dim())]
        return (tensor.double() * self.factors[key].to(tensor.device).view(shape)).to(tensor.dtype)


@dataclass
class Statistics:
    """Of a layer on the calibration clips. moment: sum of x x^T over `count` positions of its inputs' channels.
    outputs: as moment, of its outputs, if they are queries or keys. gradient: mean square, per output channel, of the
    gradient of a random projection of the video."""

    moment: Tensor | None = None
    outputs: Tensor | None = None
    count: int = 0
    gradient: Tensor | None = None


@no_tf32()
def prune(
    source: VideoAutoencoder,
    student: VideoAutoencoder,
    video: Tensor,
    *,
    importance: str = "activation",
    refit: bool = True,
    seed: int = 0,
) -> list[str]:
    """Fill `student` with channels and blocks of `source`, in place. Returns lines that say what was kept.

    video: clips [B, 3, T, H, W] in [-1, 1] on which importance is measured, on the models' device.
    importance: of channels. weight: norm of the weights that read them. activation: their power times that of these
    weights. sensitivity: also times the effect of what they change on the video. redundancy: of this, what the other
    channels cannot replace. Channels that are zero, or twice there, go first. The weights that read a removed channel
    are added to those of the kept channels that predict it best, so this changes nothing.
    refit: then fit each layer, in the order in which they run, to the source's outputs by least squares.
    seed: of random numbers.
    Raises PruningError if the student is no smaller version of the source, or its layers cannot be traced.
    """
    if importance not in IMPORTANCE:
        raise PruningError(f"importance is {importance!r}; use one of {', '.join(IMPORTANCE)}")
    if (source.spec.channels, source.spec.time_stride, source.spec.space_stride) != (
        student.spec.channels, student.spec.time_stride, student.spec.space_stride
    ) or latent_space(source) != latent_space(student):  # fmt: skip
        raise PruningError("the model to prune and the smaller one must share their latents: channels, strides, scale")
    with ExitStack() as stack:
        for model in (source, student):
            stack.enter_context(_prepared(model))
        pairs, dropped = match_layers(source, student, lambda runs: _rank_blocks(source, video, runs))
        changed = _changed_parts(source, student)
        layers = {
            name: layer
            for name, layer in source.named_modules()
            if _owns(layer) and not any(layer.children()) and _within(name, changed)
        }
        classes = channel_classes(source, layers) if changed else []
        kept, statistics, lines = _kept_channels(source, student, pairs, classes, video, importance, layers)
        _copy(source, student, pairs, kept, statistics)
        if refit and changed:
            _refit(source, student, pairs, kept, video, layers, seed)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (source, student)]
    dropped_lines = [f"dropped {', '.join(dropped)}"] if dropped else []
    return [f"pruned from {parameters[0]:,} to {parameters[1]:,} parameters", *dropped_lines, *lines]


# ---- matching layers and blocks


def match_layers(
    source: nn.Module, student: nn.Module, choose: Callable[[list[tuple[list[str], int]]], list[list[str]]]
) -> tuple[dict[str, str], list[str]]:
    """{layer of the student: layer of the source} for all layers with parameters, and the source's dropped blocks.

    Children with the same names match; a Sequential or ModuleList of the student may have fewer blocks in a row.
    choose: (runs of equal blocks, how many of each to keep) -> names of the blocks kept, in order.
    """
    runs: list[tuple[list[str], int]] = []
    starts: list[list[str]] = []  # the student's blocks of each run
    plain: list[tuple[str, str]] = []
    _align(source, student, "", "", plain, runs, starts)
    pairs = list(plain)
    dropped: list[str] = []
    for (names, _), own, chosen in zip(runs, starts, choose(runs) if runs else [], strict=True):
        pairs += zip(own, chosen, strict=True)
        dropped += [name for name in names if name not in chosen]
    found: dict[str, str] = {}
    for mine, theirs in pairs:
        larger, smaller = ({name for name, layer in model.get_submodule(path).named_modules() if _owns(layer)}
                           for model, path in ((source, theirs), (student, mine)))  # fmt: skip
        if extra := sorted(smaller - larger):
            raise PruningError(f"the larger model has no {_join(theirs, extra[0])}, which the smaller one has")
        if (missing := sorted(larger - smaller)) and not _has_lists(student.get_submodule(mine)):
            raise PruningError(f"the smaller model has no {_join(mine, missing[0])}, which the larger one has")
        found.update({_join(mine, name): _join(theirs, name) for name in sorted(smaller)})
    return found, dropped


def _align(
    source: nn.Module,
    student: nn.Module,
    path: str,
    own_path: str,
    plain: list[tuple[str, str]],
    runs: list[tuple[list[str], int]],
    starts: list[list[str]],
) -> None:
    """Fill the lists of match_layers from the modules at `path` of the source and `own_path` of the student."""
    theirs, own = list(source.named_children()), list(student.named_children())
    if type(source) is not type(student):
        raise PruningError(f"{own_path or 'the model'} is a {type(student).__name__}, but a {type(source).__name__} "
                           "in the larger model")  # fmt: skip
    if not isinstance(source, nn.Sequential | nn.ModuleList) or _types(theirs) == _types(own):
        if [name for name, _ in theirs] != [name for name, _ in own]:
            raise PruningError(f"{own_path or 'the model'} has other layers than in the larger model")
        if not theirs or not _has_lists(source):
            plain.append((own_path, path))
            return
        if source._parameters:
            plain.append((own_path, path))
        for (name, a), (_, b) in zip(theirs, own, strict=True):
            _align(a, b, _join(path, name), _join(own_path, name), plain, runs, starts)
        return
    rows = [[(kind, [name for name, _ in run]) for kind, run in groupby(side, lambda c: _kind(c[1]))]
            for side in (theirs, own)]  # fmt: skip
    position = 0
    for kind, names in rows[0]:
        mine = rows[1][position][1] if position < len(rows[1]) and rows[1][position][0] == kind else []
        position += bool(mine)
        if len(mine) > len(names):
            raise PruningError(f"{own_path} has {len(mine)} {kind[0]} in a row, the larger model {len(names)}")
        if len(mine) == len(names):
            plain += [(_join(own_path, b), _join(path, a)) for a, b in zip(names, mine, strict=True)]
        else:
            runs.append(([_join(path, name) for name in names], len(mine)))
            starts.append([_join(own_path, name) for name in mine])
    if position < len(rows[1]):
        raise PruningError(f"{own_path} has layers that the larger model has not, from {rows[1][position][1][0]} on")


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _has_lists(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Sequential | nn.ModuleList) for inner in module.modules())


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What a block consists of, without sizes."""
    return (type(module).__name__, *((name, _kind(child)) for name, child in module.named_children()))


def _types(children: Sequence[tuple[str, nn.Module]]) -> list[type[nn.Module]]:
    return [type(child) for _, child in children]


def _rank_blocks(source: VideoAutoencoder, video: Tensor, runs: list[tuple[list[str], int]]) -> list[list[str]]:
    """Of each run, the blocks to keep: those are skipped one by one that change the video least."""
    expected = _run(source, video)
    kept = [list(names) for names, _ in runs]
    skipped: list[str] = []

    def error(names: Sequence[str]) -> float:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(_hook(source.get_submodule(name), _skip(name)))
            return (_run(source, video) - expected).square().mean().item()

    for index, (_, count) in enumerate(runs):
        while len(kept[index]) > count:
            errors = {name: error([*skipped, name]) for name in kept[index]}
            worst = min(errors, key=errors.get)
            kept[index].remove(worst)
            skipped.append(worst)
    return kept


def _skip(name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        if y.shape != args[0].shape:
            raise PruningError(f"{name} changes the shape of its input, so it cannot be dropped")
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0].clone()

    return hook


# ---- which channels belong together


def channel_classes(model: VideoAutoencoder, layers: dict[str, nn.Module]) -> list[list[Channels]]:
    """Channels of `layers` (name: module) that belong together, in classes that may exchange them.

    The model runs once on a small clip. Every layer returns random numbers instead of its output, so that the gradient
    of a layer's input is not zero exactly where it depends on the output of another layer. They are positive, so that
    they pass a ReLU. Attention of one head returns the mean of its values: all of its output depends on all queries and
    keys, but channels of these can be removed in pairs.
    """
    parent: dict[Node, Node] = {}

    def find(node: Node) -> Node:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(a: Node, b: Node) -> None:
        parent[find(a)] = find(b)

    outputs: list[tuple[str, Tensor]] = []
    seen: set[str] = set()
    unnormalised: set[str] = set()  # layers that read the output of a dense layer without a norm in between
    queries: dict[str, set[int]] = defaultdict(set)
    generator = torch.Generator().manual_seed(0)

    def enter(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen:
                return
            seen.add(name)
            for node in _own_nodes(name, layer):
                find(node)
            for channel, nodes in enumerate(sources(args[0], _axis(layer))):
                for node in nodes:
                    join((name, "in", channel), node)
                    if not _is_per_channel(layers[node[0]]):
                        unnormalised.add(name)

        return hook

    def reached(x: Tensor, axis: int, channels: Tensor) -> list[Tensor]:
        """Which channels of each of `outputs` some of these channels (mask) of x depend on."""
        ones = torch.zeros_like(x).transpose(axis, -1)
        shape = (*ones.shape[:-1], int(channels.sum()))
        ones[..., channels.to(x.device)] = (torch.rand(shape, generator=generator) + 0.5).to(x)
        ones = ones.transpose(axis, -1)
        gradients = torch.autograd.grad(x, [y for _, y in outputs], ones, retain_graph=True, allow_unused=True)
        found = []
        for (other, y), gradient in zip(outputs, gradients, strict=True):
            size = y.shape[_axis(layers[other])]
            nonzero = torch.zeros(1, size) if gradient is None else gradient.movedim(_axis(layers[other]), -1)
            found.append((nonzero != 0).flatten(0, -2).any(0).cpu())
        return found

    def sources(x: Tensor, axis: int) -> list[list[Node]]:
        """Of each channel of x, the output channels of layers that it depends on."""
        count = x.shape[axis]
        if not outputs or not x.requires_grad:
            return [[] for _ in range(count)]
        # Most outputs are read by one channel. The bits of its number say which: two gradients for each bit.
        numbers, bits = torch.arange(count), (count - 1).bit_length()
        several, codes = count <= 2 * bits + 1, 0
        for bit in range(0 if several else bits):
            on, off = (torch.cat(reached(x, axis, (numbers >> bit) % 2 == value)) for value in (1, 0))
            codes = codes + (on.long() << bit)
            several = several or bool((on & off).any())
        nodes = [(name, "out", index) for name, y in outputs for index in range(y.shape[_axis(layers[name])])]
        if several:
            found = [torch.cat(reached(x, axis, numbers == channel)) for channel in range(count)]
        else:
            found = [(codes == channel) & (on | off) for channel in range(count)]
        return [[nodes[index] for index in mask.nonzero().flatten().tolist()] for mask in found]

    def pair(query: Tensor, key: Tensor) -> None:
        for asks, answers in zip(sources(query, -1), sources(key, -1), strict=True):
            for name, _, index in asks:
                queries[name].add(index)
            for node in (*asks, *answers):
                join(node, asks[0])

    def leave(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            noise = (torch.rand(y.shape, generator=generator) + 0.5).to(y).requires_grad_()
            outputs.append((name, noise))
            return (noise.clone(), *output[1:]) if isinstance(output, tuple) else noise.clone()

        return hook

    with ExitStack() as stack, torch.enable_grad(), _TracedAttention(pair):
        for name, layer in layers.items():
            stack.enter_context(_hook(layer, enter(name), before=True))
            stack.enter_context(_hook(layer, leave(name)))
        model(_trace_clip(model), sample=False)
    if missing := sorted(set(layers) - seen):
        raise PruningError(f"{', '.join(missing[:3])} cannot be traced: its parent does not call it, but reads its "
                           "weights; give the smaller model the same width there")  # fmt: skip
    for name, layer in layers.items():
        if _is_per_channel(layer):
            for channel in range(_sizes(name, layer)[0]):
                join((name, "in", channel), (name, "out", channel))
    return _sort_classes(layers, parent, find, unnormalised, queries)


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


def _sort_classes(
    layers: dict[str, nn.Module],
    parent: dict[Node, Node],
    find: Callable[[Node], Node],
    unnormalised: set[str],
    queries: dict[str, set[int]],
) -> list[list[Channels]]:
    members: dict[Node, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, side, channel in sorted(parent):
        members[find((name, side, channel))][name, side].append(channel)
    classes: dict[Any, list[Channels]] = defaultdict(list)
    for nodes in members.values():
        slot = []
        for (name, side), channels in sorted(nodes.items()):
            layer = layers[name]
            if isinstance(layer, nn.GroupNorm) and side == "in" and layer.num_groups < layer.num_channels:
                slot.append(channels[0] // (layer.num_channels // layer.num_groups))
        signature = frozenset((key, len(channels)) for key, channels in nodes.items())
        raw = frozenset(name for name, side in nodes if side == "in" and name in unnormalised)
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
    inner, outer = _sizes(name, layer)
    yield from ((name, "in", channel) for channel in range(inner))
    yield from ((name, "out", channel) for channel in range(outer))


def _sizes(name: str, layer: nn.Module) -> tuple[int, int]:
    """Channels that a layer reads and writes. Raises PruningError for a layer of another kind."""
    if isinstance(layer, CONVS) and (layer.groups == 1 or _is_per_channel(layer)):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if _is_per_channel(layer):
        size = max(p.numel() for p in layer._parameters.values() if p is not None)
        return size, size
    raise PruningError(f"{name} is a {type(layer).__name__}, whose channels cannot be pruned; give the smaller model "
                       "the same widths there")  # fmt: skip


def _is_per_channel(layer: nn.Module) -> bool:
    """Whether each output channel depends on the input channel of the same index alone, but for statistics."""
    if isinstance(layer, CONVS):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    if isinstance(layer, NORMS):
        return True
    own = [p for p in layer._parameters.values() if p is not None]
    return bool(own) and all(max(p.shape, default=1) == p.numel() for p in own)


def _axis(layer: nn.Module) -> int:
    """The axis of the channels in a layer's input and output."""
    return -1 if isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm) else 1


def _is_rms(layer: nn.Module) -> bool:
    """Whether it divides by the root mean square of its channels, which the number of channels changes."""
    return _is_per_channel(layer) and "rms" in type(layer).__name__.lower()


def _trace_clip(model: VideoAutoencoder) -> Tensor:
    spec, parameter = model.spec, next(model.parameters())
    frames = next(n for n in range(1 + spec.time_stride, 100) if model.frames_valid(n) and model.latent_frames(n) > 1)
    return torch.zeros(1, model.pixel_channels, frames, *[TRACED_LATENTS * spec.space_stride] * 2).to(parameter)


# ---- which channels are kept


def _kept_channels(
    source: VideoAutoencoder,
    student: VideoAutoencoder,
    pairs: dict[str, str],
    classes: list[list[Channels]],
    video: Tensor,
    importance: str,
    layers: dict[str, nn.Module],
) -> tuple[Kept, dict[str, Statistics], list[str]]:
    """The kept channels, statistics of the layers, and lines about the channels."""
    wanted: dict[tuple[str, str], int] = {}
    for mine, theirs in pairs.items():
        if theirs in layers:
            for side, size in zip(("in", "out"), _sizes(mine, student.get_submodule(mine)), strict=True):
                wanted[theirs, side] = size
    sizes = {(name, side): size for name, layer in layers.items()
             for side, size in zip(("in", "out"), _sizes(name, layer), strict=True)}  # fmt: skip
    norms = {theirs: student.get_submodule(mine) for mine, theirs in pairs.items()}
    classes = [_merge_groups(group, layers, norms) for group in classes]
    keep = _numbers_to_keep(classes, wanted, sizes)
    attention = {name for group in classes if group[0].queries for name, _ in group[0].nodes}
    statistics = (
        _measure(source, video, layers, attention)
        if any(n < len(g) for n, g in zip(keep, classes, strict=True))
        else {}
    )
    kept: dict[tuple[str, str], list[int]] = defaultdict(list)
    factors: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    removed: dict[str, list[int]] = defaultdict(list)
    lines = []
    for group, count in zip(classes, keep, strict=True):
        chosen, equal = list(range(len(group))), {}
        if count < len(group):
            chosen, equal = _choose(group, count, layers, statistics, importance)
            first = next((key for key in sorted(group[0].nodes) if key[1] == "out"), min(group[0].nodes))
            share = len(group[0].nodes[first])
            what = "channels of queries and keys" if group[0].queries else "channels"
            lines.append(f"{first[0]}: {share * count} of {share * len(group)} {what} kept")
        for number in chosen:
            channels = group[number]
            for key, indices in channels.nodes.items():
                kept[key] += indices
            if count < len(group):
                together = 1 + list(equal.values()).count(number)
                for key, values in _channel_factors(channels, together, layers).items():
                    factors[key] |= values
                for name, indices in channels.queries.items():  # attention divides by the root of its width
                    factors[name, "out"] |= dict.fromkeys(indices, together * (count / len(group)) ** 0.5)
        for number in set(range(len(group))) - set(chosen) - set(equal):
            for (name, side), indices in group[number].nodes.items():
                if side == "in":
                    removed[name] += indices
    for key, size in wanted.items():
        if len(kept[key]) != size:
            raise PruningError(f"{key[0]}: {len(kept[key])} of its {sizes[key]} channels ({key[1]}) are kept with "
                               f"the layers around it, but the smaller model has {size}")  # fmt: skip
    for name, size in sizes.items():
        if name[1] == "out" and _is_rms(layers[name[0]]) and len(kept[name]) < size:
            power = statistics[name[0]].moment.diagonal().cpu()
            lost = power[removed[name[0]]].sum() / power.sum() if power.sum() > 0 else 0.0
            scale = float(size / len(kept[name]) * (1 - lost)) ** 0.5  # root mean squares of fewer channels
            factors[name] = {index: scale * factors[name].get(index, 1.0) for index in kept[name]}
    channels = {key: sorted(indices) for key, indices in kept.items()}
    factors_of = {key: torch.tensor([values.get(index, 1.0) for index in channels[key]], dtype=torch.float64)
                  for key, values in factors.items()}  # fmt: skip
    return Kept({key: torch.tensor(indices) for key, indices in channels.items()}, factors_of), statistics, lines


def _merge_groups(group: list[Channels], layers: dict[str, nn.Module], norms: dict[str, nn.Module]) -> list[Channels]:
    """A class with an entry for each group of its GroupNorms, if the student has fewer groups of the same size.

    Raises PruningError if it has neither as many groups nor groups of that size.
    """
    fewer = [name for name, side in group[0].nodes if side == "in" and isinstance(norms.get(name), nn.GroupNorm)
             and norms[name].num_groups != layers[name].num_groups]  # fmt: skip
    if not fewer:
        return group
    for name in fewer:
        size, own = (norm.num_channels / norm.num_groups for norm in (layers[name], norms[name]))
        if size != own:
            raise PruningError(f"{name} has {norms[name].num_groups} groups of {own:g} channels in the smaller model; "
                               f"give {layers[name].num_groups} groups, or groups of {size:g}")  # fmt: skip
    if all(layers[name].num_groups == layers[name].num_channels for name in fewer):
        return group  # every channel is a group
    merged: dict[tuple[int, ...], Channels] = {}
    for channels in group:
        whole = merged.setdefault(channels.slot, Channels({}, (), channels.unnormalised, {}))
        for found, own in ((whole.nodes, channels.nodes), (whole.queries, channels.queries)):
            for key, indices in own.items():
                found.setdefault(key, []).extend(indices)
    return list(merged.values())


def _channel_factors(
    channels: Channels, count: int, layers: dict[str, nn.Module]
) -> dict[tuple[str, str], dict[int, float]]:
    """Factors for a channel that stands for `count` equal ones before an RMS norm: as large as they were together.

    What writes it is multiplied by the root of `count`, and the norms, and what reads it without a norm, are divided.
    """
    if count == 1 or not any(_is_rms(layers[name]) for name, _ in channels.nodes):
        return {}
    found = {}
    for (name, side), indices in channels.nodes.items():
        if _is_rms(layers[name]):
            factor = count**-0.5 if side == "out" else 1.0
        elif _is_per_channel(layers[name]):
            factor = 1.0
        elif side == "out":
            factor = count**0.5
        else:
            factor = count**-0.5 if name in channels.unnormalised else 1.0
        found[name, side] = dict.fromkeys(indices, factor)
    return found


def _numbers_to_keep(
    classes: list[list[Channels]], wanted: dict[tuple[str, str], int], sizes: dict[tuple[str, str], int]
) -> list[int]:
    """How many of each class the student keeps."""
    keep = [_number_to_keep(group, wanted, sizes) for group in classes]
    members: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(
        list
    )  # (class, channels of each of its entries)
    for index, group in enumerate(classes):
        for key, indices in group[0].nodes.items():
            members[key].append((index, len(indices)))
    progress = True
    while progress:  # layers that read or write several classes, of which all but one are known
        progress = False
        for key, parts in members.items():
            unknown = [part for part in parts if keep[part[0]] is None]
            if key in wanted and len(unknown) == 1:
                (index, share), progress = unknown[0], True
                left = wanted[key] - sum(keep[other] * n for other, n in parts if other != index)
                if left < 0 or left % share:
                    raise PruningError(f"{key[0]}: the smaller model has {wanted[key]} channels, which cannot be "
                                       "divided as in the larger one")  # fmt: skip
                keep[index] = left // share
    keep = [len(group) if count is None else count for group, count in zip(classes, keep, strict=True)]
    for group, count in zip(classes, keep, strict=True):
        first = min(group[0].nodes)[0]
        if count > len(group):
            raise PruningError(f"{first}: the smaller model has more channels than the larger one")
        if count % max(1, len({channels.slot for channels in group})):
            raise PruningError(f"{first}: {count} channels cannot be split over the groups of its norm")
    return keep


def _number_to_keep(
    group: list[Channels], wanted: dict[tuple[str, str], int], sizes: dict[tuple[str, str], int]
) -> int | None:
    """How many of a class the student keeps, from the layers whose channels are all of this class; None: there are
    none."""
    counts = {}
    for key, indices in group[0].nodes.items():
        if key in wanted and sizes[key] == len(indices) * len(group):
            if wanted[key] % len(indices) and len(group) == 1:
                raise PruningError(f"{key[0]}: its channels depend on each other (by a norm without weights, or "
                                   "attention of several heads), so they stay; give the smaller model "
                                   f"{sizes[key]} channels, not {wanted[key]}")  # fmt: skip
            if wanted[key] % len(indices):
                raise PruningError(f"{key[0]}: the smaller model has {wanted[key]} channels; give a multiple of "
                                   f"{len(indices)}")  # fmt: skip
            counts[key] = wanted[key] // len(indices)
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} ({side}) {count}" for (name, side), count in sorted(counts.items()))
        raise PruningError(f"these layers share their channels, so the smaller model must keep equally many: {text}")
    return next(iter(counts.values()), None)


def _measure(
    source: VideoAutoencoder, video: Tensor, layers: dict[str, nn.Module], attention: set[str]
) -> dict[str, Statistics]:
    """Statistics of every dense layer and RMS norm on the clips, one after the other. attention: layers whose outputs
    are queries or keys."""
    found = {name: Statistics() for name, layer in layers.items() if not _is_per_channel(layer) or _is_rms(layer)}
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Callable[..., Any]:
        def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            own, axis = found[name], _axis(layer)
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
            stack.enter_context(_hook(layers[name], hook(name)))
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


def _choose(
    group: list[Channels], count: int, layers: dict[str, nn.Module], statistics: dict[str, Statistics], importance: str
) -> tuple[list[int], dict[int, int]]:
    """The `count` channels of a class that matter most, in order, and {removed channel: kept one that equals it}."""
    moments = torch.zeros(len(group), len(group), dtype=torch.float64)  # of all layers that read the channels
    power = torch.zeros(len(group), dtype=torch.float64)
    for name, side in group[0].nodes:
        layer = layers[name]
        if side == "in" and _is_rms(layer):  # its other channels depend on their power, whatever reads them
            own = statistics[name]
            index = torch.tensor([channels.nodes[name, side] for channels in group])
            for part in index.T:
                moments += own.moment.cpu()[part][:, part] / own.count
        if side == "out" or _is_per_channel(layer):
            continue
        weight = layer.weight.detach().cpu().double()
        weight = weight.view(*weight.shape[:2], -1)  # [out, in, kernel]
        own = statistics[name]
        gradient = torch.ones(len(weight), dtype=torch.float64)
        if importance in ("sensitivity", "redundancy"):
            gradient = own.gradient.cpu() / own.count
        size = (weight.square().sum(2) * gradient[:, None]).sum(0).sqrt()  # of each input channel
        moment = own.moment.cpu() / own.count
        index = torch.tensor([channels.nodes[name, side] for channels in group])
        for part in index.T:  # a concatenation reads a channel several times
            moments += size[part].square().mean() * moment[part][:, part]
            power += size[part].square() * (1.0 if importance == "weight" else moment.diagonal()[part])
    if group[0].queries:  # nothing reads them but attention
        pairs = [_output_moments(group, statistics, asks) for asks in (True, False)]
        moments += pairs[0] + pairs[1]
        power += pairs[0].diagonal() * pairs[1].diagonal()
    kept = list(range(len(group)))
    share = count // len({channels.slot for channels in group})
    slots = defaultdict(int)
    for channels in group:
        slots[channels.slot] += 1
    weights = _weight_power(group, layers)
    deviation = moments.diagonal().sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    inverse = torch.linalg.inv(moments / deviation / deviation[:, None] + NEARLY_ZERO * torch.eye(len(group)))
    equal, free = _equal_channels(moments).fill_diagonal_(False), moments.diagonal() == 0
    while len(kept) > count:
        loss = power[kept]
        if importance == "redundancy":
            loss = loss / inverse.diagonal()  # the share that the others do not predict
        loss = torch.where(free[kept] | equal[kept][:, kept].any(1), 0.0, loss)
        order = sorted(range(len(kept)), key=lambda i: (loss[i].item(), weights[kept[i]]))
        worst = next(i for i in order if slots[group[kept[i]].slot] > share)
        slots[group[kept[worst]].slot] -= 1
        rest = [i for i in range(len(kept)) if i != worst]
        column = inverse[rest, worst]
        inverse = inverse[rest][:, rest] - column[:, None] * column / inverse[worst, worst]
        removed = kept.pop(worst)
        if others := equal[removed][kept].nonzero().flatten().tolist():
            power[kept[others[0]]] += power[removed]  # whose readers read the other from now on
    duplicates = {index: equal[index][kept].nonzero().flatten().tolist() for index in range(len(group))}
    return kept, {
        index: kept[same[0]] for index, same in duplicates.items() if same and index not in kept and not free[index]
    }


def _output_moments(group: list[Channels], statistics: dict[str, Statistics], query: bool) -> Tensor:
    """E[y y^T] of the queries, or of the keys, of a class."""
    name, places = next(
        (name, places)
        for name, _ in group[0].nodes
        if (places := [[i for i in channels.nodes[name, "out"] if (i in channels.queries.get(name, ())) == query]
                       for channels in group])[0]
    )  # fmt: skip
    index = torch.tensor(places)[:, 0]
    return statistics[name].outputs.cpu()[index][:, index] / statistics[name].count


def _equal_channels(moment: Tensor) -> Tensor:
    """[C, C], which channels are equal: they have the same power, and the same product, but for rounding."""
    power = moment.diagonal()
    same_power = (power - power[:, None]).abs() <= EQUAL * power
    return same_power & ((moment - power).abs() <= EQUAL * power)


def _weight_power(group: list[Channels], layers: dict[str, nn.Module]) -> list[float]:
    """Sum of squares of the weights that write the channels: of two that are zero on the clips, the one whose weights
    are zero is removed first."""
    power = [0.0] * len(group)
    for index, channels in enumerate(group):
        for (name, side), places in channels.nodes.items():
            if side == "out":
                power[index] += sum(
                    p[places].square().sum().item() for p in layers[name]._parameters.values() if p is not None
                )
    return power


# ---- writing the student's weights


@torch.no_grad()
def _copy(
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
            if _is_per_channel(large):
                axis = max(range(tensor.dim()), key=lambda d: tensor.shape[d]) if not isinstance(large, CONVS) else 0
                value = tensor.index_select(axis, outside.to(tensor.device))
                if _is_rms(large) and name != "bias":
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
    equal = _equal_channels(moment)
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
def _refit(
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
        total = y.numel() // y.shape[_axis(source.get_submodule(name))]
        return torch.randperm(total, generator=generator)[:POSITIONS].to(y.device)

    def keep_target(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name not in targets:
                y = output[0] if isinstance(output, tuple) else output
                target = _rows(y, positions(name, y), _axis(layer))[:, kept.channels[name, "out"].to(y.device)]
                targets[name] = kept.scale(target, (name, "out"), 1)

        return hook

    def fit(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if name not in targets:
                return None
            y = output[0] if isinstance(output, tuple) else output
            chosen = positions(name, y)
            missing = (targets.pop(name) - _rows(y, chosen, _axis(layer))).double()
            if missing.abs().max() <= ROUNDING * torch.finfo(y.dtype).eps * y.abs().max():
                return None
            x = _patches(layer, args[0], chosen, y).double()
            if layer.bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            square = x.T @ x
            ridge = RIDGE * (square.diagonal().mean().item() or 1.0)
            change = torch.linalg.solve(square + ridge * torch.eye(len(square), device=x.device), x.T @ missing).T
            if layer.bias is not None:
                layer.bias += change[:, -1].to(layer.bias)
                change = change[:, :-1]
            layer.weight += change.reshape(layer.weight.shape).to(layer.weight)
            return type(layer).forward(layer, *args)  # of the new weights

        return hook

    with ExitStack() as stack:
        for theirs in dense.values():
            stack.enter_context(_hook(layers[theirs], keep_target(theirs)))
        _run(source, video)
    with ExitStack() as stack:
        for mine, theirs in dense.items():
            stack.enter_context(_hook(student.get_submodule(mine), fit(theirs)))
        _run(student, video)


def _can_refit(layer: nn.Module) -> bool:
    """A dense layer whose inputs `_patches` knows: not those of other projects that pad in their own way."""
    dense = isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear) and not _is_per_channel(layer)
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


# ---- running the models


def _run(model: VideoAutoencoder, video: Tensor) -> Tensor:
    """The reconstruction, without gradients. Gradient mode stays on: without it TAEHV runs frame by frame on a CPU."""
    with torch.enable_grad():
        return model(video.detach(), sample=False).video.detach()


@contextmanager
def _prepared(model: VideoAutoencoder) -> Iterator[None]:
    """Eval mode, no gradients of parameters, whole clips at once and no checkpointing; restored afterwards."""
    mode, grads = model.training, [p.requires_grad for p in model.parameters()]
    changed = []
    for module in model.modules():
        for name, value in (
            ("frame_batch", None),
            ("gradient_checkpointing", False),
            ("chunk_latents", None),
            ("fitted_latents", None),
        ):
            if name in vars(module):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        model.train(mode)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.requires_grad_(grad)


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _changed_parts(source: VideoAutoencoder, student: VideoAutoencoder) -> set[str]:
    """Modules of the model's trainable parts (encoder, decoder, ...) with layers of other shapes or dropped blocks."""
    parts = {id(module) for modules in student.trainable_parts().values() for module in modules}
    changed = set()
    for name, module in student.named_modules():
        if id(module) in parts:
            shapes = [[tuple(p.shape) for p in part.parameters()] for part in (source.get_submodule(name), module)]
            if shapes[0] != shapes[1]:
                changed.add(name)
    return changed


def _owns(layer: nn.Module) -> bool:
    return any(p is not None for p in layer._parameters.values())


def _within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)

"""Which channels are kept: how many of each class, and which of them matter most."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae3d.models.interface import VideoAutoencoder
from vae3d.pruning.layers import PruningError, is_per_channel, is_rms, sizes_of
from vae3d.pruning.measure import Statistics, equal_channels, measure
from vae3d.pruning.trace import Channels

IMPORTANCE = ("weight", "activation", "sensitivity", "redundancy")
NEARLY_ZERO = 1e-9  # added to the diagonal of a correlation matrix, which may be singular


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
class Choice:
    """Of a class: the entries that are kept, in order, and {removed entry: kept one that equals it}."""

    group: list[Channels]
    kept: list[int]
    equal: dict[int, int]

    @property
    def share(self) -> float:
        return len(self.kept) / len(self.group)


def choose_channels(
    source: VideoAutoencoder,
    student: VideoAutoencoder,
    pairs: dict[str, str],
    classes: list[list[Channels]],
    video: Tensor,
    importance: str,
    layers: dict[str, nn.Module],
) -> tuple[Kept, dict[str, Statistics], list[str]]:
    """The kept channels, statistics of the layers, and lines about the channels."""
    norms = {theirs: student.get_submodule(mine) for mine, theirs in pairs.items()}
    wanted = layer_sizes({theirs: layer for theirs, layer in norms.items() if theirs in layers})
    sizes = layer_sizes(layers)
    classes = [merge_groups(group, layers, norms) for group in classes]
    keep = numbers_to_keep(classes, wanted, sizes)
    statistics: dict[str, Statistics] = {}
    if any(count < len(group) for count, group in zip(keep, classes, strict=True)):
        attention = {name for group in classes if group[0].queries for name, _ in group[0].nodes}
        statistics = measure(source, video, layers, attention)
    choices, lines = [], []
    for group, count in zip(classes, keep, strict=True):
        chosen, equal = list(range(len(group))), {}
        if count < len(group):
            chosen, equal = _choose(group, count, layers, statistics, importance)
            lines.append(_kept_line(group, count))
        choices.append(Choice(group, chosen, equal))
    channels = _channels_of(choices)
    for key, size in wanted.items():
        if (found := len(channels.get(key, ()))) != size:
            raise PruningError(f"{key[0]}: {found} of its {sizes[key]} channels ({key[1]}) are kept with "
                               f"the layers around it, but the smaller model has {size}")  # fmt: skip
    return Kept(channels, _factors_of(choices, channels, sizes, layers, statistics)), statistics, lines


def layer_sizes(layers: dict[str, nn.Module]) -> dict[tuple[str, str], int]:
    """{(layer, "in" or "out"): channels}."""
    return {(name, side): size for name, layer in layers.items()
            for side, size in zip(("in", "out"), sizes_of(name, layer), strict=True)}  # fmt: skip


def _kept_line(group: list[Channels], count: int) -> str:
    name, side = next((key for key in sorted(group[0].nodes) if key[1] == "out"), min(group[0].nodes))
    each = len(group[0].nodes[name, side])
    what = "channels of queries and keys" if group[0].queries else "channels"
    return f"{name}: {each * count} of {each * len(group)} {what} kept"


def _channels_of(choices: list[Choice]) -> dict[tuple[str, str], Tensor]:
    """Kept.channels."""
    kept: dict[tuple[str, str], list[int]] = defaultdict(list)
    for choice in choices:
        for number in choice.kept:
            for key, indices in choice.group[number].nodes.items():
                kept[key] += indices
    return {key: torch.tensor(sorted(indices)) for key, indices in kept.items()}


def _factors_of(
    choices: list[Choice],
    channels: dict[tuple[str, str], Tensor],
    sizes: dict[tuple[str, str], int],
    layers: dict[str, nn.Module],
    statistics: dict[str, Statistics],
) -> dict[tuple[str, str], Tensor]:
    """Kept.factors: of channels that stand for several, of queries and keys, and of the weights of RMS norms."""
    factors: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for choice in choices:
        if choice.share == 1:
            continue
        for number in choice.kept:
            own = choice.group[number]
            together = 1 + list(choice.equal.values()).count(number)
            for key, values in _channel_factors(own, together, layers).items():
                factors[key] |= values
            for name, indices in own.queries.items():  # attention divides by the root of its width
                factors[name, "out"] |= dict.fromkeys(indices, together * choice.share**0.5)
    removed = _removed_inputs(choices)
    for (name, side), size in sizes.items():
        key = name, side
        if side == "out" and is_rms(layers[name]) and len(channels[key]) < size:
            power = statistics[name].moment.diagonal().cpu()
            lost = power[removed[name]].sum() / power.sum() if power.sum() > 0 else 0.0
            scale = float(size / len(channels[key]) * (1 - lost)) ** 0.5  # root mean squares of fewer channels
            factors[key] = {index: scale * factors[key].get(index, 1.0) for index in channels[key].tolist()}
    return {key: torch.tensor([values.get(index, 1.0) for index in channels[key].tolist()], dtype=torch.float64)
            for key, values in factors.items()}  # fmt: skip


def _removed_inputs(choices: list[Choice]) -> dict[str, list[int]]:
    """Of each layer, the input channels that nothing kept equals."""
    removed: dict[str, list[int]] = defaultdict(list)
    for choice in choices:
        for number in set(range(len(choice.group))) - set(choice.kept) - set(choice.equal):
            for (name, side), indices in choice.group[number].nodes.items():
                if side == "in":
                    removed[name] += indices
    return removed


def merge_groups(group: list[Channels], layers: dict[str, nn.Module], norms: dict[str, nn.Module]) -> list[Channels]:
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
    if count == 1 or not any(is_rms(layers[name]) for name, _ in channels.nodes):
        return {}
    found = {}
    for (name, side), indices in channels.nodes.items():
        if is_rms(layers[name]):
            factor = count**-0.5 if side == "out" else 1.0
        elif is_per_channel(layers[name]):
            factor = 1.0
        elif side == "out":
            factor = count**0.5
        else:
            factor = count**-0.5 if name in channels.unnormalised else 1.0
        found[name, side] = dict.fromkeys(indices, factor)
    return found


def numbers_to_keep(
    classes: list[list[Channels]], wanted: dict[tuple[str, str], int], sizes: dict[tuple[str, str], int]
) -> list[int]:
    """How many of each class the student keeps."""
    keep = [_number_to_keep(group, wanted, sizes) for group in classes]
    # (class, channels of each of its entries)
    members: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
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


def _choose(
    group: list[Channels], count: int, layers: dict[str, nn.Module], statistics: dict[str, Statistics], importance: str
) -> tuple[list[int], dict[int, int]]:
    """The `count` channels of a class that matter most, in order, and {removed channel: kept one that equals it}."""
    moments, power = _importance(group, layers, statistics, importance)
    equal, free = equal_channels(moments).fill_diagonal_(False), moments.diagonal() == 0
    kept = list(range(len(group)))
    share = count // len({channels.slot for channels in group})
    slots = Counter(channels.slot for channels in group)
    weights = _weight_power(group, layers)
    inverse = _inverse_correlation(moments)
    while len(kept) > count:
        loss = power[kept]
        if importance == "redundancy":
            loss = loss / inverse.diagonal()  # the share that the others do not predict
        loss = torch.where(free[kept] | equal[kept][:, kept].any(1), 0.0, loss)
        order = sorted(range(len(kept)), key=lambda i: (loss[i].item(), weights[kept[i]]))
        worst = next(i for i in order if slots[group[kept[i]].slot] > share)
        slots[group[kept[worst]].slot] -= 1
        inverse = _without(inverse, worst)
        removed = kept.pop(worst)
        if others := equal[removed][kept].nonzero().flatten().tolist():
            power[kept[others[0]]] += power[removed]  # whose readers read the other from now on
    duplicates = {index: equal[index][kept].nonzero().flatten().tolist() for index in range(len(group))}
    return kept, {
        index: kept[same[0]] for index, same in duplicates.items() if same and index not in kept and not free[index]
    }


def _importance(
    group: list[Channels], layers: dict[str, nn.Module], statistics: dict[str, Statistics], importance: str
) -> tuple[Tensor, Tensor]:
    """E[x x^T] of a class's channels, summed over all that read them, and what removing each changes there."""
    moments = torch.zeros(len(group), len(group), dtype=torch.float64)
    power = torch.zeros(len(group), dtype=torch.float64)
    for name, side in group[0].nodes:
        layer = layers[name]
        rms = is_rms(layer)  # its other channels depend on their power, whatever reads them
        if side == "out" or (is_per_channel(layer) and not rms):
            continue
        own = statistics[name]
        moment = own.moment.cpu() / own.count
        index = torch.tensor([channels.nodes[name, side] for channels in group])
        size = None if rms else _weight_size(layer, own, importance)
        for part in index.T:  # a concatenation reads a channel several times
            if size is None:
                moments += moment[part][:, part]
                continue
            moments += size[part].square().mean() * moment[part][:, part]
            power += size[part].square() * (1.0 if importance == "weight" else moment.diagonal()[part])
    if group[0].queries:  # nothing reads them but attention
        pairs = [_output_moments(group, statistics, asks) for asks in (True, False)]
        moments += pairs[0] + pairs[1]
        power += pairs[0].diagonal() * pairs[1].diagonal()
    return moments, power


def _weight_size(layer: nn.Module, own: Statistics, importance: str) -> Tensor:
    """Norm of the weights that read each input channel, by what their outputs change if importance asks for it."""
    weight = layer.weight.detach().cpu().double()
    weight = weight.view(*weight.shape[:2], -1)  # [out, in, kernel]
    gradient = torch.ones(len(weight), dtype=torch.float64)
    if importance in ("sensitivity", "redundancy"):
        gradient = own.gradient.cpu() / own.count
    return (weight.square().sum(2) * gradient[:, None]).sum(0).sqrt()


def _inverse_correlation(moments: Tensor) -> Tensor:
    deviation = moments.diagonal().sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return torch.linalg.inv(moments / deviation / deviation[:, None] + NEARLY_ZERO * torch.eye(len(moments)))


def _without(inverse: Tensor, index: int) -> Tensor:
    """Inverse of the matrix without this row and column, from the inverse of the matrix."""
    rest = [i for i in range(len(inverse)) if i != index]
    column = inverse[rest, index]
    return inverse[rest][:, rest] - column[:, None] * column / inverse[index, index]


def _output_moments(group: list[Channels], statistics: dict[str, Statistics], query: bool) -> Tensor:
    """E[y y^T] of the queries, or of the keys, of a class."""

    def own(channels: Channels, name: str) -> list[int]:
        return [i for i in channels.nodes[name, "out"] if (i in channels.queries.get(name, ())) == query]

    name = next(name for name, _ in group[0].nodes if own(group[0], name))
    index = torch.tensor([own(channels, name)[0] for channels in group])
    return statistics[name].outputs.cpu()[index][:, index] / statistics[name].count


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

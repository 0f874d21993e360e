"""Which channels are kept: how many of each class, and which of them matter most."""

from __future__ import annotations

from collections import defaultdict
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
    wanted: dict[tuple[str, str], int] = {}
    for mine, theirs in pairs.items():
        if theirs in layers:
            for side, size in zip(("in", "out"), sizes_of(mine, student.get_submodule(mine)), strict=True):
                wanted[theirs, side] = size
    sizes = {(name, side): size for name, layer in layers.items()
             for side, size in zip(("in", "out"), sizes_of(name, layer), strict=True)}  # fmt: skip
    norms = {theirs: student.get_submodule(mine) for mine, theirs in pairs.items()}
    classes = [merge_groups(group, layers, norms) for group in classes]
    keep = numbers_to_keep(classes, wanted, sizes)
    attention = {name for group in classes if group[0].queries for name, _ in group[0].nodes}
    statistics = (
        measure(source, video, layers, attention) if any(n < len(g) for n, g in zip(keep, classes, strict=True)) else {}
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
        if name[1] == "out" and is_rms(layers[name[0]]) and len(kept[name]) < size:
            power = statistics[name[0]].moment.diagonal().cpu()
            lost = power[removed[name[0]]].sum() / power.sum() if power.sum() > 0 else 0.0
            scale = float(size / len(kept[name]) * (1 - lost)) ** 0.5  # root mean squares of fewer channels
            factors[name] = {index: scale * factors[name].get(index, 1.0) for index in kept[name]}
    channels = {key: sorted(indices) for key, indices in kept.items()}
    factors_of = {key: torch.tensor([values.get(index, 1.0) for index in channels[key]], dtype=torch.float64)
                  for key, values in factors.items()}  # fmt: skip
    return Kept({key: torch.tensor(indices) for key, indices in channels.items()}, factors_of), statistics, lines


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


def _choose(
    group: list[Channels], count: int, layers: dict[str, nn.Module], statistics: dict[str, Statistics], importance: str
) -> tuple[list[int], dict[int, int]]:
    """The `count` channels of a class that matter most, in order, and {removed channel: kept one that equals it}."""
    moments = torch.zeros(len(group), len(group), dtype=torch.float64)  # of all layers that read the channels
    power = torch.zeros(len(group), dtype=torch.float64)
    for name, side in group[0].nodes:
        layer = layers[name]
        if side == "in" and is_rms(layer):  # its other channels depend on their power, whatever reads them
            own = statistics[name]
            index = torch.tensor([channels.nodes[name, side] for channels in group])
            for part in index.T:
                moments += own.moment.cpu()[part][:, part] / own.count
        if side == "out" or is_per_channel(layer):
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
    equal, free = equal_channels(moments).fill_diagonal_(False), moments.diagonal() == 0
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

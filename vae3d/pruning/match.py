"""Which layers and blocks of the larger model the smaller one has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from vae3d.models.interface import VideoAutoencoder
from vae3d.pruning.layers import PruningError, hooked, owns, run


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
        larger, smaller = ({name for name, layer in model.get_submodule(path).named_modules() if owns(layer)}
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


def rank_blocks(source: VideoAutoencoder, video: Tensor, runs: list[tuple[list[str], int]]) -> list[list[str]]:
    """Of each run, the blocks to keep: those are skipped one by one that change the video least."""
    expected = run(source, video)
    kept = [list(names) for names, _ in runs]
    skipped: list[str] = []

    def error(names: Sequence[str]) -> float:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(hooked(source.get_submodule(name), _skip(name)))
            return (run(source, video) - expected).square().mean().item()

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

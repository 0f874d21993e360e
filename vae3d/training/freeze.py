"""Which parts of a model train, each at its own learning rate; everything else is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vae3d.errors import UserError

ALL = "all"


class PartError(UserError):
    """stage.train does not fit the model."""


def train_parts(model: nn.Module, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Freeze all but the named parts of `model`. Returns optimizer parameter groups with `part` and `lr_scale`.

    scales: part of model.trainable_parts(), or `all` -> learning-rate scale.
    Raises PartError for an unknown part, for a parameter named twice, or if nothing trains.
    """
    parts = {**model.trainable_parts(), ALL: [model]}
    unknown = [name for name in scales if name not in parts]
    if unknown:
        raise PartError(f"{type(model).__name__} has no part {', '.join(unknown)}; it has {', '.join(parts)}")
    model.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    owner: dict[int, str] = {}
    for name, scale in scales.items():
        parameters = [p for module in parts[name] for p in module.parameters()]
        twice = {owner[id(p)] for p in parameters if id(p) in owner}
        if twice:
            raise PartError(f"parts {name} and {', '.join(twice)} overlap; name every parameter once")
        owner.update((id(p), name) for p in parameters)
        for p in parameters:
            p.requires_grad_(True)
        groups.append({"params": parameters, "part": name, "lr_scale": float(scale)})
    if not owner:
        raise PartError(f"nothing trains; name at least one of {', '.join(parts)}")
    return groups


def set_mode(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Training mode for the named parts, eval mode for everything else."""
    parts = {**model.trainable_parts(), ALL: [model]}
    model.eval()
    for name in scales:
        for module in parts[name]:
            module.train()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def parameter_list(model: nn.Module) -> str:
    """Every parameter's name and shape, under its part (without parts, under the submodule), which trains or not."""
    parts = model.trainable_parts() if hasattr(model, "trainable_parts") else {}
    parts = parts or {name: [child] for name, child in model.named_children()}
    part_of: dict[int, str] = {}
    for part, modules in parts.items():  # of parts that overlap, the first
        for parameter in (p for module in modules for p in module.parameters()):
            part_of.setdefault(id(parameter), part)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(part_of.get(id(parameter), "in no part"), []).append((name, parameter))
    lines = []
    for part, named in members.items():
        trained = sum(p.numel() for _, p in named if p.requires_grad)
        frozen = sum(p.numel() for _, p in named) - trained
        lines.append(f"{part}: {trained:,} parameters train, {frozen:,} are frozen")
        for name, p in named:
            lines.append(f"  {name}  {'x'.join(map(str, p.shape)) or '1'}{'' if p.requires_grad else '  frozen'}")
    return "\n".join(lines)


def params_without_grad(model: nn.Module) -> list[str]:
    """Names of trainable parameters that the last backward pass did not reach."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def parameters_behind(loss: Tensor) -> set[Tensor]:
    """Those to which loss.backward() would give a gradient, found in the graph, without computing any."""
    nodes, found = [loss.grad_fn], set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        new = {following for following, _ in getattr(node, "next_functions", ())} - seen
        seen |= new
        nodes += new
    return found

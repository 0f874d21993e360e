"""Check a saved training state against the current run, before it is loaded.

torch checks little: an optimizer accepts moments of any shape, and copying a tensor of one element fills a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from vae3d.arguments import ArgumentError, short

GROUP_KEYS = ("params", "lr")  # that an optimizer's group must have; torch fills in the others


def check_like(saved: Any, like: Any, name: str) -> None:
    """Raises ArgumentError, naming the entry, unless `saved` has the structure of `like`.

    That is: dicts with the same keys, lists with the same length, tensors with the same shape, numbers in the same
    places, and equal text.
    """
    if isinstance(like, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != like.shape or saved.is_complex() != like.is_complex():
            raise ArgumentError(f"{name} is {_form(saved)}, not {_form(like)}")
    elif isinstance(like, Mapping):
        if not isinstance(saved, Mapping):
            raise ArgumentError(f"{name} is {_form(saved)}, not a dict")
        if unmatched := saved.keys() ^ like.keys():
            key = min(unmatched, key=str)
            raise ArgumentError(f"{name} {'has no' if key in like else 'has an unknown'} {short(key)}")
        for key, value in like.items():
            check_like(saved[key], value, f"{name}.{key}")
    elif isinstance(like, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(like):
            raise ArgumentError(f"{name} is {_form(saved)}, not a list of {len(like)}")
        for index, value in enumerate(like):
            check_like(saved[index], value, f"{name}[{index}]")
    elif isinstance(like, Real) and (not isinstance(saved, Real) or isinstance(saved, bool) != isinstance(like, bool)):
        raise ArgumentError(f"{name} is {_form(saved)}, not a number")
    elif isinstance(like, str) and saved != like:
        raise ArgumentError(f"{name} is {_form(saved)}, not {like}")


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, name: str = "optimizer") -> None:
    """Load moments and learning rates of an Adam with the same groups; its other settings stay as they are.

    Raises ArgumentError.
    """
    groups = optimizer.state_dict()["param_groups"]  # with the indices of their parameters
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ArgumentError(f"{name} is {_form(saved)}, not the state of an optimizer")
    if not isinstance(saved["param_groups"], list) or len(saved["param_groups"]) != len(groups):
        raise ArgumentError(f"{name}.param_groups is {_form(saved['param_groups'])}, not a list of {len(groups)}")
    for i, (group, saved_group) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        _check_group(saved_group, group, f"{name}.param_groups[{i}]")
    if not isinstance(saved["state"], Mapping):
        raise ArgumentError(f"{name}.state is {_form(saved['state'])}, not a dict")
    for index, moments in saved["state"].items():
        where = f"{name}.state[{short(index)}]"
        if type(index) is not int or not 0 <= index < len(shapes):
            raise ArgumentError(f"{where} belongs to no parameter; there are {len(shapes)}")
        like = torch.empty(shapes[index], device="meta")
        saved_step = moments.get("step") if isinstance(moments, Mapping) else None
        step = 0 if isinstance(saved_step, Real) else torch.zeros(())  # a number in DeepSpeed's Adam
        check_like(moments, {"step": step, "exp_avg": like, "exp_avg_sq": like}, where)
    settings = [{k: v for k, v in group.items() if k not in GROUP_KEYS} for group in optimizer.param_groups]
    # A fused AdamW counts its steps on the device; torch asks the saved groups where to load the counts.
    forms = [{**group, "fused": own.get("fused")} for group, own in zip(saved["param_groups"], settings, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": forms})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, moments in optimizer.state.items():  # fused kernels need the layout of the parameter
        for key, moment in moments.items():
            if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[key] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _check_group(saved: Any, group: Mapping[str, Any], name: str) -> None:
    """Raises ArgumentError unless a saved group fits the optimizer's own."""
    if not isinstance(saved, Mapping):
        raise ArgumentError(f"{name} is {_form(saved)}, not a dict")
    ours = [key for key, value in group.items() if isinstance(value, str) or key == "lr_scale"]  # set by the trainers
    for key in (*GROUP_KEYS, *ours):
        if key not in saved:
            raise ArgumentError(f"{name} has no {key}")
    if saved["params"] != group["params"]:
        raise ArgumentError(f"{name}.params is {_form(saved['params'])}, not {short(group['params'])}")
    for key in (group.keys() & saved.keys()) - {"params"}:
        if saved[key] is not None:  # None: torch chooses
            check_like(saved[key], group[key], f"{name}.{key}")


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return short(value)

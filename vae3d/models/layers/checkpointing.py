"""Gradient checkpointing: keep a function's inputs and recompute the rest in backward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def maybe_checkpoint(fn: Callable[..., Result], *args: Any, enabled: bool) -> Result:
    """fn(*args), under torch's gradient checkpointing if `enabled`. fn must draw no random numbers."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return fn(*args)


def needs_grad(network: nn.Module, x: Tensor) -> bool:
    """Whether backward will pass through network(x)."""
    return x.requires_grad or any(p.requires_grad for p in network.parameters())


class CheckpointedBlock(nn.Module):
    """Mixin of checkpoint_blocks: forward of the next class, recomputed in backward.

    The block may change lists and dicts among its arguments, and the attributes STATE of its modules: caches of past
    frames. It is run on copies of them, so that it computes the same when it runs again, and they are changed after it.
    """

    STATE = ("prev_features",)  # of diffusers' EasyAnimate layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        arguments, state = (args, kwargs), self._state()

        def run(arguments: Any, state: Any) -> Any:
            before, (args, kwargs) = self._state(), _copied(arguments)
            self._set_state(state)
            try:
                output = super(CheckpointedBlock, self).forward(*args, **kwargs)
                return output, (args, kwargs), self._state()
            finally:
                self._set_state(before)

        output, changed, state = maybe_checkpoint(run, _copied(arguments), state, enabled=True)
        _write_back(arguments, changed)
        self._set_state(state)
        return output

    def _state(self) -> list[tuple[nn.Module, str, Any]]:
        return [(m, name, m.__dict__[name]) for m in self.modules() for name in self.STATE if name in m.__dict__]

    def _set_state(self, state: list[tuple[nn.Module, str, Any]]) -> None:
        for module, name, value in state:
            module.__dict__[name] = value


def checkpoint_blocks(network: nn.Module, names: Collection[str]) -> int:
    """Make every module whose class is called one of `names` a CheckpointedBlock, in place. Returns their number.

    State-dict keys and results stay, also where a network has caches of its own. A block within another is left alone.
    """
    blocks = [m for m in network.modules() if type(m).__name__ in names]
    inner = {id(m) for block in blocks for m in block.modules() if m is not block}
    blocks = [block for block in blocks if id(block) not in inner]
    for block in blocks:
        cls = type(block)
        block.__class__ = type(cls.__name__, (CheckpointedBlock, cls), {"__module__": cls.__module__})
    return len(blocks)


def _copied(value: Any) -> Any:
    """Copies of dicts, lists and tuples at any depth, of the same tensors."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _write_back(target: Any, source: Any) -> None:
    """Give the lists and dicts in `target` the entries of those in `source`, which is a changed copy of it."""
    if isinstance(target, dict | list):
        for key, item in source.items() if isinstance(target, dict) else enumerate(source):
            known = key in target if isinstance(target, dict) else True
            if known and isinstance(target[key], dict | list) and isinstance(item, dict | list):
                _write_back(target[key], item)
            else:
                target[key] = item
    elif isinstance(target, tuple):
        for inner, item in zip(target, source, strict=True):
            _write_back(inner, item)

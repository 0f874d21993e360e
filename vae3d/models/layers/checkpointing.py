"""Gradient checkpointing: keep a function's inputs, recompute the rest in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def run(fn: Callable[..., Result], *args: Any, recompute: bool) -> Result:
    """fn(*args); with `recompute` its intermediate activations are recomputed in backward. fn draws no noise."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return fn(*args)


def needs_grad(network: nn.Module, x: Tensor) -> bool:
    """Whether backward will pass through network(x)."""
    return x.requires_grad or any(p.requires_grad for p in network.parameters())

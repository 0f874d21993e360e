"""Gradient checkpointing: keep a function's inputs and recompute the rest in backward."""

from __future__ import annotations

from collections.abc import Callable
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

"""Proximal regularisation towards the weights that training started from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae3d.arguments import check_fields
from vae3d.checkpoints.state import ResumeError
from vae3d.hashing import weights_hash


class _ProximalState(TypedDict):
    anchor: str | None


class Proximal:
    """Adds the gradient of lambda * sum (theta - theta0)^2 over the trainable parameters.

    L2-SP (Li et al., *Explicit Inductive Bias for Transfer Learning*, ICML 2018) and FedProx (Li et al., 2020). A sum,
    so that lambda does not depend on the number of parameters. The anchor theta0 is a copy of the current weights, in
    fp32. weight: lambda; 0 does nothing.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight = weight
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if weight else {}
        self.anchor = {n: p.detach().to(torch.float32, copy=True) for n, p in self.parameters.items()}

    @torch.no_grad()
    def add_gradient(self) -> None:
        """grad += 2 lambda (theta - theta0), in two adds without temporaries; parameters without gradient are skipped.

        Call it after gradients are accumulated, averaged over ranks and unscaled, and before they are clipped.
        """
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        if not names:
            return
        gradients = [self.parameters[name].grad for name in names]
        torch._foreach_add_(gradients, [self.parameters[name] for name in names], alpha=2.0 * self.weight)
        torch._foreach_add_(gradients, [self.anchor[name] for name in names], alpha=-2.0 * self.weight)

    @torch.no_grad()
    def value(self) -> Tensor:
        """lambda * sum (theta - theta0)^2, a scalar."""
        squares = [F.mse_loss(p, self.anchor[name], reduction="sum") for name, p in self.parameters.items()]
        return self.weight * torch.stack(squares).sum()

    def state_dict(self) -> dict[str, str | None]:
        return {"anchor": self.digest}

    def load_state_dict(self, state: Mapping[str, str | None]) -> None:
        """Raises ResumeError if the checkpoint was trained with another anchor."""
        check_fields(state, _ProximalState, key="proximal")
        saved = state["anchor"]
        if saved is not None and self.anchor and saved != self.digest:
            raise ResumeError(
                f"was regularised (optim.proximal) towards other weights than stage.init_from holds now (SHA-256 "
                f"{saved[:12]}, now {self.digest[:12]}); restore the original weights, or set optim.proximal=0"
            )

    @cached_property
    def digest(self) -> str | None:
        """weights_hash of the anchor; None without one."""
        return weights_hash(self.anchor) if self.anchor else None

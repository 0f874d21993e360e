"""Proximal regularisation: weights are pulled back towards those that training started from."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae3d.checkpoints.state import ResumeError


class Proximal:
    """lambda * sum (theta - theta0)^2 over the trainable parameters, as an edit of their gradients.

    L2-SP (Li et al., *Explicit Inductive Bias for Transfer Learning*, ICML 2018) and FedProx (Li et al., 2020); a sum,
    so that lambda does not depend on the number of parameters. The anchor theta0 is what `model` holds now, in fp32.
    weight: lambda; 0 keeps no anchor and does nothing.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight = weight
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if weight else {}
        self.anchor = {n: p.detach().to(torch.float32, copy=True) for n, p in self.parameters.items()}

    @torch.no_grad()
    def add_gradient(self) -> None:
        """grad += 2 lambda (theta - theta0), in two adds without temporaries; parameters without gradient are left out.

        The gradients must be whole: reduced over ranks, of all micro-batches, unscaled, and not yet clipped.
        """
        reached = [name for name, p in self.parameters.items() if p.grad is not None]
        if not reached:
            return
        gradients = [self.parameters[name].grad for name in reached]
        torch._foreach_add_(gradients, [self.parameters[name] for name in reached], alpha=2.0 * self.weight)
        torch._foreach_add_(gradients, [self.anchor[name] for name in reached], alpha=-2.0 * self.weight)

    @torch.no_grad()
    def value(self) -> Tensor:
        """lambda * sum (theta - theta0)^2 at the present weights, a scalar."""
        squares = [F.mse_loss(p, self.anchor[name], reduction="sum") for name, p in self.parameters.items()]
        return self.weight * torch.stack(squares).sum()

    def check_same_anchor(self, saved: str | None, checkpoint: Path, source: object) -> None:
        """Raises ResumeError if a checkpoint whose run was pulled elsewhere is about to be continued.

        saved: the digest that `checkpoint` holds. source: where this anchor was read from.
        """
        if saved is not None and self.anchor and saved != self.digest:
            raise ResumeError(
                f"{checkpoint} was pulled (optim.proximal) towards other weights than stage.init_from={source} holds "
                f"now (SHA-256 {saved[:12]}, now {self.digest[:12]}); put the original weights back, or set "
                "optim.proximal=0 to go on without"
            )

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 over the names and bytes of the anchor; None without one."""
        if not self.anchor:
            return None
        digest = hashlib.sha256()
        for name, tensor in self.anchor.items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

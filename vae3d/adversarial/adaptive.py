"""Adaptive weight of the adversarial loss (VQGAN): the ratio of gradient norms at the last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae3d.distributed import all_reduce_sum
from vae3d.errors import UserError

EPS = 1e-4


class AdaptiveWeight:
    """clamp(|d loss / d w| / (|d adversarial / d w| + 1e-4), max=max_weight), where w is the last layer's weight.

    VQGAN, arXiv 2012.09841, equation 7; `calculate_adaptive_weight` in CompVis/latent-diffusion
    `ldm/modules/losses/contperceptual.py`. The last layer is the trained one nearest to the pixels. `loss` includes the
    KL divergence, which has no gradient there. With reduction=sum the weight is H * W * 3 times as large as with mean,
    and a max_weight of 1e4 may clamp it.

    The two gradients, some thousand numbers, are averaged over ranks before their norms are taken, so two ranks with
    one clip each get the weight of one rank with both. Every micro-batch has its own weight. A rank that skips a
    micro-batch (out of memory, unreadable files) must call `sync_remaining`; the mean is then over the other ranks.

    Raises ValueError rather than silently return 0: without a trained layer, and where `loss` does not reach it. Where
    the gradient of `loss` is 0 there, `sync_remaining` says so. If a gradient is not finite, the weight is NaN, and the
    trainer skips the step.
    """

    def __init__(self, max_weight: float) -> None:
        self.max_weight = max_weight

    def load(self, model: nn.Module, device: torch.device) -> None:
        """Choose the last layer of a model whose frozen parts are frozen already."""
        self.layer = next((p for p in model.last_layers() if p.requires_grad), None)
        for module in model.modules():  # see SpatialVAE
            if hasattr(module, "keep_last_input"):
                module.keep_last_input = any(p is self.layer for p in module.last_layers())
        # Both gradients and a count of ranks. Allocated now: a rank that is out of memory could not do it later.
        self.buffer = torch.zeros(0 if self.layer is None else 2 * self.layer.numel() + 1, device=device)
        self._reset()

    def _reset(self) -> None:
        self._all_reduces = 0  # in this step
        self._no_reconstruction_grad: list[Tensor] = []  # per micro-batch

    def __call__(self, loss: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """The weight, and 1.0 if it was clamped, else 0.0. All ranks call this, or else sync_remaining."""
        if self.layer is None:
            raise ValueError(
                "no layer that ends at the pixels trains, but adversary.adaptive=true takes the weight from it; use "
                "adversary.adaptive=false, or train the decoder"
            )
        gradients = [
            torch.autograd.grad(value, inputs=self.layer, retain_graph=True, allow_unused=True)[0]
            for value in (loss, adversarial)
        ]
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                "no loss term reaches the last layer that trains, but adversary.adaptive=true takes the weight from "
                "it; add a term on pixels, such as loss=recon_kl, or use adversary.adaptive=false"
            )
        loss_norm, adversarial_norm = self._reduced_norms(gradients)
        ratio = loss_norm / (adversarial_norm + EPS)
        finite = loss_norm.isfinite() & adversarial_norm.isfinite()
        return torch.where(finite, ratio.clamp(max=self.max_weight), torch.nan), (ratio > self.max_weight).float()

    def _reduced_norms(self, gradients: list[Tensor] | None) -> Tensor:
        """Norms of the two gradients, averaged over the ranks that have them. None: this rank has not."""
        self.buffer.zero_()
        if gradients is not None:
            torch.cat([g.detach().flatten().float() for g in gradients], out=self.buffer[:-1])
            self.buffer[-1].fill_(1.0)
        if not self.buffer.is_meta:
            all_reduce_sum(self.buffer)
        norms = (self.buffer[:-1] / self.buffer[-1].clamp(min=1)).view(2, -1).norm(dim=1)
        self._all_reduces += 1
        self._no_reconstruction_grad.append((norms[0] == 0) & (norms[1] > 0))
        return norms

    def sync_remaining(self, micro_batches: int) -> Tensor:
        """Join the all-reduces of this step that this rank skipped.

        Returns a flag on the device, equal on all ranks: whether the weight of a micro-batch is 0 because no other loss
        has a gradient, which is an `error`.
        """
        while self._all_reduces < micro_batches:
            self._reduced_norms(None)
        no_gradient = torch.stack(self._no_reconstruction_grad).any()
        self._reset()
        return no_gradient

    @staticmethod
    def error() -> UserError:
        return UserError(
            "adversary.adaptive=true gives the adversarial loss a weight of 0: no other loss has a gradient at the "
            "last layer; start a term on pixels before adversary.start, or use adversary.adaptive=false"
        )

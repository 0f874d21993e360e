"""The adaptive weight of an adversarial loss: it pulls as hard at the decoder's last layer as the other losses do."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vae3d.distributed import all_reduce_sum

EPSILON = 1e-4


class AdaptiveWeight:
    """lambda = clamp(|d loss / d w| / (|d adversarial / d w| + 1e-4), 0, most), w the last layer's weight: VQGAN,
    arXiv 2012.09841, equation 7; `calculate_adaptive_weight` of CompVis/latent-diffusion
    `ldm/modules/losses/contperceptual.py`.

    The last layer is the one nearest to pixels that trains. The KL divergence is part of `loss`, but does not reach it.
    Beside a loss of reduction=sum lambda is H * W * 3 times as large as beside one of mean, and 1e4 may bind.

    Ranks: the two gradients, some thousand numbers, are averaged over ranks before their norms are taken, so that two
    ranks with a clip each have the weight of one rank with both. Every micro-batch has its own weight. A rank that
    cannot take part, for want of memory or files, must make up for it in `sync_remaining`; the mean is then of the others.

    It never falls to 0 in silence: ValueError without a layer that trains, where `loss` does not reach it, and, in
    `sync_remaining`, where `loss` does not pull at it at all. Where a gradient is not finite neither is the weight, and the
    step is skipped as every such step.
    """

    def __init__(self, most: float) -> None:
        self.most = most

    def load(self, model: nn.Module, device: torch.device) -> None:
        """Find the last layer of a model (see VideoAutoencoder.last_layers) that its stage has frozen where it does."""
        self.layer = next((p for p in model.last_layers() if p.requires_grad), None)
        for part in model.modules():  # what checkpointing keeps, see SpatialVAE
            if hasattr(part, "keep_last_input"):
                part.keep_last_input = any(p is self.layer for p in part.last_layers())
        # Made at the start, since a rank that is out of memory could not make it then.
        self.table = torch.zeros(0 if self.layer is None else 2 * self.layer.numel() + 1, device=device)
        self._forget()

    def _forget(self) -> None:
        self._exchanged = 0  # in this step
        self._idle: list[Tensor] = []  # whether only the adversarial loss pulled, per micro-batch

    def __call__(self, loss: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """The weight, and whether it was clamped (1.0 or 0.0). Every rank must call it, or make up for it."""
        if self.layer is None:
            raise ValueError(
                "no layer that ends at the pixels trains, from which adversary.adaptive=true takes the weight; use "
                "adversary.adaptive=false, or train the decoder"
            )
        ask = partial(torch.autograd.grad, inputs=self.layer, retain_graph=True, allow_unused=True)
        gradients = [ask(value)[0] for value in (loss, adversarial)]
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                "no loss term reaches the last layer that trains, from which adversary.adaptive=true takes the weight; "
                "add a term on pixels, such as loss=recon_kl, or use adversary.adaptive=false"
            )
        pull, push = self._norms(gradients)
        ratio = pull / (push + EPSILON)
        weight = torch.where(pull.isfinite() & push.isfinite(), ratio.clamp(max=self.most), torch.nan)
        return weight, (ratio > self.most).float()

    def _norms(self, gradients: list[Tensor] | None) -> Tensor:
        """Norms of the two gradients, averaged over the ranks that have them. None: this one has not."""
        self.table.zero_()
        if gradients is not None:
            torch.cat([g.detach().flatten().float() for g in gradients], out=self.table[:-1])
            self.table[-1] = 1.0
        if not self.table.is_meta:
            all_reduce_sum(self.table)
        pull, push = norms = (self.table[:-1] / self.table[-1].clamp(min=1)).view(2, -1).norm(dim=1)
        self._exchanged += 1
        self._idle.append((pull == 0) & (push > 0))
        return norms

    def sync_remaining(self, micro_batches: int) -> None:
        """Take part in the exchanges of a step that this rank has missed.

        Raises ValueError, on all ranks, if the weight of a micro-batch came out as 0 because no other loss pulls.
        """
        while self._exchanged < micro_batches:
            self._norms(None)
        idle = bool(torch.stack(self._idle).any())
        self._forget()
        if idle:
            raise ValueError(
                "adversary.adaptive=true gives the adversarial loss a weight of 0: no other loss has a gradient at "
                "the last layer; let a term on pixels begin before adversary.start, or use adversary.adaptive=false"
            )

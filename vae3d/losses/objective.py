"""The training loss: named terms, each with a weight that may ramp up, summed in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae3d.arguments import check_fields
from vae3d.layout import place
from vae3d.losses.pixel_weights import PixelWeight, mean_one
from vae3d.precision import autocast_off
from vae3d.pretrained import weights
from vae3d.pretrained.lpips import LPIPSNet
from vae3d.pretrained.raft import Raft
from vae3d.schedules import ramp
from vae3d.text import plural
from vae3d.types import ClipBatch, Reconstruction

REDUCTIONS = ("sum", "mean")


class ErrorMap(NamedTuple):
    """A term's errors, and the number of elements of one frame (KL: of one clip).

    The mean of `map` is the error per element; times `numel` it is the sum that latent-diffusion and Open-Sora use. A
    `map` of the clip's height and width is multiplied by the clip's weight in the Objective. Terms with other maps
    (LPIPS: one value per frame) apply the weight themselves, if at all.
    """

    map: Tensor
    numel: int


class Term:
    """A loss term. Its own parameters are not trained: those of pretrained networks must have requires_grad=False.

    Arguments are fields of a dataclass, whose values are checked against their annotations.

    needs_pixels: whether it uses out.video, for which the pixel decoder must run. needs_posterior: whether it uses
    out.posterior; clips are then encoded even if a teacher's latents are decoded.
    """

    needs_pixels = True
    needs_posterior = False

    def __post_init__(self) -> None:
        """Raises ArgumentError."""
        check_fields(vars(self), type(self))

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap | None:
        """Errors, or None if the term does not apply to this clip."""
        raise NotImplementedError

    def find_weights(self) -> None:
        """Raises WeightsMissing if the file of a pretrained network is missing."""

    def load(self, device: torch.device | str) -> None:
        """Load pretrained networks, onto `device`."""


class PixelTerm(Term):
    """Base of terms that compare the reconstruction's pixels with the clip's."""

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap:
        assert out.video is not None, "the term needs pixels; set needs_pixels = True in its class"
        return ErrorMap(self.errors(out.video.float(), batch), numel_per_frame(batch.video))

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        """ErrorMap.map of a reconstruction [B, 3, T, H, W]."""
        raise NotImplementedError


class NetworkTerm(Term):
    """Base of terms with a frozen pretrained network, which is loaded by `load`.

    network: None where the term's settings need none. path: the network's file; None: found by its name.
    """

    network: LPIPSNet | Raft | None = None
    path: str | Path | None = None

    def find_weights(self) -> None:
        if self.network is not None:
            weights.find(self.network.file, path=self.path)

    def load(self, device: torch.device | str) -> None:
        if self.network is not None:
            place(self.network.load(self.path), device)


@dataclass(frozen=True)
class WeightedTerm:
    """A term in an Objective. reduction: by default the objective's."""

    term: Term
    weight: float
    ramp: tuple[int, int] = (0, 0)
    log: bool = False
    reduction: str | None = None

    def __post_init__(self) -> None:
        name = type(self.term).__name__
        if not isinstance(self.term, Term):
            raise ValueError(f"{name} is not a loss term; make it a subclass of Term in vae3d/losses/objective.py")
        values = (self.term, *vars(self.term).values())
        modules = [value for value in values if isinstance(value, nn.Module)]
        parameters = [value for value in values if isinstance(value, nn.Parameter)]
        if any(p.requires_grad for p in (*parameters, *nn.ModuleList(modules).parameters())):
            raise ValueError(f"{name} has parameters, which would not be trained; set requires_grad=False on them")

    def weight_at(self, step: int) -> float:
        return self.weight * ramp(step, *self.ramp)


class Objective(nn.Module):
    """Weighted sum of loss terms.

    reduction: "sum" sums each term over the elements of a frame and averages over frames and clips (KL: sums over a
    clip, averages over clips), as `VAELoss` in Open-Sora v1.2 `losses.py` and `LPIPSWithDiscriminator` in
    latent-diffusion. "mean" averages over all elements. A term may have its own reduction.
    pixel_weight: weight of each row in the terms on pixels. Invalid pixels have weight 0, and the others of their clip
    more, so that the mean is 1; a clip without a valid pixel adds nothing.
    logvar: initial value of a learned log-variance s; None: there is none. The terms on pixels (needs_pixels) then form
    a negative log-likelihood, their sum / exp(s) + s, where s counts once per element of a frame under "sum":
    latent-diffusion `contperceptual.py`, which never trains its s. At the optimum exp(s) is the weighted error per
    element, which divides the weights of these terms relative to all others.
    Raises ValueError for another reduction, or for a logvar without terms on pixels.
    """

    def __init__(
        self,
        terms: Mapping[str, WeightedTerm],
        reduction: str,
        pixel_weight: PixelWeight | None = None,
        *,
        logvar: float | None = None,
    ) -> None:
        super().__init__()
        for chosen in (reduction, *(t.reduction or reduction for t in terms.values())):
            if chosen not in REDUCTIONS:
                raise ValueError(f"reduction is {chosen!r}; use one of {', '.join(REDUCTIONS)}")
        self.terms = {name: t for name, t in terms.items() if t.weight or t.log}
        self.reduction = reduction
        self.pixel_weight = pixel_weight
        self.logvar = None if logvar is None else nn.Parameter(torch.tensor(float(logvar)))
        if self.logvar is not None and not self.needs_pixels:
            raise ValueError(f"loss.logvar={logvar} needs a term on pixels, and there is none; use null")

    @property
    def needs_pixels(self) -> bool:
        return any(t.term.needs_pixels for t in self.terms.values())

    @property
    def needs_posterior(self) -> bool:
        return any(t.term.needs_posterior for t in self.terms.values())

    def load(self, device: torch.device | str) -> None:
        """Load the pretrained networks of terms and move everything to `device`."""
        self.to(device)
        for t in self.terms.values():
            t.term.load(device)

    def forward(self, batch: ClipBatch, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch at optimizer step `step`.

        Metrics per term: `loss/<name>` under its reduction, `loss_mean/<name>` per element and `loss_weighted/<name>`,
        its part of the total. `loss/logvar` is s. Raises ValueError if no term applies.
        """
        weighted_losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        with autocast_off(batch.video.device):
            batch, out = self._apply_weights(batch, out)
            for name, t in self._active_terms(step).items():
                error = t.term(batch, out)
                if error is None:
                    continue
                errors = error.map.float()
                if batch.weight is not None and errors.shape[-2:] == batch.video.shape[-2:]:
                    errors = errors * batch.weight
                mean = errors.mean()
                value = mean * error.numel if (t.reduction or self.reduction) == "sum" else mean
                weighted = t.weight_at(step) * value
                if self.logvar is not None and t.term.needs_pixels:
                    weighted = weighted * torch.exp(-self.logvar)
                weighted_losses.append(weighted)
                metrics[f"loss/{name}"] = value.detach()
                metrics[f"loss_mean/{name}"] = mean.detach()
                metrics[f"loss_weighted/{name}"] = weighted.detach()
        if not weighted_losses:
            raise ValueError(
                f"none of the loss terms {list(self.terms)} applies to a clip of "
                f"{plural(batch.video.shape[2], 'frame')}"
            )
        if self.logvar is not None:
            weighted_losses.append(self.logvar * (numel_per_frame(batch.video) if self.reduction == "sum" else 1))
            metrics["loss/logvar"] = self.logvar.detach().clone()
            metrics["loss_weighted/logvar"] = weighted_losses[-1].detach()
        return torch.stack(weighted_losses).sum(), metrics

    def _active_terms(self, step: int) -> Mapping[str, WeightedTerm]:
        """The terms, without those on pixels whose weight is 0 (LPIPS before its ramp).

        If no term on pixels has a weight, all are kept, so that every parameter has a gradient on every rank.
        """
        active = {name: t for name, t in self.terms.items() if t.weight_at(step) or t.log or not t.term.needs_pixels}
        return active if any(t.term.needs_pixels for t in active.values()) else self.terms

    def _apply_weights(self, batch: ClipBatch, out: Reconstruction) -> tuple[ClipBatch, Reconstruction]:
        """Set batch.weight, and replace invalid pixels of the reconstruction by the clip's: no error, no gradient."""
        weight = None
        if self.pixel_weight is not None:
            weight = self.pixel_weight(batch.video.shape[-2], batch.video.device)[None, None, None, :, None]
        if batch.valid is not None:
            weight = mean_one(batch.valid.float() if weight is None else batch.valid * weight)
            if out.video is not None:
                out = replace(out, video=torch.where(batch.valid, out.video, batch.video))
        return replace(batch, weight=weight), out


def numel_per_frame(x: Tensor) -> int:
    """C * H * W of [B, C, T, H, W]."""
    return x[0, :, 0].numel()

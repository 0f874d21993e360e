"""The training loss: named terms, each with a weight that may ramp up, summed in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vae3d.losses.weights import PixelWeight, mean_one
from vae3d.precision import autocast_off
from vae3d.schedules import ramp
from vae3d.types import Clip, Reconstruction

REDUCTIONS = ("sum", "mean")


class Error(NamedTuple):
    """What a term measured: a map of errors, and how many elements one frame (KL: one clip) has.

    The mean of `map` is the error per element; times `elements` it is the sum that latent-diffusion and
    Open-Sora call the loss. A map of the clip's height and width is weighted by `Clip.weight` afterwards; a term
    whose map is broadcastable (LPIPS: one value per frame) or of another size has weighted by itself, if at all.
    """

    map: Tensor
    elements: int


class Term(Protocol):
    """A loss term. needs_pixels: it reads out.video, so the pixel decoder must run."""

    needs_pixels: bool

    def __call__(self, clip: Clip, out: Reconstruction) -> Error | None:
        """None where the term does not apply to this clip."""


@dataclass(frozen=True)
class Weighted:
    """A term in an Objective. reduction: by default the objective's."""

    term: Term
    weight: float
    ramp: tuple[int, int] = (0, 0)
    log: bool = False
    reduction: str | None = None

    def at(self, step: int) -> float:
        return self.weight * ramp(step, *self.ramp)


class Objective:
    """Sum of weighted terms under one reduction, which a term may replace by its own.

    reduction "sum": each term summed over the elements of a frame and averaged over frames and clips (KL:
    summed over a clip, averaged over clips), as `VAELoss` in Open-Sora v1.2 `losses.py` and
    `LPIPSWithDiscriminator` in latent-diffusion do. "mean": averaged over all elements.
    pixel_weight: how much each row counts in the terms on pixels. Pixels that are not valid count nothing, and the
    others of their clip the more; a clip without a valid pixel adds nothing.
    logvar: where the learned log-variance s begins, if there is one. The terms on pixels (needs_pixels; equivariance is
    one, so that their weights keep their ratios) are then a negative log-likelihood, their sum / exp(s) + s, where s
    under "sum" counts for every element of a frame: latent-diffusion `contperceptual.py`, which never trains its s. At
    rest exp(s) is the weighted error per element, and other terms weigh exp(s) of what they did against these.
    Raises ValueError for another reduction, or for a logvar without terms on pixels.
    """

    def __init__(
        self,
        terms: Mapping[str, Weighted],
        reduction: str,
        pixel_weight: PixelWeight | None = None,
        *,
        logvar: float | None = None,
    ) -> None:
        for chosen in (reduction, *(t.reduction or reduction for t in terms.values())):
            if chosen not in REDUCTIONS:
                raise ValueError(f"reduction is {chosen!r}; use one of {', '.join(REDUCTIONS)}")
        self.terms = {name: t for name, t in terms.items() if t.weight or t.log}
        self.reduction, self.pixel_weight = reduction, pixel_weight
        self.logvar = None if logvar is None else nn.Parameter(torch.tensor(float(logvar)))
        if self.logvar is not None and not self.needs_pixels:
            raise ValueError(f"loss.logvar={logvar} is of the terms on pixels, of which there is none; use null")

    @property
    def needs_pixels(self) -> bool:
        return any(t.term.needs_pixels for t in self.terms.values())

    @property
    def needs_posterior(self) -> bool:
        """Whether a term reads the posterior: then clips are encoded also where a teacher's latents are decoded."""
        return any(getattr(t.term, "needs_posterior", False) for t in self.terms.values())

    def load(self, device: torch.device | str) -> None:
        """Read the weights of terms that have any and move everything to `device`."""
        if self.logvar is not None:
            self.logvar.data = self.logvar.data.to(device)
        for t in self.terms.values():
            if hasattr(t.term, "load"):
                t.term.load(device)

    def state_dict(self) -> dict[str, Tensor]:
        """What is learned here."""
        return {} if self.logvar is None else {"logvar": self.logvar.data}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.logvar is not None:
            self.logvar.data.copy_(state["logvar"])

    def __call__(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch at optimizer step `step`.

        Metrics per term: `loss/<name>` under its reduction, `loss_mean/<name>` per element and
        `loss_weighted/<name>`, its share of the total. `loss/logvar` is s.
        Raises ValueError if no term applies.
        """
        shares: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        with autocast_off(clip.video.device):
            clip, out = self._weigh(clip, out)
            for name, weighted in self._computed(step).items():
                error = weighted.term(clip, out)
                if error is None:
                    continue
                mean = _weighted_map(error.map.float(), clip).mean()
                value = mean * error.elements if (weighted.reduction or self.reduction) == "sum" else mean
                share = weighted.at(step) * value
                learned = self.logvar is not None and weighted.term.needs_pixels
                shares.append(share * torch.exp(-self.logvar) if learned else share)
                metrics[f"loss/{name}"] = value.detach()
                metrics[f"loss_mean/{name}"] = mean.detach()
                metrics[f"loss_weighted/{name}"] = shares[-1].detach()
        if not shares:
            raise ValueError(
                f"none of the loss terms {list(self.terms)} applies to a clip of {clip.video.shape[2]} frames"
            )
        if self.logvar is not None:
            shares.append(self.logvar * (numel_per_frame(clip.video) if self.reduction == "sum" else 1))
            metrics["loss/logvar"] = self.logvar.detach().clone()
            metrics["loss_weighted/logvar"] = shares[-1].detach()
        return torch.stack(shares).sum(), metrics

    def _computed(self, step: int) -> Mapping[str, Weighted]:
        """The terms without those that read pixels at weight 0 (LPIPS before its ramp) where another reads them too.

        Skipping such a term leaves no parameter without a gradient, on which DDP would fail.
        """
        wanted = {name for name, t in self.terms.items() if t.at(step) or t.log or not t.term.needs_pixels}
        if not any(self.terms[name].term.needs_pixels for name in wanted):
            return self.terms
        return {name: t for name, t in self.terms.items() if name in wanted}

    def _weigh(self, clip: Clip, out: Reconstruction) -> tuple[Clip, Reconstruction]:
        """The clip with its weights. Pixels that are not valid are reconstructed perfectly: no error, no gradient."""
        weight = None
        if self.pixel_weight is not None:
            weight = self.pixel_weight(clip.video.shape[-2], clip.video.device)[None, None, None, :, None]
        if clip.valid is not None:
            weight = mean_one(clip.valid.float() if weight is None else clip.valid * weight)
            if out.video is not None:
                out = replace(out, video=torch.where(clip.valid, out.video, clip.video))
        return replace(clip, weight=weight), out


def _weighted_map(errors: Tensor, clip: Clip) -> Tensor:
    return errors * clip.weight if clip.weight is not None and errors.shape[-2:] == clip.video.shape[-2:] else errors


def numel_per_frame(x: Tensor) -> int:
    """C * H * W of [B, C, T, H, W]."""
    _, channels, _, height, width = x.shape
    return channels * height * width


def require_pixels(out: Reconstruction) -> Tensor:
    assert out.video is not None, "a term that needs pixels was given none; does it declare needs_pixels?"
    return out.video.float()

"""The training loss: named terms, each with a weight that may ramp up, summed in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vae3d.precision import full_precision
from vae3d.schedules import ramp
from vae3d.types import Clip, Reconstruction

REDUCTIONS = ("sum", "mean")


class Error(NamedTuple):
    """What a term measured: a map of errors, and how many elements one frame (KL: one clip) has.

    The mean of `map` is the error per element; times `elements` it is the sum that latent-diffusion and
    Open-Sora call the loss. A map may be broadcastable (LPIPS: one value per frame).
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
    term: Term
    weight: float
    ramp: tuple[int, int] = (0, 0)
    log: bool = False

    def at(self, step: int) -> float:
        return self.weight * ramp(step, *self.ramp)


class Objective:
    """Sum of weighted terms under one reduction.

    reduction "sum": each term summed over the elements of a frame and averaged over frames and clips (KL:
    summed over a clip, averaged over clips), as `VAELoss` in Open-Sora v1.2 `losses.py` and
    `LPIPSWithDiscriminator` in latent-diffusion do, with logvar 0. "mean": averaged over all elements.
    Raises ValueError for another reduction.
    """

    def __init__(self, terms: Mapping[str, Weighted], reduction: str) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
        self.terms = {name: t for name, t in terms.items() if t.weight or t.log}
        self.reduction = reduction

    @property
    def needs_pixels(self) -> bool:
        return any(t.term.needs_pixels for t in self.terms.values())

    def load(self, device: torch.device | str) -> None:
        """Read the weights of terms that have any and move the terms to `device`."""
        for t in self.terms.values():
            if hasattr(t.term, "load"):
                t.term.load(device)

    def __call__(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch at optimizer step `step`.

        Metrics per term: `loss/<name>` under the reduction, `loss_mean/<name>` per element and
        `loss_weighted/<name>`, its share of the total.
        Raises ValueError if no term applies.
        """
        shares: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        with full_precision(clip.video.device):
            for name, weighted in self.terms.items():
                error = weighted.term(clip, out)
                if error is None:
                    continue
                mean = error.map.float().mean()
                value = mean * error.elements if self.reduction == "sum" else mean
                shares.append(weighted.at(step) * value)
                metrics[f"loss/{name}"] = value.detach()
                metrics[f"loss_mean/{name}"] = mean.detach()
                metrics[f"loss_weighted/{name}"] = shares[-1].detach()
        if not shares:
            raise ValueError(
                f"none of the loss terms {list(self.terms)} applies to a clip of {clip.video.shape[2]} frames"
            )
        return torch.stack(shares).sum(), metrics


def numel_per_frame(x: Tensor) -> int:
    """C * H * W of [B, C, T, H, W]."""
    _, channels, _, height, width = x.shape
    return channels * height * width


def require_pixels(out: Reconstruction) -> Tensor:
    assert out.video is not None, "a term that needs pixels was given none; does it declare needs_pixels?"
    return out.video.float()

"""Errors of depth in metres, as depth estimation reports them (Eigen et al., NeurIPS 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from vae3d.metrics.base import MetricError


def abs_rel(ref: Tensor, rec: Tensor, valid: Tensor) -> Tensor:
    """AbsRel, the mean of |rec - ref| / ref over the valid pixels, in fp64; lower is better.

    ref, rec: metres, of any one shape, positive where valid; valid: bool, of the same shape.
    Raises MetricError if no pixel is valid.
    """
    ref, rec = _measured(ref, rec, valid)
    return ((rec - ref).abs() / ref).mean()


def delta1(ref: Tensor, rec: Tensor, valid: Tensor) -> Tensor:
    """The share of the valid pixels with max(rec / ref, ref / rec) < 1.25, in fp64; higher is better. As abs_rel."""
    ref, rec = _measured(ref, rec, valid)
    return (torch.maximum(rec / ref, ref / rec) < 1.25).double().mean()


def _measured(ref: Tensor, rec: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    if not ref.shape == rec.shape == valid.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (ref, rec, valid))
        raise MetricError(f"depth, its reconstruction and its mask have different shapes: {shapes}")
    if not valid.any():
        raise MetricError("no pixel of this depth is valid, so it has no error")
    return ref[valid].double(), rec[valid].double()

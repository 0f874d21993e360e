"""Errors of depth in metres: AbsRel and delta1 (Eigen et al., NeurIPS 2014, arXiv 1406.2283)."""

from __future__ import annotations

import torch
from torch import Tensor

from vae3d.metrics.base import MetricError


def abs_rel(ref: Tensor, rec: Tensor, valid: Tensor) -> Tensor:
    """AbsRel: mean of |rec - ref| / ref over the valid pixels, in fp64; lower is better.

    ref, rec: metres, of equal shapes, positive where valid. valid: bool, of the same shape.
    Raises MetricError if no pixel is valid.
    """
    ref, rec = _valid_pixels(ref, rec, valid)
    return ((rec - ref).abs() / ref).mean()


def delta1(ref: Tensor, rec: Tensor, valid: Tensor) -> Tensor:
    """Share of the valid pixels with max(rec / ref, ref / rec) < 1.25, in fp64; higher is better.

    Arguments and errors as in abs_rel.
    """
    ref, rec = _valid_pixels(ref, rec, valid)
    return (torch.maximum(rec / ref, ref / rec) < 1.25).double().mean()


def _valid_pixels(ref: Tensor, rec: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    if not ref.shape == rec.shape == valid.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (ref, rec, valid))
        raise MetricError(f"depth, its reconstruction and its mask have different shapes: {shapes}")
    if not valid.any():
        raise MetricError("no pixel of this depth map is valid")
    return ref[valid].double(), rec[valid].double()

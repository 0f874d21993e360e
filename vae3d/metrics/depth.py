"""Errors of depth in metres (Eigen et al., NeurIPS 2014, arXiv 1406.2283)."""

from __future__ import annotations

import torch
from torch import Tensor

from vae3d.metrics.base import MetricError


def depth_errors(ref: Tensor, rec: Tensor, valid: Tensor) -> dict[str, float]:
    """Over the valid pixels, in fp64: abs_rel, mean of |rec - ref| / ref; lower is better. delta1, the share with
    max(rec / ref, ref / rec) < 1.25; higher is better.

    ref, rec: metres, of equal shapes, positive where valid. valid: bool, of the same shape.
    Raises MetricError for different shapes, and if no pixel is valid.
    """
    if not ref.shape == rec.shape == valid.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (ref, rec, valid))
        raise MetricError(f"depth, its reconstruction and its mask have different shapes: {shapes}")
    if not valid.any():
        raise MetricError("no pixel of this depth map is valid")
    ref, rec = ref[valid].double(), rec[valid].double()
    within = torch.maximum(rec / ref, ref / rec) < 1.25
    return {"abs_rel": float(((rec - ref).abs() / ref).mean()), "delta1": float(within.double().mean())}

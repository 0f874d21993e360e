"""Reconstruction metrics, used alike by evaluation, inference and validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vae3d.metrics.base import Metric, MetricError
from vae3d.metrics.frame import Lpips, Psnr, Ssim

PLANNED = ("flolpips",)
METRICS = {"psnr": Psnr, "ssim": Ssim, "lpips": Lpips}

__all__ = ["METRICS", "Metric", "MetricError", "build_metrics"]


def build_metrics(names: Sequence[str], device: torch.device | str = "cpu") -> list[Metric]:
    """Metrics by name, their weights loaded.

    Raises MetricError for an unknown name or one that is still to come, WeightsMissing if a metric's weights are not
    on this machine.
    """
    if planned := [name for name in names if name in PLANNED]:
        raise MetricError(f"{', '.join(planned)} is not available yet; there are {', '.join(METRICS)}")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise MetricError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}")
    return [Lpips(device) if name == "lpips" else METRICS[name]() for name in names]

"""Reconstruction metrics for evaluation, inference and validation.

metrics = build_metrics(["psnr", "lpips_alex"], device="cuda")
metrics.update(ref, rec)          # the next frames of both videos, [T, 3, H, W] in [0, 1]; once per chunk
metrics.result().scores           # {"psnr": Score(value, frames), ...}; the next update starts another video
metrics.score(chunks).scores      # the same of a whole video, of its chunks (ref, rec)
"""

from vae3d.metrics.base import Metric, MetricError, MetricSet, Score, VideoResult
from vae3d.metrics.presets import PRESETS
from vae3d.metrics.registry import METRICS, build_metrics

__all__ = ["METRICS", "PRESETS", "Metric", "MetricError", "MetricSet", "Score", "VideoResult", "build_metrics"]

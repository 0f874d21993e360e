"""Pairs of small videos for metrics, and the lpips package's network on the shared random trunks."""

from __future__ import annotations

import math
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tests import tiny
from vae3d.metrics import Metric, MetricSet, VideoResult
from vae3d.pretrained.lpips import TRUNKS


def pair(
    count: int = 3, height: int = 40, width: int = 48, noise: float = 0.05, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A moving pattern and the same with noise, [T, 3, H, W] in [0, 1]."""
    clip = torch.from_numpy(tiny.frames(count, height, width, seed)).permute(0, 3, 1, 2).float() / 255
    error = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed)) * noise
    return clip, (clip + error).clamp(0, 1)


def levels(*values: float, height: int = 8, width: int = 8) -> Tensor:
    """Frames of one grey each."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, height, width).contiguous()


def result(metric: Metric | MetricSet, ref: Tensor, rec: Tensor, chunk: int | None = None) -> VideoResult:
    """Of one video, given as a whole or in chunks."""
    metrics = MetricSet([metric]) if isinstance(metric, Metric) else metric
    for a, b in zip(ref.split(chunk or len(ref)), rec.split(chunk or len(rec)), strict=True):
        metrics.update(a, b)
    return metrics.result()


def value(metric: Metric | MetricSet, ref: Tensor, rec: Tensor, column: str | None = None) -> float | None:
    """Of the only column, or of the named one."""
    scores = result(metric, ref, rec).scores
    if column is None:
        (column,) = scores
    return scores[column].value


def lpips_package(net: str, trunks: Path, spatial: bool = False) -> nn.Module:
    """The lpips package's network with the trunk's weights."""
    theirs = _lpips_package(net, trunks)
    theirs.spatial = spatial
    return theirs


@cache
def _lpips_package(net: str, trunks: Path) -> nn.Module:
    import lpips

    with warnings.catch_warnings(), tiny.unfilled_weights():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    trunk = torch.load(trunks / TRUNKS[net][1], weights_only=True)
    theirs.net.load_state_dict({key: trunk[f"features.{key.split('.', 1)[1]}"] for key in theirs.net.state_dict()})
    return theirs.requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to the rows of [N, d] and [M, d], without covariances.

    Centred rows are factors A and B of the covariances A^T A and B^T B, and so are the triangles of their QR
    decompositions, which are not larger than the covariances.
    """
    gap = a.double().mean(0) - b.double().mean(0)
    a, b = (torch.linalg.qr((x.double() - x.double().mean(0)) / math.sqrt(len(x) - 1), "r").R for x in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(gap.square().sum() + a.square().sum() + b.square().sum() - 2 * cross), 0.0)

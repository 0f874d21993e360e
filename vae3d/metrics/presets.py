"""Presets: the formulas of other tools, to compare scores with theirs.

Scores of the same pair of videos differ by up to 6 dB between tools. A preset computes what its tool would compute on
the same frames; which frames, and at which size, is set on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vae3d.metrics.base import MetricError, Score
from vae3d.metrics.frame import PSNR_CAP

ONLY_EQUAL = 1e-45  # only equal fp32 frames have a smaller MSE


@dataclass(frozen=True)
class Preset:
    """The formulas of one tool.

    source: the tool. settings: metric -> arguments. lpips: which metric `lpips` means.
    average: how scores of videos are averaged. videos: mean over videos. frames: mean over all frames. batches: mean
    over batches of videos, sorted by name, for tools that average each batch first, so that a short last batch has the
    weight of a full one. pixels: mean over all frames, and PSNR from the MSE over all pixels.
    whole_batches: with `batches`, columns with one value per batch, instead of one per frame of a batch.
    """

    source: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lpips: str = "lpips_alex"
    average: str = "videos"
    whole_batches: tuple[str, ...] = ()


PRESETS: dict[str, Preset] = {
    "default": Preset("Open-Sora v1.2's formulas per frame; mean of videos"),
    "opensora12": Preset(
        "hpcaitech/Open-Sora v1.2 eval/vae",
        {"lpips_alex": {"spatial": True}, "flolpips": {"zero_flow": "nan"}},
        average="batches",
    ),
    "vidtok": Preset(
        "microsoft/VidTok scripts/inference_evaluate.py",
        {"psnr": {"eps": 1e-8}, "ssim": {"formula": "piq"}},
        lpips="lpips_vgg",
        average="frames",
    ),
    "tokenbench": Preset(
        "NVlabs/TokenBench token_bench/metrics_cli.py",
        {"psnr": {"root_eps": 2**-23 / 255, "pool": "video"}, "ssim": {"formula": "uniform"}},
        lpips="lpips_vgg",
    ),
    "torchmetrics": Preset(
        "torchmetrics with data_range=1",
        {"psnr": {"floor": ONLY_EQUAL}, "ssim": {"formula": "torchmetrics"}},
        average="pixels",
    ),
    "wfvae": Preset(
        "PKU-YuanGroup/WF-VAE scripts/eval.py",
        {"psnr": {"floor": ONLY_EQUAL}, "lpips_alex": {"spatial": True}},
        average="batches",
        whole_batches=("psnr", "lpips_alex"),
    ),
    "panorama": Preset("the default's formulas, for 360 degree panoramas"),
}


def average(preset: Preset, column: str, scores: Sequence[Score], batch_size: int = 1) -> float | None:
    """Mean of a column over a set of videos; None if no video has a value.

    scores: of the videos, sorted by name. Raises MetricError if the tool could not batch these videos.
    """
    values = [score.value for score in scores if score.value is not None]
    if not values:
        return None
    if preset.average == "videos" or not any(score.frames for score in scores):
        return fmean(values)
    if preset.average == "batches":
        return _batch_mean(preset, column, scores, batch_size)
    frames = [value for score in scores for value in score.frames]
    if preset.average == "pixels" and column == "psnr":
        return pooled_psnr(frames)
    return fmean(frames)


def pooled_psnr(frames: Sequence[float]) -> float:
    """PSNR in dB of the mean MSE of frames of one size, from their PSNRs. PSNR_CAP means equal frames."""
    mse = fmean(0.0 if value == PSNR_CAP else 10 ** (-value / 10) for value in frames)
    return -10 * math.log10(mse) if mse else PSNR_CAP


def require_shapes(preset: Preset, shapes: Sequence[tuple[int, int, int]], batch_size: int) -> None:
    """Raise MetricError if the preset's tool could not average videos of these shapes (frames, height, width).

    A batch needs equal shapes; a mean over pixels needs frames of one size.
    """
    batches = [shapes[start : start + batch_size] for start in range(0, len(shapes), batch_size)]
    if preset.average == "batches" and any(len(set(batch)) > 1 for batch in batches):
        raise MetricError(
            f"{preset.source} cannot batch videos of different lengths or sizes; choose --num_frames and --crop_size, "
            "or --batch_size 1"
        )
    if preset.average == "pixels" and len({shape[1:] for shape in shapes}) > 1:
        raise MetricError(f"{preset.source} averages over pixels, which needs videos of one size; choose --crop_size")


def _batch_mean(preset: Preset, column: str, scores: Sequence[Score], batch_size: int) -> float:
    means: list[float] = []
    require_shapes(preset, [(len(score.frames), 0, 0) for score in scores], batch_size)
    for start in range(0, len(scores), batch_size):
        batch = [score.frames for score in scores[start : start + batch_size]]
        if column not in preset.whole_batches:
            means += [fmean(at_time) for at_time in zip(*batch, strict=True)]
        elif column == "psnr" and any(value == PSNR_CAP for frames in batch for value in frames):
            means.append(PSNR_CAP)  # one equal frame makes the batch's mean infinite, which the tool caps at 100
        else:
            means.append(fmean([value for frames in batch for value in frames]))
    return fmean(means)

"""The list of metrics, and building them by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vae3d.metric_names import ALIAS
from vae3d.metrics import distribution, frame, panorama, temporal
from vae3d.metrics.base import Better, Metric, MetricError, MetricSet
from vae3d.metrics.networks import FLOWS, I3D, INCEPTION, LPIPS, Networks
from vae3d.metrics.presets import PRESETS
from vae3d.pretrained import weights


@dataclass(frozen=True)
class Entry:
    """How to build one metric. vae3d/metric_names.py has a line on it for users.

    files: for each network it needs, the alternative weight files. fixed: arguments of the class that define this
    metric.
    """

    kind: type[Metric]
    files: tuple[tuple[str, ...], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def build(self, networks: Networks, **settings: Any) -> Metric:
        args = (networks,) if self.files else ()
        return self.kind(*args, **self.fixed, **settings)


def _flolpips(motion: str) -> Entry:
    files = (LPIPS["alex"], FLOWS[motion])
    return Entry(temporal.FloLpips, files, {"motion": motion})


METRICS: dict[str, Entry] = {
    "psnr": Entry(frame.Psnr),
    "ssim": Entry(frame.Ssim),
    "ms_ssim": Entry(frame.MsSsim),
    "lpips_alex": Entry(frame.Lpips, (LPIPS["alex"],)),
    "lpips_vgg": Entry(frame.LpipsVgg, (LPIPS["vgg"],)),
    "sharpness": Entry(frame.Sharpness),
    "alpha_psnr": Entry(frame.AlphaPsnr),
    "alpha_ssim": Entry(frame.AlphaSsim),
    "flolpips": _flolpips("pwc"),
    "flolpips_raft_large": _flolpips("raft_large"),
    "flolpips_raft_small": _flolpips("raft_small"),
    "flicker": Entry(temporal.Flicker),
    "tpsnr": Entry(temporal.TPsnr),
    "tof": Entry(temporal.TOf),
    "tlp": Entry(temporal.TLpips, (LPIPS["alex"],)),
    "warping_error": Entry(temporal.WarpingError, (FLOWS["raft_large"],)),
    "ws_psnr": Entry(panorama.WsPsnr),
    "ws_ssim": Entry(panorama.WsSsim),
    "seam": Entry(panorama.Seam),
    "polar": Entry(panorama.Polar),
    "cube": Entry(panorama.Cube),
    "cube_lpips": Entry(panorama.CubeLpips, (LPIPS["alex"],)),
    "rfid": Entry(distribution.Rfid, (INCEPTION,)),
    "rfvd": Entry(distribution.Rfvd, (I3D,)),
}


def resolve(names: Sequence[str], preset: str = "default") -> list[str]:
    """Keys of METRICS for names that may include `lpips`. Raises MetricError for an unknown metric or preset."""
    if preset not in PRESETS:
        raise MetricError(f"no preset is called {preset}; there are {', '.join(PRESETS)}")
    resolved = list(dict.fromkeys(PRESETS[preset].lpips if name == ALIAS else name for name in names))
    if unknown := [name for name in resolved if name not in METRICS]:
        raise MetricError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}, {ALIAS}")
    return resolved


def columns_of(names: Sequence[str]) -> dict[str, Better]:
    """Column -> Better, for metrics that are not built yet."""
    # A metric whose columns depend on its settings has one column, its own name, and lower is better.
    kinds = {name: getattr(METRICS[name].kind, "columns", {name: False}) for name in names}
    return {column: better for columns in kinds.values() for column, better in columns.items()}


def find_files(names: Sequence[str]) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """(metric -> its weight files, metric -> why files are missing)."""
    files: dict[str, list[Path]] = {}
    missing: dict[str, list[str]] = {}
    for name in names:
        for alternatives in METRICS[name].files:
            try:
                files.setdefault(name, []).append(weights.find(*alternatives))
            except weights.WeightsMissing as error:
                missing.setdefault(name, []).append(str(error))
    return files, missing


def build_metrics(
    names: Sequence[str],
    device: torch.device | str = "cpu",
    *,
    preset: str = "default",
    on_missing: str = "stop",
    pwc_warp: str = "flolpips",
    settings: dict[str, dict[str, Any]] | None = None,
    pixel_range: str = "unit",
) -> MetricSet:
    """Metrics by name, their weights loaded.

    preset: key of PRESETS. on_missing: without weights on this machine, `skip` leaves a metric out (see
    MetricSet.skipped) if another is left, `stop` raises. pwc_warp: see pretrained.pwcnet. settings: metric -> arguments
    beyond the preset's, such as {"rfid": {"stride": 4}}. pixel_range: see MetricSet.
    Raises MetricError for an unknown name, WeightsMissing with the names of all missing files.
    """
    names = resolve(names, preset)
    files, missing = find_files(names)
    available = [name for name in names if name not in missing]
    if missing and (on_missing != "skip" or not available):
        reasons = "\n".join(dict.fromkeys(reason for reasons in missing.values() for reason in reasons))
        hint = f"; without them: {' '.join(available)}" if available else ""
        raise weights.WeightsMissing(f"weights of {', '.join(missing)} are missing{hint}\n{reasons}")
    networks, settings = Networks(device, pwc_warp), settings or {}
    metrics = []
    for name in available:
        arguments = {**PRESETS[preset].settings.get(name, {}), **settings.get(name, {})}
        metrics.append(METRICS[name].build(networks, **arguments))
    found = {name: files[name] for name in available if name in files}
    skipped = {name: "; ".join(reason.splitlines()[0] for reason in reasons) for name, reasons in missing.items()}
    return MetricSet(metrics, found, skipped, pixel_range)

"""Which metrics there are, and how they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vae3d.metrics import distribution, frame, panorama, temporal
from vae3d.metrics.base import Better, Metric, MetricError, MetricSet
from vae3d.metrics.networks import FLOWS, I3D, INCEPTION, LPIPS, Networks
from vae3d.metrics.presets import PRESETS
from vae3d.pretrained import weights


@dataclass(frozen=True)
class Entry:
    """summary: a line for users. files: for each network that the metric needs, the names of the files it may come
    from. fixed: arguments that make this metric of its class."""

    summary: str
    kind: type[Metric]
    files: tuple[tuple[str, ...], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def build(self, networks: Networks, **settings: Any) -> Metric:
        shared = (networks,) if self.files else ()
        return self.kind(*shared, **self.fixed, **settings)


def _flolpips(motion: str, network: str) -> Entry:
    files = (LPIPS["alex"], FLOWS[motion])
    return Entry(f"LPIPS weighted by errors of motion, {network}", temporal.FloLpips, files, {"motion": motion})


METRICS: dict[str, Entry] = {
    "psnr": Entry("PSNR in dB, of frames and of whole videos", frame.Psnr),
    "ssim": Entry("structural similarity", frame.Ssim),
    "ms_ssim": Entry("SSIM on five scales", frame.MsSsim),
    "lpips_alex": Entry("perceptual distance, AlexNet", frame.Lpips, (LPIPS["alex"],)),
    "lpips_vgg": Entry("perceptual distance, VGG", frame.LpipsVgg, (LPIPS["vgg"],)),
    "sharpness": Entry("gradient energy over the original's", frame.Sharpness),
    "flolpips": _flolpips("pwc", "PWC-Net"),
    "flolpips_raft_large": _flolpips("raft_large", "RAFT"),
    "flolpips_raft_small": _flolpips("raft_small", "small RAFT"),
    "flicker": Entry("change from frame to frame, and its excess", temporal.Flicker),
    "tpsnr": Entry("PSNR in dB of the change from frame to frame", temporal.TPsnr),
    "tof": Entry("error of Farneback's optical flow in pixels", temporal.TOf),
    "tlp": Entry("error of the perceptual change from frame to frame", temporal.TLpips, (LPIPS["alex"],)),
    "warping_error": Entry("error along the original's motion, RAFT", temporal.WarpingError, (FLOWS["raft_large"],)),
    "ws_psnr": Entry("panoramas: PSNR weighted by latitude", panorama.WsPsnr),
    "ws_ssim": Entry("panoramas: SSIM weighted by latitude", panorama.WsSsim),
    "seam": Entry("panoramas: errors where left and right edge meet", panorama.Seam),
    "polar": Entry("panoramas: PSNR of bands of latitude", panorama.Polar),
    "cube": Entry("panoramas: PSNR of the views ahead, back, left, right, up, down", panorama.Cube),
    "cube_lpips": Entry("panoramas: LPIPS of these views, AlexNet", panorama.CubeLpips, (LPIPS["alex"],)),
    "rfid": Entry("Fréchet distance of all frames, Inception", distribution.Rfid, (INCEPTION,)),
    "rfvd": Entry("Fréchet distance of all videos, I3D", distribution.Rfvd, (I3D,)),
}
ALIAS = "lpips"  # of the net that a preset uses


def resolve(names: Sequence[str], preset: str = "default") -> list[str]:
    """Keys of METRICS. Raises MetricError for a metric or preset that does not exist."""
    if preset not in PRESETS:
        raise MetricError(f"no preset is called {preset}; there are {', '.join(PRESETS)}")
    wanted = list(dict.fromkeys(PRESETS[preset].lpips if name == ALIAS else name for name in names))
    if unknown := [name for name in wanted if name not in METRICS]:
        raise MetricError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}, {ALIAS}")
    return wanted


def columns_of(names: Sequence[str]) -> dict[str, Better]:
    """The columns of metrics that are not built yet, and what is better."""
    # Those whose columns depend on their settings have one, of their own name, and it is a distance.
    kinds = {name: getattr(METRICS[name].kind, "columns", {name: False}) for name in names}
    return {column: better for columns in kinds.values() for column, better in columns.items()}


def find_files(names: Sequence[str]) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """Where the weights of each metric are, and what other metrics miss."""
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

    preset: whose formulas, a key of PRESETS. on_missing: `skip` leaves out metrics whose weights are not on this
    machine (`MetricSet.absent` says which), `stop` raises. pwc_warp: see features.pwcnet. settings: metric ->
    arguments besides the preset's, such as {"rfid": {"stride": 4}}. pixel_range: see MetricSet.
    Raises MetricError for an unknown name, WeightsMissing that names all files that are not there.
    """
    wanted = resolve(names, preset)
    files, missing = find_files(wanted)
    if missing and on_missing != "skip":
        rest = [name for name in wanted if name not in missing]
        reasons = "\n".join(dict.fromkeys(reason for reasons in missing.values() for reason in reasons))
        way_out = f"; without them: {' '.join(rest)}" if rest else ""
        raise weights.WeightsMissing(f"weights of {', '.join(missing)} are missing{way_out}\n{reasons}")
    networks, more = Networks(device, pwc_warp), settings or {}
    present = [name for name in wanted if name not in missing]
    arguments = {name: {**PRESETS[preset].settings.get(name, {}), **more.get(name, {})} for name in present}
    metrics = [METRICS[name].build(networks, **arguments[name]) for name in present]
    found = {name: files[name] for name in present if name in files}
    return MetricSet(metrics, found, _one_line(missing), pixel_range)


def _one_line(missing: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: "; ".join(reason.splitlines()[0] for reason in reasons) for name, reasons in missing.items()}

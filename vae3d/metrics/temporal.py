"""Metrics of motion and flicker: changes from frame to frame, which PSNR and SSIM do not measure.

Each has one value per pair of neighbouring frames (t, t + 1); a single frame has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.metrics.base import Chunk, SeriesMetric
from vae3d.metrics.frame import decibels
from vae3d.metrics.networks import Networks, batch_frames, flow, lpips_features
from vae3d.optical_flow import grey_frames, warp


class PairMetric(SeriesMetric):
    pairs = True


class Flicker(PairMetric):
    """Mean absolute change of a pixel to the next frame, in [0, 1] units (CogVideoX report, arXiv 2408.06072).

    Of the original, of the reconstruction, and the difference. The first two include motion; the excess is flicker
    that the model added.
    """

    name = "flicker"
    columns = {"flicker_ori": None, "flicker_rec": None, "flicker_excess": None}

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ori, rec = ((x[1:] - x[:-1]).double().abs().mean((1, 2, 3)) for x in (chunk.ref, chunk.rec))
        return {"flicker_ori": ori, "flicker_rec": rec, "flicker_excess": rec - ori}


class TPsnr(PairMetric):
    """PSNR in dB (at most 100) of the change from frame to frame: ignores constant errors, measures flickering ones."""

    name = "tpsnr"
    columns = {"tpsnr": True}

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        error = (chunk.rec - chunk.ref).double()
        mse = (error[1:] - error[:-1]).square().mean((1, 2, 3))
        return {"tpsnr": decibels(mse)}


class TOf(PairMetric):
    """tOF: mean length in pixels of the difference of Farneback optical flows (Chu et al., TecoGAN, `metrics.py`).

    Over all frames and pixels; TecoGAN excludes two frames at each end and a border.
    """

    name = "tof"
    columns = {"tof": False}
    min_size = 16

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = _farneback(chunk.ref), _farneback(chunk.rec)
        lengths = [np.linalg.norm(a - b, axis=-1).mean(dtype=np.float64) for a, b in zip(ref, rec, strict=True)]
        return {"tof": torch.tensor(lengths, dtype=torch.float32)}


def _farneback(frames: Tensor) -> Iterator[np.ndarray]:
    """The flow [H, W, 2] from each frame to the next."""
    import cv2

    for first, second in pairwise(grey_frames(frames)):
        yield cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)


class TLpips(PairMetric):
    """tLP of TecoGAN: 100 |LPIPS(x_t, x_t+1) - LPIPS(y_t, y_t+1)| with AlexNet."""

    name = "tlp"
    columns = {"tlp": False}
    min_size = 31

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.network = networks.lpips("alex")

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        ref, rec = (self._change(chunk, which) for which in ("ref", "rec"))
        return {"tlp": 100 * (ref - rec).abs()}

    def _change(self, chunk: Chunk, which: str) -> Tensor:
        features = lpips_features(chunk, self.network, which)
        maps = self.network.layer_maps([f[:-1] for f in features], [f[1:] for f in features])
        return sum(m.mean((2, 3)) for m in maps)[:, 0]


class WarpingError(PairMetric):
    """Mean squared difference between frame t and frame t + 1 warped back along the original's flow, without occluded
    pixels (Lai et al. 2018, fast_blind_video_consistency); of the reconstruction and of the original.

    Flow from torchvision's raft_large. Occlusion by forward-backward consistency and at motion boundaries (Ruder et
    al. 2016). As published, pixels that leave the frame count and are compared with its edge, and a pair that is
    occluded everywhere, as at a cut, scores 0 (counted in hidden_frames).
    """

    name = "warping_error"
    columns = {"warping_error": False, "warping_error_ori": None}
    count_columns = ("warping_error_hidden_frames",)

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = networks
        networks.flow("raft_large")

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        forward = flow(chunk, self.networks, "raft_large", "ref")
        net, step = self.networks.flow("raft_large"), batch_frames(chunk.ref)
        later, earlier = chunk.ref[1:].split(step), chunk.ref[:-1].split(step)
        backward = torch.cat([net.flow(a, b) for a, b in zip(later, earlier, strict=True)])
        visible = ~occluded(forward, backward)
        self.count(self.count_columns[0], ~visible.flatten(1).any(1))
        return {
            "warping_error": _masked_error(chunk.rec, forward, visible),
            "warping_error_ori": _masked_error(chunk.ref, forward, visible),
        }


def occluded(forward: Tensor, backward: Tensor) -> Tensor:
    """[N, 1, H, W] True where a pixel of the first frame is hidden in the second, or its flow is unreliable.

    forward, backward: flow from the first frame to the second and back, [N, 2, H, W].
    """
    returned = warp(backward, forward)
    length = forward.square().sum(1, keepdim=True)
    mismatch = (returned + forward).square().sum(1, keepdim=True)
    lost = mismatch > 0.01 * (returned.square().sum(1, keepdim=True) + length) + 0.5
    across = F.pad(forward[..., :-1] - forward[..., 1:], (0, 1)).square()
    down = F.pad(forward[..., :-1, :] - forward[..., 1:, :], (0, 0, 0, 1)).square()
    boundary = (across + down).sum(1, keepdim=True) > 0.01 * length + 0.002
    return lost | boundary


def _masked_error(frames: Tensor, motion: Tensor, visible: Tensor) -> Tensor:
    """[T-1] mean squared warping error over visible pixels; 0 if none is visible."""
    error = (warp(frames[1:], motion) - frames[:-1]).double().square() * visible
    return error.sum((1, 2, 3)) / (visible.sum((1, 2, 3)) * frames.shape[1]).clamp_min(1)


class FloLpips(PairMetric):
    """LPIPS (AlexNet) of frame t, weighted per pixel by the difference of the flows of original and reconstruction
    (Danier et al., arXiv 2207.08119; danier97/flolpips), on RGB as published.

    motion: flow network: pwc (as published), raft_large or raft_small. zero_flow: if the flows are equal everywhere,
    uniform weights (counted in uniform_frames), or nan as in the published code.
    """

    options = ("zero_flow", "pwc_warp")

    def __init__(self, networks: Networks, motion: str = "pwc", zero_flow: str = "uniform") -> None:
        super().__init__()
        self.name = "flolpips" if motion == "pwc" else f"flolpips_{motion}"
        self.columns = {self.name: False}
        self.count_columns = (f"{self.name}_uniform_frames",)
        self.min_size = 31
        self.motion, self.zero_flow, self.networks = motion, zero_flow, networks
        self.pwc_warp = networks.pwc_warp if motion == "pwc" else None
        self.network = networks.lpips("alex")
        networks.flow(motion)

    def measure(self, chunk: Chunk) -> dict[str, Tensor]:
        flows = [flow(chunk, self.networks, self.motion, which) for which in ("ref", "rec")]
        features = [[f[:-1] for f in lpips_features(chunk, self.network, which)] for which in ("ref", "rec")]
        maps = self.network.layer_maps(*features)
        return {self.name: self._weighted(maps, flows[0] - flows[1])}

    def _weighted(self, maps: list[Tensor], difference: Tensor) -> Tensor:
        """[T-1]: sum over layers of the weighted mean of a layer's map [T-1, 1, h, w]. difference: of the flows."""
        total, uniform = 0, torch.zeros(len(difference), dtype=torch.bool, device=difference.device)
        for values in maps:
            small = F.interpolate(difference, values.shape[-2:], mode="bilinear", align_corners=False)
            weight = small.square().sum(1, keepdim=True).sqrt()
            mass = weight.sum((1, 2, 3), keepdim=True)
            if self.zero_flow == "uniform":
                none = mass < 1e-12
                uniform |= none.flatten()
                weight, mass = torch.where(none, 1.0, weight), torch.where(none, float(weight[0].numel()), mass)
            total = total + (values * weight / mass).sum((1, 2, 3))
        self.count(self.count_columns[0], uniform)
        return total

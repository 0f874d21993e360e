"""Losses against flicker: how the reconstruction changes from frame to frame. They do not apply to single images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.arguments import Count, Range
from vae3d.losses.objective import ErrorMap, NetworkTerm, PixelTerm, Term, numel_per_frame
from vae3d.losses.pixel_weights import mean_one
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.frames import clips_of, frames_of
from vae3d.optical_flow import dis_flow, warp
from vae3d.pixels import as_rgb
from vae3d.pretrained.raft import Raft
from vae3d.types import ClipBatch, Reconstruction


class PairTerm(PixelTerm):
    """Base of terms on pairs of neighbouring frames. `errors` is [B, C, T - 1, H, W], without the clip's weight."""

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap | None:
        if batch.video.shape[2] == 1:
            return None
        errors, numel = super().__call__(batch, out)
        if (weight := pair_weight(batch)) is not None:
            errors = errors * weight
        return ErrorMap(errors.mean((1, 3, 4), keepdim=True), numel)


def pair_weight(batch: ClipBatch) -> Tensor | None:
    """The clip's weight for pairs of frames, of mean 1: that of the second frame, and 0 where either is invalid."""
    if batch.weight is None or batch.valid is None:
        return batch.weight
    return mean_one(batch.weight[:, :, 1:] * batch.valid[:, :, :-1])


class TemporalDifference(PairTerm):
    """|d(reconstruction) - d(clip)|, where d is the change to the next frame.

    V-RAE/V-RAE `recon_training/losses.py: temporal_difference_loss`, on pixels in [0, 1], where it is half as large.
    PV-VAE (arXiv 2605.02134) reconstructs the same differences. Errors that stay the same from frame to frame cost
    nothing, so use it beside L1.
    """

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        return (rec - batch.video).diff(dim=2).abs()


@dataclass(kw_only=True, eq=False)
class WarpedConsistency(NetworkTerm, PairTerm):
    """|y_t - warp(y_t-1)| M of a reconstruction y, along the clip's optical flow from frame t to t - 1.

    M = exp(-alpha s^2), where s is the sum over channels of x_t - warp(x_t-1) of the clip x in [0, 1]: small where the
    flow is wrong or a pixel was hidden. Lai et al., "Learning Blind Video Temporal Consistency", equation 4;
    phoenix104104/fast_blind_video_consistency `train.py`, which has the sum over channels inside the square, adds up
    the pairs of a clip, has pixels in [0, 1] (where the loss is half as large), and stops the gradient of y_t-1. Here
    both frames have one. The clip itself does not score 0, and a blurred reconstruction scores less than it: use this
    beside L1, at a low weight.

    flow: dis (OpenCV's dense inverse search; no weights; on the CPU, some milliseconds per pair), raft_large or
    raft_small (torchvision's networks; path: the file, by default found by its name).
    Raises ValueError for invalid arguments; for dis, of frames below 12 pixels.
    """

    flow: Literal["dis", "raft_large", "raft_small"] = "dis"
    alpha: Annotated[float, Range(0, 1e6)] = 50.0
    path: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow != "dis":
            self.network = Raft(self.flow)

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        clips = len(rec)
        with torch.no_grad():
            unit = (as_rgb(batch.video.float()) / 2 + 0.5).clamp(0, 1)
            first, second = (frames_of(x) for x in (unit[:, :, :-1], unit[:, :, 1:]))
            motion = dis_flow(second, first) if self.flow == "dis" else self._raft_flow(second, first)
            visible = torch.exp(-self.alpha * (second - warp(first, motion)).sum(1, keepdim=True).square())
            if batch.valid is not None:
                valid = frames_of(batch.valid[:, :, :-1].to(unit.dtype))
                visible = visible * (warp(valid, motion) > 1 - 1e-3)
        moved = warp(frames_of(rec[:, :, :-1]), motion)
        return clips_of((frames_of(rec[:, :, 1:]) - moved).abs() * visible, clips)

    def _raft_flow(self, first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(first.split(1), second.split(1), strict=True)
        return torch.cat([self.network.flow(a, b) for a, b in pairs])


@dataclass(kw_only=True, eq=False)
class FlowLoss(NetworkTerm, PairTerm):
    """|flow of the reconstruction - flow of the clip| in pixels, of RAFT, forwards and backwards.

    nvidia-cosmos/cosmos-predict1 `tokenizer/training/losses/continuous.py: FlowLoss`, there in bf16, at weight 0.01 in
    the last steps. The gradient passes through RAFT, of some 20 times the cost of a small decoder.
    scale: frames are shrunk by this factor for RAFT, and the flow is enlarged. RAFT pads them to 128 pixels at least.
    net: raft_large, as published, or raft_small. path: its file, by default found by its name. frame_batch: pairs at a
    time. gradient_checkpointing: recompute RAFT in backward. Raises ValueError for invalid arguments.
    """

    net: Literal["raft_large", "raft_small"] = "raft_large"
    path: str | Path | None = None
    scale: Annotated[int, Range(1, 8)] = 2
    frame_batch: Count = 1
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.network = Raft(self.net)

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        with torch.no_grad():
            target = self._flows(as_rgb(batch.video.float()))
        return (self._flows(as_rgb(rec)) - target).abs()

    def _flows(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> [B, 4, T - 1, H, W]: forwards and backwards, in pixels of the clip."""
        size = video.shape[-2:]
        small = [max(1, side // self.scale) for side in size]
        frames = F.interpolate(frames_of(video) / 2 + 0.5, small, mode="bilinear")
        frames = frames.unflatten(0, (len(video), -1))
        first, second = (x.flatten(0, 1) for x in (frames[:, :-1], frames[:, 1:]))
        recompute = self.gradient_checkpointing and video.requires_grad
        flows = []
        for a, b in zip(first.split(self.frame_batch), second.split(self.frame_batch), strict=True):
            directions = [maybe_checkpoint(self.network.flow, *pair, enabled=recompute) for pair in ((a, b), (b, a))]
            flows.append(torch.cat(directions, 1))
        enlarged = F.interpolate(torch.cat(flows), size, mode="bilinear")
        return clips_of(self.scale * enlarged, len(video))


@dataclass(kw_only=True, eq=False)
class WindowConsistency(Term):
    """|difference| of the frames that two neighbouring windows of a clip share, each window coded on its own.

    nvidia-cosmos/cosmos-predict1 `tokenizer/training/losses/continuous.py: VideoConsistencyLoss`, at weight 0.01 in the
    last steps; there the windows are the training batch, here they are coded beside the clip, from the posterior's
    mode, which costs (number of windows * num_frames / T) more forward passes. It is 0 for per-frame models.
    num_frames: of a window. step: frames from one window's start to the next; windows share num_frames - step.
    latents: also compare latents, as published: those of `step` * (latents of a window) / num_frames, rounded down,
    later, times elements of a clip per latent element. A causal encoder codes a window's first frame alone, so that the
    first of these latents can never agree.
    Raises ValueError for invalid arguments, and for clips of more than one frame that do not hold two windows.
    """

    num_frames: Annotated[int, Range(2, 10_000)] = 9
    step: Count = 4
    latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step >= self.num_frames:
            raise ValueError(
                f"step is {self.step}, num_frames {self.num_frames}; windows that overlap need a lower step"
            )

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap | None:
        video = batch.video
        if video.shape[2] == 1:
            return None
        if video.shape[2] < self.num_frames + self.step:
            raise ValueError(
                f"a clip of {video.shape[2]} frames does not hold two windows of {self.num_frames} frames, {self.step} "
                f"apart; use clips of {self.num_frames + self.step}, or lower num_frames"
            )
        if out.reconstruct is None:
            raise ValueError("window consistency needs Reconstruction.reconstruct; see models.interface.attach_decoder")
        windows = self._windows(video)
        again = out.reconstruct(windows.transpose(1, 2).flatten(0, 1))  # [B * M, C, n, H, W]
        difference = self._overlap(again.video.float(), len(video), self.step)
        if batch.weight is not None:
            weight = batch.weight.expand(len(video), 1, video.shape[2], -1, -1)
            weight = self._windows(weight)[:, :, 1:, : -self.step]
            difference = difference * mean_one(weight.transpose(1, 2))
        errors = difference.mean((1, 2, 3, 4, 5))
        if self.latents:
            errors = errors + self._latent_errors(again.z.float(), windows)
        return ErrorMap(errors.view(-1, 1, 1, 1, 1), numel_per_frame(video))

    def _windows(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, M, num_frames, H, W]."""
        return video.unfold(2, self.num_frames, self.step).movedim(-1, 3)

    def _overlap(self, x: Tensor, clips: int, step: int) -> Tensor:
        """|difference| of windows [B * M, C, n, H, W] and the next ones: [B, M - 1, C, n - step, H, W]."""
        x = x.unflatten(0, (clips, -1))
        return (x[:, :-1, :, step:] - x[:, 1:, :, :-step]).abs()

    def _latent_errors(self, z: Tensor, windows: Tensor) -> Tensor:
        """[B], in units of a pixel's error."""
        rate = self.num_frames // z.shape[2]
        if (step := self.step // rate) == 0:
            raise ValueError(
                f"step is {self.step}, less than the {rate} frames of a latent; raise it, or leave out `latents`"
            )
        area = (windows.shape[-2] // z.shape[-2]) * (windows.shape[-1] // z.shape[-1])
        difference = self._overlap(z, len(windows), step).mean((1, 2, 3, 4, 5))
        return difference * (windows.shape[1] * rate * area / z.shape[1])

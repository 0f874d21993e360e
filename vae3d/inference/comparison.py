"""Compare a student with its teacher: every encoder with every decoder, on the same frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.data.batches.clips import to_video
from vae3d.data.media import MediaError, Size
from vae3d.data.table.segments import WHOLE, Bounds
from vae3d.errors import UserError
from vae3d.inference.cost import measure_cost, timed
from vae3d.inference.reconstruct import Reconstructor, identifier, overflow_hint
from vae3d.metrics import MetricSet, Score, VideoResult
from vae3d.metrics.base import frame_curves, frame_pairs
from vae3d.metrics.frame import decibel
from vae3d.models.interface import convert_latents, latent_space, nearest_frames, share_frames
from vae3d.pixels import (
    NotFiniteError,
    Quantized,
    as_unit,
    displayable,
    no_waiting_checks,
    over_grey,
    quantize_unchecked,
)
from vae3d.precision import autocast
from vae3d.report.page import clip_id, encode_clip, has_clip, write_clip
from vae3d.text import plural
from vae3d.transfer import on_host

PAIRS = list(product(("student", "teacher"), repeat=2))  # (whose encoder, whose decoder)
MAX_FRAMES = 33  # per file, unless num_frames is set: the networks code them in one piece
MIN_GAIN = 1.0  # dB above frames of one colour; a reconstruction with less is degenerate


@dataclass(frozen=True)
class Network:
    """The student or the teacher.

    path: its checkpoint. precision: fp32, bf16 or fp16; the student's is that of `autocast` over fp32 weights, the
    teacher's that of its weights.
    """

    model: nn.Module
    path: str
    precision: str
    autocast: str = "fp32"

    def encode(self, video: Tensor) -> Tensor:
        """Video [1, 3, T, H, W] in [-1, 1] -> mode of the posterior, fp32."""
        with autocast(video.device, self.autocast):
            return self.model.encode(self._cast(video)).mode().float()

    def decode(self, z: Tensor, frames: int, size: Size) -> Tensor:
        """Latents -> video [1, 3, T, H, W], unclamped, without the padding of the sides."""
        with autocast(z.device, self.autocast):
            return self.model.decode(self._cast(z), frames)[..., : size[0], : size[1]]

    def cost(self, video: Tensor) -> dict[str, Any]:
        """measure_cost, and the seconds to the first decoded frame: from the first latent, or, if the network does not
        stream, from all latents."""
        z, frames = self.encode(video), video.shape[2]
        streams = hasattr(self.model, "decode_chunk")

        def first_frame() -> Tensor:
            with autocast(z.device, self.autocast):
                if streams:
                    return self.model.decode_chunk(self._cast(z[:, :, :1]), None)[0]
                return self.model.decode(self._cast(z), frames)

        latents = "1 latent" if streams else f"{plural(z.shape[2], 'latent')}, the whole clip; it does not stream"
        return measure_cost(self.model, self._cast(video), self.autocast) | {
            "precision": self.precision,
            "first_frame_seconds": timed(first_frame, video.device)[0],
            "first_frame_from": latents,
        }

    def metadata(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "network": type(self.model).__name__,
            "variant": getattr(self.model, "variant", None),
            "latent": latent_space(self.model),
            "precision": self.precision,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).dtype)


@dataclass
class Comparer:
    """Compares student and teacher file by file.

    Codes the first frames in one piece, by the mode of the latents, with every pair of encoder and decoder; scores them
    on 8-bit pixels; writes a clip of each file for the page in <save_dir>_compare.

    networks: student, which is the reconstructor's model, and teacher. metrics: for one pair at a time. measures:
    whether this process is to measure the cost of both networks, on its next file.
    Raises UserError if pixels differ in channels, or latents in channels or strides, or if the reconstructor's
    num_frames does not fit both networks.
    """

    reconstructor: Reconstructor
    networks: dict[str, Network]
    metrics: MetricSet
    measures: bool

    def __post_init__(self) -> None:
        student, teacher = self.networks["student"], self.networks["teacher"]
        if teacher.model.pixel_channels != student.model.pixel_channels:
            raise UserError(
                f"teacher.path={teacher.path} takes {plural(teacher.model.pixel_channels, 'channel')} of pixels and "
                f"the checkpoint's model {student.model.pixel_channels}; both need the same videos"
            )
        for what, name in (("latent channels", "channels"), ("pixels", "space_stride"), ("frames", "time_stride")):
            theirs, ours = (getattr(network.model.spec, name) for network in (teacher, student))
            if theirs != ours:
                unit = what if name == "channels" else f"{what} to a latent"
                raise UserError(
                    f"teacher.path={teacher.path} has {theirs} {unit} and the checkpoint's model {ours}; "
                    "both need the same latent space"
                )
        wanted = self.reconstructor.config.num_frames
        if wanted is not None and not self.takes(wanted):
            raise UserError(
                f"num_frames={wanted}: student and teacher do not both code these without padding; nearest are "
                f"{', '.join(map(str, self.nearest(wanted)))}"
            )

    def takes(self, frames: int) -> bool:
        """Whether both code that many frames without padding, to the same number of latents."""
        student, teacher = self.networks["student"].model, self.networks["teacher"].model
        return share_frames(student, teacher, frames, *[student.spec.space_stride] * 2)

    def nearest(self, frames: int) -> list[int]:
        """Up to four frame counts that both take, nearest to `frames`."""
        return nearest_frames(frames, self.takes)

    @torch.inference_mode()
    def file(self, source: str, row: int, bounds: Bounds = WHOLE) -> dict[str, Any]:
        """Compare one file; returns its entry of comparison.json as `file`, and as `cost` that of both networks, if it
        was measured on this file, or None.

        Raises MediaError if it cannot be read or is too short, MetricError if it cannot be scored.
        """
        frames, fps, given = self.reconstructor.read_head(source, bounds, lambda there: self._count(source, there))
        video = to_video(frames, self.reconstructor.device)
        latents, coded = self._coded(source, video)
        name = identifier(row, source)
        cost = None
        if self.measures:
            cost = {"file": name} | {whose: network.cost(video) for whose, network in self.networks.items()}
            self.measures = False
        results = {pair_name(pair): self._score(frames, rec) for pair, rec in coded.items()}
        recs = {pair_name(pair): [displayable(rec)] for pair, rec in coded.items()}
        curves = {pair: frame_curves(result.scores) for pair, result in results.items()}
        clip = encode_clip([displayable(frames)], recs, fps)
        write_clip(self.reconstructor.folder("compare"), clip_id(name), clip, curves)
        entry = {
            "file": name,
            "source": source,
            "frames": len(frames),
            "frames_reconstructed": given,
            "height": frames.shape[1],
            "width": frames.shape[2],
            "pairs": {pair: {c: s.value for c, s in result.scores.items()} for pair, result in results.items()},
            "baseline": constant_frame_psnr(frames),
            "latents": latents,
        }
        return {"file": entry, "cost": cost}

    def _count(self, source: str, frames: int) -> int:
        if self.reconstructor.config.num_frames is not None:
            return frames
        fitting = [n for n in range(1, min(frames, MAX_FRAMES) + 1) if self.takes(n)]
        if not fitting:
            valid = ", ".join(map(str, self.nearest(frames)))
            raise MediaError(
                source, f"has {plural(frames, 'frame')}, too few to compare; student and teacher take {valid}"
            )
        return fitting[-1]

    def _coded(self, source: str, video: Tensor) -> tuple[dict[str, Any], dict[tuple[str, str], np.ndarray]]:
        """Statistics of both latents, and the 8-bit frames of every pair."""
        frames, *size = video.shape[2:]
        try:
            z = {whose: network.encode(video) for whose, network in self.networks.items()}
        except ValueError as error:
            raise MediaError(source, f"cannot be compared at {size[0]}x{size[1]}: {error}") from error
        coded, pending = {}, deque(PAIRS)

        @torch.inference_mode()
        def decode() -> Iterator[Quantized]:
            for encoder, decoder in PAIRS:
                latents = convert_latents(z[encoder], self.networks[encoder].model, self.networks[decoder].model)
                with no_waiting_checks(video.device):
                    rec = self.networks[decoder].decode(latents, frames, tuple(size))
                yield quantize_unchecked(rec[0])

        try:
            for quantized in on_host(decode(), video.device):
                coded[pending[0]] = quantized.numpy().copy()
                pending.popleft()
        except NotFiniteError as error:
            encoder, decoder = pending[0]
            hint = overflow_hint(self.networks[decoder].precision)
            pair = f"the {decoder}'s decoder, given the {encoder}'s latents"
            raise MediaError(source, f"{pair}: {error.reason}; {hint}") from None
        teachers = convert_latents(z["teacher"], self.networks["teacher"].model, self.networks["student"].model)
        return compare_latents(z["student"], teachers), coded

    def _score(self, ref: np.ndarray, rec: np.ndarray) -> VideoResult:
        """The metrics', and mse."""
        device = self.reconstructor.device
        result = self.metrics.score(frame_pairs(ref, rec, device))
        errors = (colours(a) - colours(b) for a, b in frame_pairs(ref, rec, device))
        squares = sum(float(error.square().sum(dtype=torch.float64)) for error in errors)
        return VideoResult({"mse": Score(squares / ref[..., :3].size), **result.scores})

    def has_clip(self, name: str) -> bool:
        """Whether the clip of a file is on disk."""
        return has_clip(self.reconstructor.folder("compare"), clip_id(name))


def pair_name(pair: tuple[str, str]) -> str:
    return " -> ".join(pair)


def colours(frames: Tensor) -> Tensor:
    """Frames [T, 3, H, W], or RGBA [T, 4, H, W], in [0, 1] as metrics of colours see them, [T, 3, H, W]."""
    return over_grey(frames) if frames.shape[1] == 4 else frames


def constant_frame_psnr(frames: np.ndarray) -> dict[str, float]:
    """PSNR in dB (pooled MSE) of black frames and of frames of the clip's mean colour.

    frames: [T, H, W, 3 or 4] uint8.
    """

    def pixels() -> Iterator[Tensor]:
        return (colours(as_unit(frame[None])).double() for frame in frames)

    colour = sum(frame.mean((0, 2, 3)) for frame in pixels()) / len(frames)
    return {
        "black": decibel(fmean(float(frame.square().mean()) for frame in pixels())),
        "mean_colour": decibel(fmean(float((frame - colour[:, None, None]).square().mean()) for frame in pixels())),
    }


def compare_latents(student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """MSE and cosine of latents [1, C, t, h, w] of one latent space; mean and standard deviation of every channel."""

    def channels(z: Tensor) -> dict[str, list[float]]:
        values = z[0].flatten(1)
        return {"mean": values.mean(1).tolist(), "std": values.std(1, correction=0).tolist()}

    a, b = student.double(), teacher.double()
    return {
        "mse": float((a - b).square().mean()),
        "cosine": float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)),
        "student": channels(a),
        "teacher": channels(b),
    }

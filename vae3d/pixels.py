"""Check the inputs of models and metrics, and convert pixels to 8 bits, here only.

Models take video [B, 3, T, H, W] in [-1, 1], metrics frames [T, 3, H, W] in [0, 1]; files hold [T, H, W, 3] uint8.
With alpha, all have a fourth channel.
NaN would become black in 8 bits, so every conversion checks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.transfer import has_streams, to_device

RANGES = {"uint8": (0.0, 255.0), "unit": (0.0, 1.0), "signed": (-1.0, 1.0)}
TOLERANCE = 1e-3  # relative to the width of a range; interpolation and bf16 rounding exceed the range by less
MAX_SIGNED = 10.0  # normalised noise stays below it, a video in 0 to 255 does not
SQUARE, CHECKERBOARD = 8, (102, 153)  # pixels of a side, and the two greys, behind transparent pixels in pictures
_check_values = True


class PixelError(UserError):
    """Pixels or latents have the wrong shape, type or range. The message says what they look like."""

    on_every_rank = False


class NotFiniteError(PixelError):
    """A tensor has NaN or infinity. reason: how many and where, without the tensor's name."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[str]]:
        return NotFiniteError, (self.reason,)


# ---- checks


@contextmanager
def no_value_checks() -> Iterator[None]:
    """Within, check_video and check_latents check only shapes and types.

    For training steps, where reading a value makes the CPU wait for the GPU. They check losses and gradients instead.
    """
    global _check_values
    before, _check_values = _check_values, False
    try:
        yield
    finally:
        _check_values = before


def no_waiting_checks(device: torch.device) -> AbstractContextManager[None]:
    """no_value_checks if `device` is a GPU, for results whose values are checked once they are on the host."""
    return no_value_checks() if has_streams(device) else nullcontext()


def check_video(video: Tensor, channels: int = 3, values: bool = True) -> None:
    """Raises PixelError unless `video` is [B, channels, T, H, W], floating point and, with `values`, finite and not 0
    to 255.

    Values are not checked within no_value_checks and under torch.compile.
    """
    n = channels
    models = "models take" if n == 3 else "this model takes"
    wanted = f"{models} [B, {n}, T, H, W], floating point, in [-1, 1]"
    shape = list(video.shape)
    if not video.is_floating_point():
        raise PixelError(f"the video is {video.dtype}, {shape}; {wanted}; use video.float() / 127.5 - 1")
    if video.ndim != 5 or shape[1] != n:
        looks_like = (
            (video.ndim == 4 and shape[1] == n, "images", "images[:, :, None]"),
            (video.ndim == 4 and shape[0] == n, "one clip", "video[None]"),
            (video.ndim == 5 and shape[2] == n, f"[B, T, {n}, H, W]", "video.transpose(1, 2)"),
            (video.ndim == 5 and shape[4] == n, f"[B, T, H, W, {n}]", "video.movedim(-1, 1)"),
        )
        for found, what, fix in looks_like:
            if found:
                raise PixelError(f"the video is {shape}, which looks like {what}; {wanted}; use {fix}")
        raise PixelError(f"the video is {shape}; {wanted}")
    if 0 in shape:
        raise PixelError(f"the video is {shape}, empty; {wanted}")
    if values and _can_check_values(video):
        low, high = _finite_range(video, "the video")
        if max(-low, high) > MAX_SIGNED:
            raise PixelError(
                f"the video lies in [{low:g}, {high:g}], which looks like 0 to 255; {wanted}; use video / 127.5 - 1"
            )


def check_latents(z: Tensor, channels: int) -> None:
    """Raises PixelError unless `z` is [B, channels, t, h, w], floating point and finite; see check_video."""
    shape = list(z.shape)
    if z.ndim != 5 or shape[1] != channels or not z.is_floating_point() or 0 in shape:
        hint = "; use z[:, :, None]" if z.ndim == 4 and shape[1] == channels else ""
        raise PixelError(
            f"the latents are {z.dtype}, {shape}; the model takes [B, {channels}, t, h, w], floating point{hint}"
        )
    if _can_check_values(z):
        _finite_range(z, "the latents")


def check_frames(frames: Tensor, name: str, pixel_range: str = "unit", start: int = 0) -> Tensor:
    """Convert frames [T, 3, H, W], or RGBA [T, 4, H, W], in `pixel_range` to fp32 in [0, 1], for metrics.

    name, start: of the video, and the index of its first frame here, for errors.
    Raises PixelError for wrong frames, saying what they look like.
    """
    low, high = RANGES[pixel_range]
    kind = "torch.uint8" if pixel_range == "uint8" else "floating point"
    wanted = f"metrics take [T, 3, H, W], {kind}, in [{low:g}, {high:g}] (pixel_range={pixel_range})"
    shape = list(frames.shape)
    if frames.ndim != 4 or shape[1] not in (3, 4) or 0 in shape:
        looks = ""
        if frames.ndim == 5:
            looks = ", which looks like a batch of videos; call update and result once per video"
        elif frames.ndim == 4 and shape[3] == 3:
            looks = ", which looks like [T, H, W, 3]; use frames.permute(0, 3, 1, 2)"
        elif frames.ndim == 4 and shape[0] == 3:
            looks = ", which looks like [3, T, H, W]; use frames.transpose(0, 1)"
        elif frames.ndim == 3 and shape[0] == 3:
            looks = ", which looks like one frame; use frame[None]"
        raise PixelError(f"the {name} is {shape}{looks}; {wanted}")
    if frames.dtype == torch.uint8 and pixel_range != "uint8":
        raise PixelError(f"the {name} is torch.uint8, which looks like 0 to 255; set pixel_range=uint8; {wanted}")
    if frames.dtype != torch.uint8 and (pixel_range == "uint8" or not frames.is_floating_point()):
        raise PixelError(f"the {name} is {frames.dtype}; {wanted}")
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    minimum, maximum = _finite_range(frames.transpose(0, 1), f"the {name}", start)
    slack = TOLERANCE * (high - low)
    if minimum < low - slack or maximum > high + slack:
        looks = "is not clamped; clamp it"
        if maximum > 2:
            looks = "looks like 0 to 255; divide by 255"
        elif pixel_range == "unit" and minimum < -0.5 and maximum <= 1 + slack:
            looks = "looks like [-1, 1]; set pixel_range=signed"
        raise PixelError(f"the {name} lies in [{minimum:g}, {maximum:g}], which {looks}; {wanted}")
    frames = frames.float()
    return frames if pixel_range == "unit" else (frames + 1) / 2


def value_range(values: Tensor) -> tuple[float, float]:
    """Minimum and maximum; both NaN if any value is. 30 times as fast as isfinite or aminmax on a CPU."""
    values = values.detach()
    low, high = torch.stack([values.amin(), values.amax()]).tolist()
    return low, high


def _finite_range(video: Tensor, name: str, start: int = 0) -> tuple[float, float]:
    """value_range of [..., T, H, W]. Raises NotFiniteError, with the first bad frame counted from `start`."""
    low, high = value_range(video)
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    bad = ~video.isfinite()
    frame = start + int(bad.movedim(-3, 0).flatten(1).any(1).nonzero()[0])
    raise NotFiniteError(_not_finite(int(bad.sum()), bad.numel(), frame), name)


def _not_finite(count: int, values: int, frame: int) -> str:
    return f"{count} of {values} values are NaN or infinite, the first in frame {frame}"


def _can_check_values(values: Tensor) -> bool:
    has_values = type(values) is Tensor and values.device.type != "meta"  # a FakeTensor, which counts memory, has none
    return _check_values and has_values and not torch.compiler.is_compiling()


# ---- channels


def as_rgb(video: Tensor) -> Tensor:
    """The colours of [..., C, T, H, W] in [-1, 1], of three channels, for networks and metrics that know only these.

    One channel three times; of four, RGBA, the colours over mid-grey; of more, the first three.
    Raises PixelError for two.
    """
    channels = video.shape[-4]
    if channels == 3:
        return video
    if channels == 1:
        return video.expand(*video.shape[:-4], 3, *video.shape[-3:])
    if channels == 2:
        raise PixelError(
            "a video of 2 channels has no colours; LPIPS, Gram and flow losses, GANs and metrics need 1, 3 or more"
        )
    colours = video[..., :3, :, :, :]
    return colours * (video[..., 3:, :, :, :] + 1) / 2 if channels == 4 else colours


def over_grey(frames: Tensor) -> Tensor:
    """The colours of RGBA frames [T, 4, H, W] in [0, 1] over mid-grey, as as_rgb: [T, 3, H, W]."""
    return (frames[:, :3] - 0.5) * frames[:, 3:] + 0.5


# ---- 8 bits


def quantize(pixels: Tensor, pixel_range: str = "signed", name: str = "", start: int = 0) -> Tensor:
    """Clamp pixels [..., T, H, W] to `pixel_range` and round them to uint8.

    name, start: of the video, and the index of its first frame here, for errors.
    Raises NotFiniteError for NaN and infinity.
    """
    pixels = pixels.float()
    if pixels.numel():
        _finite_range(pixels, name, start)
    return _round_to_bytes(pixels, pixel_range)


def _round_to_bytes(pixels: Tensor, pixel_range: str) -> Tensor:
    low, high = RANGES[pixel_range]
    return pixels.clamp(low, high).sub(low).mul(255 / (high - low)).round().byte()


class Quantized(NamedTuple):
    """8-bit pixels that have not been checked yet, so that nothing has waited for the GPU which computes them.

    pixels: [..., T, H, W, C] uint8, contiguous. not_finite: [T], values of each frame that were NaN or infinite.
    """

    pixels: Tensor
    not_finite: Tensor

    def numpy(self, name: str = "", start: int = 0) -> np.ndarray:
        """The pixels, once they are in host memory. name, start: as for quantize. Raises NotFiniteError."""
        if count := int(self.not_finite.sum()):
            frame = start + int(self.not_finite.nonzero()[0])
            raise NotFiniteError(_not_finite(count, self.pixels.numel(), frame), name)
        return self.pixels.numpy()


def quantize_unchecked(video: Tensor) -> Quantized:
    """As quantize, of [..., C, T, H, W] in [-1, 1], but for the check: that is `Quantized.numpy`."""
    video = video.float()
    if not has_streams(video.device) and math.isfinite(sum(value_range(video))):  # on a CPU faster than isfinite
        not_finite = torch.zeros(video.shape[-3], dtype=torch.int64)
    else:
        not_finite = (~video.isfinite()).movedim(-3, 0).flatten(1).sum(1)
    return Quantized(_round_to_bytes(video, "signed").movedim(-4, -1).contiguous(), not_finite)


def to_uint8(video: Tensor, name: str = "", start: int = 0) -> np.ndarray:
    """[C, T, H, W] in [-1, 1] -> [T, H, W, C] uint8; see quantize."""
    return quantize(video, "signed", name, start).permute(1, 2, 3, 0).cpu().numpy()


def as_unit(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """[T, H, W, C] uint8 -> [T, C, H, W] float in [0, 1], for metrics."""
    pixels = to_device(torch.from_numpy(np.ascontiguousarray(frames)), torch.device(device))
    return pixels.permute(0, 3, 1, 2).float() / 255.0


def displayable(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, C] uint8 as [T, H, W, 3]: RGBA over a checkerboard, one channel as grey, of more than four the
    first three. Raises ValueError for two."""
    channels = frames.shape[3]
    if channels == 3:
        return frames
    if channels == 2:
        raise ValueError("frames of 2 channels have no colours to show")
    if channels == 1:
        return frames.repeat(3, 3)
    if channels != 4:
        return frames[..., :3]
    rows, columns = (np.arange(side) // SQUARE for side in frames.shape[1:3])
    board = np.where((rows[:, None] + columns) % 2, *CHECKERBOARD)[None, ..., None]
    alpha = frames[..., 3:].astype(np.float32) / 255
    return np.rint(frames[..., :3] * alpha + board * (1 - alpha)).astype(np.uint8)

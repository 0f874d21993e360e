"""Pixels to normalised latents and back, for every autoencoder of this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.layout import place
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.spatial import UNKNOWN_FACTOR
from vae3d.pixels import (
    RANGES,
    TOLERANCE,
    PixelError,
    Quantized,
    check_latents,
    no_waiting_checks,
    quantize,
    quantize_unchecked,
    value_range,
)
from vae3d.precision import no_tf32
from vae3d.seeding import Generators, randn_like
from vae3d.transfer import to_device
from vae3d.types import Delta

MODES = ("sample", "mean")


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a posterior, both [B, C, t, h, w] in fp32; std is 0 for deterministic encoders."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: Generators = None) -> Tensor:
        """mean + std * noise; generator: one for the batch, or one per clip, on any device."""
        return self.mean + self.std * randn_like(self.mean, generator)


class LatentCodec:
    """Encodes pixels to normalised latents and decodes them, with a frozen VideoAutoencoder.

    Normalised latents have about mean 0 and standard deviation 1 per channel. The model is put into eval mode, and its
    weights no longer require gradients.

    pixel_range: of input and output: uint8 (torch.uint8, 0 to 255), unit ([0, 1]) or signed ([-1, 1]).
    dtype: of the computation: torch.float32, or torch.bfloat16 or torch.float16 by autocast; autocast outside of the
    codec has no effect. Moments and latents are fp32. tf32: in float32, leave TF32 as it is set; by default it is off.
    chunk_frames: about how many frames to code at once, at least one latent frame; None: as many as the model's stream
    takes. It changes memory, not results. Units of the model, such as the micro_frames of OpenSoraVAE, stay whole.
    config: `_target_` tree of the model, for the metadata of caches.
    Raises ValueError for unknown ranges and dtypes, for chunk_frames where the model cannot code in chunks, and for
    decoders that do not invert the encoder; UserError for an unknown scaling factor.
    """

    def __init__(
        self,
        model: VideoAutoencoder,
        *,
        pixel_range: str = "signed",
        dtype: torch.dtype = torch.float32,
        chunk_frames: int | None = None,
        config: Mapping[str, Any] | None = None,
        tf32: bool = False,
    ) -> None:
        if pixel_range not in RANGES:
            raise ValueError(f"pixel_range is {pixel_range!r}; use one of {', '.join(RANGES)}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}; use torch.float32, torch.bfloat16 or torch.float16")
        if getattr(model, "decimated", False):
            raise ValueError("a decoder with less upscaling does not invert the encoder; leave out decoder_*_upscale")
        if not model.spec.latents_std and not next(model.parameters()).is_meta:
            raise UserError(f"the scaling factor of the latents is not known; {UNKNOWN_FACTOR}")
        self.model = model.eval().requires_grad_(False)
        self.pixel_range, self.dtype, self.config, self.tf32 = pixel_range, dtype, config, tf32
        if chunk_frames is not None:
            if chunk_frames < 1:
                raise ValueError(f"chunk_frames is {chunk_frames}; use a positive number, or None")
            model.set_chunk_frames(chunk_frames)

    @property
    def channels(self) -> int:
        return self.model.spec.channels

    @property
    def time_stride(self) -> int:
        return self.model.spec.time_stride

    @property
    def space_stride(self) -> int:
        return self.model.spec.space_stride

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> LatentCodec:
        place(self.model, device)
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of a clip."""
        return self.model.latent_shape(frames, height, width)

    def encode(self, pixels: Tensor, mode: str = "mean", generator: Generators = None) -> Tensor:
        """Images [B, 3, H, W] or clips [B, 3, T, H, W] in pixel_range -> normalised latents [B, C, t, h, w].

        mode: mean, or sample (generator: one for the batch, or one per clip).
        Raises PixelError as to_video does, ValueError for another mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
        moments = self.moments(pixels)
        return moments.mean if mode == "mean" else moments.sample(generator)

    def moments(self, pixels: Tensor) -> Moments:
        """Mean and standard deviation of the posterior, in units of normalised latents. Raises as `encode` does."""
        raw = self.raw_moments(pixels)
        return Moments(self.model.normalize(raw.mean), raw.std / self.latents_std(raw.std))

    @torch.no_grad()
    def raw_moments(self, pixels: Tensor) -> Moments:
        """As `moments`, before normalisation. Caches store these, and stay valid when the normalisation changes."""
        video = self.to_video(pixels)
        with self._precision_and_chunks(*video.shape[-2:]):
            posterior = self.model.encode(video)
        mean = posterior.mean.float()
        deterministic = isinstance(posterior, Delta)
        return Moments(mean, torch.zeros_like(mean) if deterministic else posterior.logvar.float().mul(0.5).exp())

    @torch.no_grad()
    def decode(self, z: Tensor, num_frames: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Normalised latents [B, C, t, h, w] -> clips [B, 3, T, H, W] in pixel_range, clamped (T = 1 for images).

        num_frames, size (height, width): of the encoded clip, which the model may have padded; by default all decoded
        pixels. uint8 pixels are rounded to nearest.
        Raises PixelError for latents of another number of channels, ValueError if num_frames does not fit them, and
        NotFiniteError for uint8 pixels that are NaN, as after an overflow in fp16.
        """
        return self.from_video(self._decoded(z, num_frames, size))

    @torch.no_grad()
    def decode_unchecked(
        self, z: Tensor, num_frames: int | None = None, size: tuple[int, int] | None = None
    ) -> Quantized:
        """As `decode` for pixel_range=uint8, without waiting for a GPU: clips [B, T, H, W, 3], checked by `numpy`.

        A check of the latents' values is left out on a GPU.
        """
        with no_waiting_checks(self.device):
            return quantize_unchecked(self._decoded(z, num_frames, size))

    @property
    def output_name(self) -> str:
        """Of its pixels, for errors."""
        return f"the output of the decoder in {str(self.dtype).removeprefix('torch.')}"

    def _decoded(self, z: Tensor, num_frames: int | None, size: tuple[int, int] | None) -> Tensor:
        """Normalised latents to the model's own pixels, [B, 3, T, H, W] in about [-1, 1]."""
        check_latents(z, self.channels)
        raw = self.model.denormalize(z.to(self.device, torch.float32))
        stride = self.space_stride
        with self._precision_and_chunks(z.shape[-2] * stride, z.shape[-1] * stride):
            video = self.model.decode(raw, num_frames)
        height, width = size or video.shape[-2:]
        return video[..., :height, :width]

    def to_video(self, pixels: Tensor) -> Tensor:
        """Pixels in pixel_range -> [B, 3, T, H, W] in [-1, 1] on the codec's device, as models take them.

        Raises PixelError for another shape or dtype, and for values outside of the range.
        """
        channels = self.model.pixel_channels
        if pixels.ndim not in (4, 5) or pixels.shape[1] != channels:
            raise PixelError(
                f"pixels have shape {list(pixels.shape)}; use [B, {channels}, H, W] or [B, {channels}, T, H, W]"
            )
        video = to_device(pixels, self.device)
        if (video.dtype == torch.uint8) != (self.pixel_range == "uint8"):
            raise PixelError(f"pixels are {video.dtype}, but pixel_range={self.pixel_range} is declared")
        if self.pixel_range == "uint8":  # bit-equal to ClipBatch.to
            video = video.float() / 127.5 - 1
            return video if video.ndim == 5 else video.unsqueeze(2)
        video = video.float()
        low, high = RANGES[self.pixel_range]
        measured = value_range(video)
        slack = TOLERANCE * (high - low)
        if not low - slack <= measured[0] <= measured[1] <= high + slack:  # NaN fails, too
            raise PixelError(
                f"pixels lie in [{measured[0]:g}, {measured[1]:g}], but pixel_range={self.pixel_range} declares "
                f"[{low:g}, {high:g}]; use one of {', '.join(RANGES)}"
            )
        if self.pixel_range != "signed":
            video = video / (high / 2) - 1
        return video if video.ndim == 5 else video.unsqueeze(2)

    def from_video(self, video: Tensor) -> Tensor:
        """Decoder output in about [-1, 1] -> pixels in pixel_range, clamped.

        Raises NotFiniteError for NaN if pixel_range is uint8, where it would become black.
        """
        if self.pixel_range == "uint8":
            return quantize(video, name=self.output_name)
        video = video.float().clamp(-1, 1)
        return video if self.pixel_range == "signed" else (video + 1) / 2

    def latents_std(self, like: Tensor) -> Tensor:
        """Standard deviation of the raw latents, [C, 1, 1, 1], with device and dtype of `like`."""
        return to_device(torch.tensor(self.model.spec.latents_std, dtype=like.dtype), like.device)[:, None, None, None]

    @contextmanager
    def _precision_and_chunks(self, height: int, width: int) -> Iterator[None]:
        """Set precision, and the chunk size for frames of this size."""
        self.model.fit_chunks(height, width)
        half = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype if half else None, enabled=half)
        with nullcontext() if half or self.tf32 else no_tf32(), autocast:
            yield

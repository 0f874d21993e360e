"""Base class of every video autoencoder, and the interface of the streams that code long videos in chunks.

Training, inference, evaluation and latent caches call these methods; docs/extend.md shows how to add a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.models.tiling import Tiling, make_tiling, measure_reach
from vae3d.pixels import check_video
from vae3d.seeding import Generators, randn_like, uniform
from vae3d.text import plural
from vae3d.types import Delta, LatentSpec, Posterior, Reconstruction

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11


class VideoAutoencoder(nn.Module):
    """Maps video [B, 3, T, H, W] in [-1, 1] to latents [B, C, t, h, w] and back; pixel_channels may replace the 3.

    `forward` takes any number of frames and any size and returns the same: models extend clips by repeating their last
    frame, and sides by repeating their edge, to what their network takes, and crop the reconstruction.
    """

    spec: LatentSpec
    pixel_channels: int = 3  # of videos: 3 RGB, 4 RGBA, 1 grey or depth, or any other number
    latents_mean: Tensor  # [1, C, 1, 1, 1], for normalize, like latents_std; a SpatialVAE has factors instead
    latents_std: Tensor
    whole_frames: str = ""  # what makes a result depend on whole frames, such as GroupNorm; "": nothing, or see tiling
    circular: bool = False  # whether frames are closed at their sides, as panoramas are
    tiling: Tiling | None = None  # see set_tiles
    cached_steps: bool = False  # whether encode_chunk and decode_chunk code a clip chunk by chunk, with a cache
    chunk_latents: int | None = None  # with cached_steps, of a chunk; None: as fit_chunks chose, or the whole clip
    fixed_chunks: bool = False  # with cached_steps: streams give them chunks of two shapes only
    fitted_latents: int | None = None  # by fit_chunks

    def encode(self, video: Tensor) -> Posterior | Delta:
        """Posterior over raw (not normalised) latents. Raises PixelError as pixels.check_video does."""
        raise NotImplementedError

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Decode raw latents to num_frames frames, not clamped; by default as many as possible.

        Raises PixelError as pixels.check_latents does, and ValueError if num_frames does not fit the latents.
        """
        raise NotImplementedError

    def forward(
        self,
        video: Tensor,
        *,
        latents: Tensor | None = None,
        encode: bool = False,
        sample: bool = True,
        pixels: bool = True,
        generator: Generators = None,
        noise: float = 0.0,
    ) -> Reconstruction:
        """Encode and decode. A training step calls this once per micro-batch, through the wrapper (DeepSpeed's engine);
        terms that decode again (`Reconstruction.decode`) call the network itself.

        latents: decode these instead of encoding `video`. encode: with `latents`, encode as well, for the posterior.
        sample: sample the posterior, or take its mode. generator: one for the batch, or one per clip.
        pixels: False skips the pixel decoder, where no loss reads its output. noise: see add_latent_noise.
        """
        check_video(video, self.pixel_channels, values=False)
        frames, height, width = video.shape[2:]
        posterior = self.encode(video) if encode or latents is None else None
        z = choose_latents(posterior, latents, sample, generator)
        rec = self.decode(add_latent_noise(z, noise, generator), frames)[..., :height, :width] if pixels else None
        return Reconstruction(rec, posterior, z)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        filename: str | None = None,
        token: str | None = None,
        **changes: Any,
    ) -> Self:
        """vae3d.from_pretrained, for a model of this class. Raises UserError for one of another class."""
        import vae3d  # everything below it is above this module

        model = vae3d.from_pretrained(path, revision=revision, filename=filename, token=token, **changes)
        if not isinstance(model, cls):
            raise UserError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """vae3d.push_to_hub of this model."""
        import vae3d

        return vae3d.push_to_hub(self, repository, **options)

    def set_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """Code frames in tiles of `tile` x `tile` pixels from now on, to save memory; None: whole frames.

        Every use of the model then does: encode, decode, forward, streams. It is meant for inference.
        overlap: None is exact: each tile is read with all that it depends on. Layers of the lowest resolution that see
        whole frames are not tiled. A number of pixels: tiles overlap by it and are blended linearly, as in diffusers,
        so that results differ; for networks whose GroupNorm or attention sees whole frames at all resolutions.
        Raises UserError for sizes that do not fit the model's strides, and where exact tiles cannot be.
        """
        self.tiling = None if tile is None else make_tiling(self, tile, overlap)

    def tile_reach(self) -> tuple[dict[str, int], str]:
        """See tiling.measure_reach."""
        return measure_reach(self)

    def set_frame_batch(self, frames: int) -> bool:
        """Let a network of single frames take so many at once from now on. Returns whether there is such a network."""
        return False

    def set_chunk_frames(self, frames: int) -> None:
        """Code about so many frames at once from now on, at least one latent. Changes memory, not results.

        Raises ValueError for a model that cannot.
        """
        if self.cached_steps:
            self.chunk_latents = max(1, frames // self.spec.time_stride)
        elif not self.set_frame_batch(frames):
            raise ValueError(f"a {type(self).__name__} cannot code clips in chunks; leave out chunk_frames")

    def fit_chunks(self, height: int, width: int) -> None:
        """Let encode and decode take frames of this size in the chunks of a stream, unless chunk_latents is set."""
        if self.cached_steps and self.chunk_latents is None:
            self.fitted_latents = self.stream(height, width).chunk_latents

    @property
    def clip_latents(self) -> int | None:
        """Of a chunk in which encode and decode code a clip; None: at once."""
        return self.chunk_latents or self.fitted_latents

    def chunk_steps(self) -> list[tuple[nn.Module, str]]:
        """(module, method) of everything that codes a chunk of a stream, without loops over frames."""
        names = ("encode_chunk", "decode_chunk") if self.cached_steps else ("encode", "decode")
        return [(self, name) for name in names]

    def coded_size(self, height: int, width: int) -> tuple[int, int]:
        """Size in pixels of what the decoder runs on at once, of frames of this size: a tile, or the frames."""
        return (height, width) if self.tiling is None else self.tiling.largest(height, width)

    @property
    def kind_of_network(self) -> str:
        """Its name, for messages."""
        return type(self).__name__

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """Modules that a stage may train, by name. Parts may overlap."""
        raise NotImplementedError

    def last_layers(self) -> list[nn.Parameter]:
        """Weights of the layers that output pixels, the last one first. A stage may freeze some of them."""
        raise NotImplementedError

    def pixel_layers(self) -> PixelLayers:
        """The layers that read and write pixels, to change the number of their channels."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for frames that the model does not take, padded or not."""
        space = self.spec.space_stride
        if self.circular and width % space:
            raise UserError(
                f"the width is {width}; with pad_w=circular it must be a multiple of {space}, since padding would "
                "break the seam"
            )

    def frames_valid(self, frames: int) -> bool:
        """Whether a clip of this length needs no padding."""
        return frames >= 1

    def latent_frames(self, frames: int) -> int:
        """Latents of a clip of this length, along time."""
        return -(-frames // self.spec.time_stride)

    def check_frames(self, frames: int, latents: int, note: str = "") -> None:
        """Raises UserError unless a clip of so many frames has so many latent frames. note: the message's end."""
        if frames < 1 or self.latent_frames(frames) != latents:
            raise UserError(f"num_frames is {frames}, which does not fit {plural(latents, 'latent frame')}{note}")

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of a clip of this size."""
        return self.spec.channels, self.latent_frames(frames), *self.spec.latent_size(height, width)

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> Stream:
        """A Stream for one video of this size. memory_gib: about how much memory a chunk may take, where it varies."""
        raise NotImplementedError

    def register_latent_stats(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, *, persistent: bool = False
    ) -> dict[str, tuple[float, ...]]:
        """Register latents_mean and latents_std (None: 0 and 1) and return them as arguments of LatentSpec.

        persistent: save them in the state dict. Raises ValueError unless there is one of each per channel, and for
        statistics of latents that are normalised already.
        """
        if latent_space(self) == "normalized" and not (mean is None and std is None):
            raise ValueError("latents_mean and latents_std are for raw latents; leave them out with latent=normalized")
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * channels if std is None else std
        if not len(mean) == len(std) == channels:
            raise ValueError(
                f"latents_mean and latents_std have {len(mean)} and {len(std)} entries; give {channels} each"
            )
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            buffer = torch.tensor(values, dtype=torch.float32)[None, :, None, None, None]
            self.register_buffer(name, buffer, persistent=persistent)
        return {"latents_mean": tuple(mean), "latents_std": tuple(std)}

    def latent_stats(self) -> dict[str, tuple[float, ...]]:
        """latents_mean and latents_std as arguments of LatentSpec, copied to the CPU; empty on the meta device."""
        stats = {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        return {name: () if s.is_meta else tuple(s.flatten().tolist()) for name, s in stats.items()}

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents to about zero mean and unit variance, as a diffusion model takes them."""
        return (z - self.latents_mean) / self.latents_std

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of normalize."""
        return z * self.latents_std + self.latents_mean


class PixelLayers(NamedTuple):
    """Names, in the state dict, of the tensors whose size follows from the pixels' channels.

    inputs: weights [out, channels * n, ...]. outputs: weights and biases [channels * n, ...]. grey: mid-grey in the
    outputs' own range, in which white is 1.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    grey: float = 0.0


class Stream(Protocol):
    """Reconstructs one video chunk by chunk.

    lookahead: how many frames beyond its chunk a call must be given, as far as the video has them.
    """

    lookahead: int

    def chunks(self, frames: int) -> list[int]:
        """Start a video of this many frames and return the lengths of its chunks. Call once, before the first chunk."""

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Reconstruct the next chunk of [B, 3, T, H, W], without its lookahead."""


def share_frames(a: VideoAutoencoder, b: VideoAutoencoder, frames: int, height: int, width: int) -> bool:
    """Whether both models take clips of this size without padding time, to latents of the same shape."""
    valid = a.frames_valid(frames) and b.frames_valid(frames)
    return valid and a.latent_shape(frames, height, width) == b.latent_shape(frames, height, width)


def nearest_frames(frames: int, is_valid: Callable[[int], bool]) -> list[int]:
    """Up to four valid frame counts nearest to `frames`, ascending."""
    return sorted(sorted(filter(is_valid, range(1, frames + 36)), key=lambda n: abs(n - frames))[:4])


def choose_latents(
    posterior: Posterior | Delta | None, latents: Tensor | None, sample: bool, generator: Generators
) -> Tensor:
    """The given latents, or else the posterior's sample or mode."""
    if latents is not None:
        return latents
    return posterior.sample(generator) if sample else posterior.mode()


def add_latent_noise(z: Tensor, noise: float, generator: Generators) -> Tensor:
    """z + sigma * std(z) * eps for latents z [B, C, t, h, w], where eps is standard normal.

    sigma is uniform in [0, noise], one draw per clip, as for the decoders of RAE (arXiv 2510.11690, `noise_tau` in
    bytetriper/RAE) and LTX-Video (arXiv 2501.00103). std(z) is computed per clip, so that `noise` does not depend on
    the scale of the latents. Gradients pass through std(z): otherwise the encoder could enlarge its latents to drown
    the noise.
    """
    if not noise:
        return z
    sigma = noise * uniform(len(z), z.device, generator)
    std = z.float().flatten(1).std(1, correction=0)
    return z + (sigma * std).view(-1, 1, 1, 1, 1) * randn_like(z, generator)


def attach_decoder(out: Reconstruction, model: VideoAutoencoder) -> Reconstruction:
    """Set out.decode and out.reconstruct, with which loss terms decode other latents and code other videos."""
    return replace(
        out,
        decode=lambda z, video: model(video, latents=z).video,
        reconstruct=lambda video: model(video, sample=False),
    )


def latent_space(model: nn.Module) -> str:
    """raw: encode returns the VAE's own latents. normalized: it returns those that a diffusion model sees."""
    return getattr(model, "latent", "raw")


def convert_latents(z: Tensor, source: nn.Module, target: nn.Module) -> Tensor:
    """Convert latents from the space of `source` to that of `target`, with the statistics of the raw one."""
    if latent_space(source) == latent_space(target):
        return z
    return source.normalize(z) if latent_space(source) == "raw" else target.denormalize(z)

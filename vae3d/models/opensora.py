"""The video autoencoder of Open-Sora 1.2: the 2D VAE on every frame, then the temporal VAE on its latents.

`opensora/models/vae/vae.py` of hpcaitech/Open-Sora v1.2 (VideoAutoencoderPipeline). State-dict keys are those of the
published OpenSora-VAE-v1.2, but for latents_mean and latents_std, which it calls shift and scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vae3d.arguments import Count, Deviation, Mean, check_arguments
from vae3d.models.interface import PixelLayers, VideoAutoencoder, add_latent_noise, choose_latents
from vae3d.models.streaming import IndependentChunks
from vae3d.models.temporal import TemporalVAE
from vae3d.models.tiling import code_in_tiles
from vae3d.pixels import check_latents, check_video
from vae3d.seeding import Generators
from vae3d.text import plural
from vae3d.types import LatentSpec, Posterior, Reconstruction, SpatialPath, cat_posteriors


class OpenSoraVAE(VideoAutoencoder):
    """Spatial and temporal VAE in series; a VideoAutoencoder with the strides of both, 4 x 8 x 8 as published.

    spatial: SpatialVAE as published, or another VideoAutoencoder that codes each frame by itself, such as TAESD.
    micro_frames: code the clip in independent chunks of this many frames (17 as published, to 5 latents each); None:
    as a whole. The results differ, since the temporal VAE's GroupNorm pools over time. Both take any number of frames.
    latents_mean, latents_std: per channel, for `normalize`; None: 0 and 1. encode and decode use raw latents.
    Raises ValueError if spatial and temporal VAE do not fit together.
    """

    whole_frames = "GroupNorm"

    @check_arguments
    def __init__(
        self,
        spatial: VideoAutoencoder,
        temporal: TemporalVAE,
        *,
        micro_frames: Count | None = 17,
        latents_mean: Sequence[Mean] | None = None,
        latents_std: Sequence[Deviation] | None = None,
    ) -> None:
        super().__init__()
        if spatial.spec.time_stride != 1:
            raise ValueError(
                f"spatial is a {type(spatial).__name__}, which compresses time; use a VAE of single frames"
            )
        if spatial.spec.channels != temporal.in_channels:
            raise ValueError(
                f"temporal.in_channels is {temporal.in_channels}; the latents of spatial have {spatial.spec.channels}"
            )
        self.register_latent_stats(latents_mean, latents_std, temporal.latent_channels, persistent=True)
        self.spatial_vae = spatial
        self.temporal_vae = temporal
        self.micro_frames = micro_frames
        self.pixel_channels = spatial.pixel_channels

    @property
    def spec(self) -> LatentSpec:
        """Copies latents_mean and latents_std, which are saved with the weights, to the CPU."""
        return LatentSpec(
            channels=self.temporal_vae.latent_channels,
            time_stride=self.temporal_vae.stride,
            space_stride=self.spatial_vae.spec.space_stride,
            causal=False,
            **self.latent_stats(),
        )

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> posterior over raw latents, from the mode of the 2D latents."""
        return self.encode_temporal(self.encode_spatial(video))

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        check_latents(z, self.temporal_vae.latent_channels)
        return self.decode_spatial(self.decode_temporal(z, num_frames))

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
        """See VideoAutoencoder.forward. `spatial` holds the 2D latents; noise is added to the temporal latents."""
        check_video(video, self.pixel_channels, values=False)
        frames, height, width = video.shape[2:]
        latent = posterior = None
        if encode or latents is None:
            latent = self.encode_spatial(video, sample=sample, generator=generator)
            posterior = self.encode_temporal(latent)
        z = choose_latents(posterior, latents, sample, generator)
        latent_rec = self.decode_temporal(add_latent_noise(z, noise, generator), frames)
        rec = self.decode_spatial(latent_rec)[..., :height, :width] if pixels else None
        return Reconstruction(rec, posterior, z, SpatialPath(latent, latent_rec))

    def encode_spatial(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Tensor:
        """Normalised 2D latents [B, C, T, h, w] of every frame. sample: their posterior, instead of taking its mode."""
        return self.spatial_vae.normalize(choose_latents(self.spatial_vae.encode(video), None, sample, generator))

    def decode_spatial(self, latent: Tensor) -> Tensor:
        """Video from normalised 2D latents. Those of encode_spatial give the upper bound of this pipeline's quality."""
        return self.spatial_vae.decode(self.spatial_vae.denormalize(latent))

    def encode_temporal(self, latent: Tensor) -> Posterior:
        if self.micro_frames is None:
            return self._encode_chunk(latent)
        return cat_posteriors([self._encode_chunk(chunk) for chunk in latent.split(self.micro_frames, 2)])

    def decode_temporal(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        if self.micro_frames is None:
            return self._decode_chunk(z, num_frames)
        size = self.temporal_vae.latent_frames(self.micro_frames)
        whole, rest = divmod(z.shape[2], size)
        frames = whole * self.micro_frames + rest * self.temporal_vae.stride if num_frames is None else num_frames
        self.check_frames(frames, z.shape[2], f" in chunks of {plural(self.micro_frames, 'frame')}")
        lengths = [min(self.micro_frames, frames - start) for start in range(0, frames, self.micro_frames)]
        return torch.cat([self._decode_chunk(p, n) for p, n in zip(z.split(size, 2), lengths, strict=True)], 2)

    def _encode_chunk(self, latent: Tensor) -> Posterior:
        encode = self.temporal_vae.encode
        if self.tiling is None:
            return encode(latent)
        return code_in_tiles(self.tiling, lambda x, _: (encode(x), None), latent, None, 1)[0]

    def _decode_chunk(self, z: Tensor, num_frames: int | None) -> Tensor:
        decode = self.temporal_vae.decode
        if self.tiling is None:
            return decode(z, num_frames)
        return self.tiling("decoder", lambda x, _: (decode(x, num_frames), None), z, None, 1, 1)[0]

    def set_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """See VideoAutoencoder.set_tiles. The temporal VAE blends tiles, and so does the spatial VAE where
        they cannot be exact."""
        super().set_tiles(tile, overlap)
        self.spatial_vae.set_tiles(tile, overlap if self.spatial_vae.whole_frames else None)

    def set_frame_batch(self, frames: int) -> bool:
        return self.spatial_vae.set_frame_batch(frames)

    def chunk_steps(self) -> list[tuple[nn.Module, str]]:
        temporal = self.temporal_vae
        return [*self.spatial_vae.chunk_steps(), (temporal, "encode"), (temporal, "decode")]

    def pixel_layers(self) -> PixelLayers:
        inputs, outputs, grey = self.spatial_vae.pixel_layers()
        return PixelLayers(*([f"spatial_vae.{name}" for name in names] for names in (inputs, outputs)), grey)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        spatial = self.spatial_vae.trainable_parts()
        temporal = self.temporal_vae
        parts = {
            "spatial_encoder": spatial["encoder"],
            "spatial_decoder": spatial["decoder"],
            "temporal_encoder": [temporal.encoder, temporal.quant_conv],
            "temporal_decoder": [temporal.post_quant_conv, temporal.decoder],
        }
        if temporal.shortcut:
            parts["temporal_encoder"].append(temporal.shortcut_in)
            parts["temporal_decoder"].append(temporal.shortcut_out)
        parts["encoder"] = parts["spatial_encoder"] + parts["temporal_encoder"]
        parts["decoder"] = parts["temporal_decoder"] + parts["spatial_decoder"]
        return parts

    def last_layers(self) -> list[nn.Parameter]:
        return [*self.spatial_vae.last_layers(), self.temporal_vae.decoder.conv_out.conv.weight]

    def latent_frames(self, frames: int) -> int:
        if self.micro_frames is None:
            return self.temporal_vae.latent_frames(frames)
        whole, rest = divmod(frames, self.micro_frames)
        return whole * self.temporal_vae.latent_frames(self.micro_frames) + self.temporal_vae.latent_frames(rest)

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> IndependentChunks:
        """Chunks of micro_frames, which are independent anyway; without micro_frames the whole video."""
        return IndependentChunks(self, self.micro_frames)

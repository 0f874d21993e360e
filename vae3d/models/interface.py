"""What every video autoencoder offers, and how it codes long videos."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from vae3d.seeding import Generators
from vae3d.types import Delta, LatentSpec, Posterior, Reconstruction


@runtime_checkable
class VideoAutoencoder(Protocol):
    """An nn.Module that maps video [B, 3, T, H, W] in [-1, 1] to latents [B, C, t, h, w] and back.

    Any number of frames and any size goes in and the same comes out of `forward`; what the network cannot take
    is padded and cropped back, as its docstring says.
    """

    spec: LatentSpec

    def encode(self, video: Tensor) -> Posterior | Delta:
        """Posterior over raw (un-normalised) latents. Raises PixelError as pixels.check_video does."""

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raw latents to video, unclamped, of num_frames frames. Raises PixelError as pixels.check_latents does."""

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
        """The only call that training makes, so that DDP's hooks fire and compile works.

        latents: decode these instead of encoding `video`. encode: encode it all the same, for the posterior.
        sample: draw the latents (with `generator`: one for the batch, or one per clip) or take the posterior's mode.
        pixels=False skips a pixel decoder whose output no loss reads. noise: see `add_latent_noise`.
        """

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """Name -> modules that a stage may train; names may overlap."""

    def last_layers(self) -> list[nn.Parameter]:
        """Weights of the layers that end at pixels, nearest to them first; a stage may freeze some of them."""

    def frames_valid(self, frames: int) -> bool:
        """Whether `frames` goes through without padding."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latents."""

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> Stream:
        """What reconstructs one long video of this size piece by piece, in about `memory_gib` if it has the choice."""

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents to those a diffusion model sees, about zero mean and unit variance."""

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of normalize."""


class Stream(Protocol):
    """One video, called with one piece after another.

    lookahead: how many of the frames after a piece must come with it, or as many as there are.
    """

    lookahead: int

    def chunks(self, frames: int) -> list[int]:
        """Lengths of the pieces of a video of so many frames; asked for once, before the first piece."""

    def __call__(self, video: Tensor, *, sample: bool = False, generator: Generators = None) -> Reconstruction:
        """Reconstruct the next piece, [B, 3, T, H, W], without the frames that came with it."""

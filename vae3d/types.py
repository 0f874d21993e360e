"""Data types shared by models, losses, data and training.

Shapes: B clips, C channels, T frames of H x W pixels; t, h, w are the same axes in the latent space. Pixels are in
[-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vae3d.seeding import Generators, generator_of, randn_like


@dataclass(frozen=True)
class LatentSpec:
    """A latent space: channels, compression factors, mean and standard deviation.

    causal: a latent never depends on later frames. latents_mean, latents_std: per channel. Empty on the meta device for
    models that keep them with their weights; latents_std is empty also for a SpatialVAE without a scaling factor.
    """

    channels: int
    time_stride: int
    space_stride: int
    causal: bool
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of frames, whose sides are padded to multiples of space_stride."""
        return -(-height // self.space_stride), -(-width // self.space_stride)


@dataclass
class Posterior:
    """Diagonal Gaussian over latents [B, C, t, h, w], `ldm/modules/distributions` of latent-diffusion."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split [B, 2C, t, h, w] into mean and log-variance, the latter clamped to [-30, 20]; fp32 or better."""
        wide = moments.to(torch.promote_types(moments.dtype, torch.float32))
        mean, logvar = wide.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def first(self, latents: int) -> Posterior:
        """Of the first so many latents along time."""
        return Posterior(self.mean[:, :, :latents], self.logvar[:, :, :latents])

    def sample(self, generator: Generators = None) -> Tensor:
        return self.mean + torch.exp(0.5 * self.logvar) * randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        return self.mean

    def kl_map(self) -> Tensor:
        """KL(q || N(0, 1)) per latent element, [B, C, t, h, w], in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) summed over everything but the batch, [B], in nats."""
        return self.kl_map().flatten(1).sum(1)


@dataclass
class Delta:
    """Posterior of a deterministic encoder: a delta distribution at `mean`, whose KL counts as 0."""

    mean: Tensor

    def sample(self, generator: Generators = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean

    def kl_map(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def kl(self) -> Tensor:
        return self.mean.new_zeros(self.mean.shape[0])


def cat_posteriors(parts: Sequence[Posterior | Delta], dim: int = 2) -> Posterior | Delta:
    """One of a clip from those of its chunks, all of one kind, joined along time; or, with dim=0, of a batch."""
    values = (vars(part).values() for part in parts)
    return type(parts[0])(*(torch.cat(chunks, dim) for chunks in zip(*values, strict=True)))


@dataclass
class SpatialPath:
    """2D latents [B, C, T, h, w] of a two-stage autoencoder, encoded (None if latents were given) and reconstructed."""

    latent: Tensor | None
    latent_rec: Tensor


@dataclass
class Reconstruction:
    """Result of VideoAutoencoder.forward.

    video: [B, 3, T, H, W], not clamped; None with pixels=False. posterior: None if latents were given instead of
    encoded. z: [B, C, t, h, w], the raw latents that were decoded, without the noise of stage.latent_noise.
    features: outputs of inner modules by name, [B, C', t', h', w'], for feature distillation.
    decode: (latents, video) -> video decodes other latents with the same network, to the size of its second argument.
    reconstruct: codes another video with the same network, from its posterior's mode. Both are set by
    models.interface.attach_decoder, for loss terms.
    """

    video: Tensor | None
    posterior: Posterior | Delta | None
    z: Tensor
    spatial: SpatialPath | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    decode: Callable[[Tensor, Tensor], Tensor] | None = None
    reconstruct: Callable[[Tensor], Reconstruction] | None = None


@dataclass
class TeacherTargets:
    """A teacher's results for a clip, detached.

    z: latents in the student's space (raw or normalized). features: outputs of inner modules, under the names of the
    student's modules that are trained to match them, with as many frames.
    """

    z: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ClipBatch:
    """A batch of clips.

    video: [B, 3, T, H, W]; uint8 [0, 255] as loaded, float [-1, 1] after `to`. positions: [B], index of each clip in
    the endless training order. With the run's seed it determines every random draw for the clip; below 0 in the
    preflight. paths: source files. errors: (path, reason) of files that could not be read for this batch.
    valid, depth_bounds: of depth maps only. valid [B, 1, T, H, W] is False where depth is missing; pixels are finite
    there too. depth_bounds [B, 2] are the metres that -1 and 1 mean.
    weight: of each pixel, broadcastable to [B, 1, T, H, W], of mean 1; set by the Objective.
    targets: of the teacher, if there is one; set by the trainer.
    """

    video: Tensor
    positions: Tensor
    paths: list[str]
    errors: list[tuple[str, str]] = field(default_factory=list)
    valid: Tensor | None = None
    depth_bounds: Tensor | None = None
    weight: Tensor | None = None
    targets: TeacherTargets | None = None

    def pin_memory(self) -> ClipBatch:
        """Called by the DataLoader, for asynchronous copies in `to`."""
        return self._each(Tensor.pin_memory)

    def copy_to(self, device: torch.device | str) -> ClipBatch:
        """Move to a device as it is, without waiting for a GPU if it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def to(self, device: torch.device | str) -> ClipBatch:
        """Move to a device; uint8 pixels become float in [-1, 1]."""
        moved = self.copy_to(device)
        if moved.video.dtype == torch.uint8:
            moved.video = moved.video.float().div_(127.5).sub_(1.0)
        return moved

    def _each(self, change: Callable[[Tensor], Tensor]) -> ClipBatch:
        """A copy with `change` applied to all tensors but positions and targets; positions stay on the CPU."""
        tensors = {name: getattr(self, name) for name in ("video", "valid", "depth_bounds", "weight")}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})

    def generators(self, seed: int, device: torch.device | str, purpose: str = "noise") -> Generators:
        """One generator per clip, seeded by (seed, position, purpose); None on the meta device, which draws nothing."""
        if torch.device(device).type == "meta":
            return None
        return [generator_of(seed, position, purpose, device=device) for position in self.positions.tolist()]

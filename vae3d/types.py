"""The values that pass between models, losses, data and the training loop.

Shapes: B clips, C channels, T frames of H x W pixels; t, h, w are the same axes in the latent space.
Pixels lie in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vae3d.seeding import Generators, generator_of, randn_like


@dataclass(frozen=True)
class LatentSpec:
    """A latent space: its channels, its compression factors, and its mean and standard deviation.

    causal: a latent never depends on later frames. latents_mean, latents_std: per channel. Empty on the meta device for
    models that keep them with their weights; latents_std is empty also for a SpatialVAE without a scaling factor.
    """

    channels: int
    time_stride: int
    space_stride: int
    causal: bool
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


@dataclass
class Posterior:
    """Diagonal Gaussian over latents [B, C, t, h, w] (latent-diffusion `ldm/modules/distributions`)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split [B, 2C, t, h, w] into mean and log-variance, the latter clamped to [-30, 20]; fp32 or better."""
        wide = moments.to(torch.promote_types(moments.dtype, torch.float32))
        mean, logvar = wide.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, generator: Generators = None) -> Tensor:
        return self.mean + torch.exp(0.5 * self.logvar) * randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        return self.mean

    def kl_map(self) -> Tensor:
        """KL(q || N(0, 1)) of every latent element, [B, C, t, h, w], in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) summed over everything but the batch, [B], in nats."""
        return self.kl_map().flatten(1).sum(1)


@dataclass
class Delta:
    """Posterior of a deterministic encoder: all mass on `mean`, no KL."""

    mean: Tensor

    def sample(self, generator: Generators = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean

    def kl_map(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def kl(self) -> Tensor:
        return self.mean.new_zeros(self.mean.shape[0])


@dataclass
class SpatialPath:
    """The inner latents of a two-stage autoencoder, [B, C, T, h, w]: of the 2D VAE, and as reconstructed.

    latent: None if latents were given instead of encoded.
    """

    latent: Tensor | None
    latent_rec: Tensor


@dataclass
class Reconstruction:
    """What one forward pass of a VideoAutoencoder returns.

    video: [B, 3, T, H, W], unclamped, or None if pixels were not asked for.
    posterior: None if latents were given instead of encoded. z: [B, C, t, h, w], raw: what was decoded, but before
    noise was added to it (stage.latent_noise).
    features: of inner modules, [B, C', t', h', w'], by name; only if a feature distillation asked for them.
    decode: decodes other latents with the same network, for terms that ask: (latents, video) -> video, where the second
    argument only tells the size of the result; set by the Trainer.
    """

    video: Tensor | None
    posterior: Posterior | Delta | None
    z: Tensor
    spatial: SpatialPath | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    decode: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass
class TeacherTargets:
    """What a teacher makes of a clip, without gradients.

    z: its latents, in the student's convention. features: of its inner modules, under the names of the student's
    modules that are to imitate them and at their number of frames.
    """

    z: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Clip:
    """A batch of clips as the losses see it.

    video: [B, 3, T, H, W]; uint8 [0, 255] as loaded, float [-1, 1] after `to`.
    positions: [B], each clip's place in the endless training order; with the run's seed it fixes every
    random draw made for the clip; below 0 in a rehearsal. paths: source files. errors: (path, reason) of
    files that failed to read while this batch was made.
    Of depth maps only, valid: [B, 1, T, H, W] bool, False where nothing was measured, with finite pixels nevertheless;
    depth_bounds: [B, 2] metres that -1 and 1 stand for.
    weight: how much each pixel counts, broadcastable to [B, 1, T, H, W], of mean 1; set by the Objective.
    targets: what the teacher makes of it, if there is one; set by the Trainer.
    """

    video: Tensor
    positions: Tensor
    paths: list[str]
    errors: list[tuple[str, str]] = field(default_factory=list)
    valid: Tensor | None = None
    depth_bounds: Tensor | None = None
    weight: Tensor | None = None
    targets: TeacherTargets | None = None

    def pin_memory(self) -> Clip:
        """Called by the DataLoader, so that `to` copies while the GPU computes."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Clip:
        """Move to a device; uint8 pixels become float in [-1, 1]."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.video.dtype == torch.uint8:
            moved.video = moved.video.float().div_(127.5).sub_(1.0)
        return moved

    def _each(self, change: Callable[[Tensor], Tensor]) -> Clip:
        """A copy with `change` made to what belongs on a device; positions stay where they are."""
        given = {name: getattr(self, name) for name in ("video", "valid", "depth_bounds", "weight")}
        return replace(self, **{name: change(tensor) for name, tensor in given.items() if tensor is not None})

    def generators(self, seed: int, device: torch.device | str) -> list[torch.Generator]:
        """One generator per clip, a pure function of (seed, position)."""
        return [generator_of(seed, position, "noise", device=device) for position in self.positions.tolist()]

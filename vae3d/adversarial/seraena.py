"""Seraena: a discriminator that corrects reconstructions instead of classifying them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.adversarial.base import Betas, DiscriminatorAdversary, LossAndMetrics, Positive, Step, Weight, group_frames
from vae3d.adversarial.discriminators import SERAENA_STRIDE, ConditionalPatchDiscriminator
from vae3d.adversarial.replay import ReplayBuffer
from vae3d.arguments import Count, Range, Width, Widths
from vae3d.pixels import as_rgb
from vae3d.precision import autocast, autocast_off
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import to_device, to_host
from vae3d.types import ClipBatch, Reconstruction


@dataclass(kw_only=True, eq=False)
class Seraena(DiscriminatorAdversary):
    """`seraena.py` and `TAEHV_Training_Example.ipynb` of madebyollin/seraena.

    Groups of frames are images [N, 3 * frames, H, W] in [0, 1] (see base.group_frames), with the latents that they were
    decoded from as context.

    Generator: let c = -d/dfake of sum_n mean (D(real) - D(fake))^2, with D in eval mode. The target is
    fake + c / (std(c) + eps), with one standard deviation per micro-batch, and the loss is MSE(fake, target). So its
    value is 1 where std(c) is far above eps, and smaller elsewhere: it does not measure the generator. Watch
    seraena/score_gap and seraena/correction_over_reconstruction instead. Masks of valid pixels and pixel weights do not
    apply.
    Discriminator: fresh_fraction of the fakes are from the batch, the others are drawn from buffer and batch. Each
    element of the batch shows, at random, its fake (target 1) or its real image (target -1). The loss is MSE, the
    optimizer AdamW with torch's defaults for the rest.

    Unlike there, the correction uses the discriminator from before this step's update: a skipped step must leave no
    trace, so running statistics and buffer are also kept aside until `step`. All draws are pure functions of (seed,
    step, rank, micro-batch). fp16 is not offered: the correction's gradient would underflow.

    context_channels: of the latents.
    weight: of the generator's loss, 0 before step `start` and ramped up over the next `ramp` steps.
    discriminator_start: its first step, by default `start`; set it earlier to pretrain the discriminator.
    frames: per image. context: `mean` of the clip's latents over time, as published, or those `nearest` in time.
    eps: damps small corrections. c scales with 1 / (image area), so the published 1e-5, for 64 x 64, damps larger
    images more.
    buffer_length: images kept on each rank, in host memory and in every checkpoint; the published notebook keeps 16384.
    buffer_gib: GiB that they may take on each rank: fewer images are kept if they reach it. None: no limit.
    grad_clip: norm of the discriminator's gradient; None: no clipping.
    diagnostics_every: steps between measurements of correction_over_reconstruction; 0: never.
    """

    context_channels: Width
    weight: Weight = 1.0
    start: Step = 0
    ramp: Step = 0
    discriminator_start: Step | None = None
    frames: Count = 3
    context: Literal["mean", "nearest"] = "mean"
    eps: Positive = 1e-5
    buffer_length: Count = 16384
    buffer_gib: Positive | None = None
    fresh_fraction: Annotated[float, Range(0, 1)] = 0.5
    lr: Positive = 3e-4
    betas: Betas = (0.9, 0.99)
    grad_clip: Positive | None = None
    norm: Literal["batch", "group"] = "batch"
    channels: Widths = (64, 128, 256, 512, 512, 512)
    precision: Literal["fp32", "bf16"] = "fp32"
    diagnostics_every: Step = 50

    name = "seraena"
    title = "Seraena"
    weight_decay = 0.01  # torch's default

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buffer = ReplayBuffer(
            self.buffer_length, None if self.buffer_gib is None else int(self.buffer_gib * 2**30)
        )

    def build(self) -> ConditionalPatchDiscriminator:
        return ConditionalPatchDiscriminator(3 * self.frames, self.context_channels, self.channels, norm=self.norm)

    def generator_loss(self, batch: ClipBatch, out: Reconstruction, loss: Tensor, step: int) -> LossAndMetrics:
        """Raises ValueError if sizes do not fit or no trained part reaches the pixels."""
        weight = self.weight_at(step)
        if not weight:
            return torch.zeros((), device=batch.video.device), {}
        real, fake, context = self._inputs(batch, out)
        self.require_grad(out)
        with autocast_off(fake.device):
            correction, gap = self.correction(real, fake, context)
            pixels = (as_rgb(out.video).float() + 1) / 2
            target = pixels.detach() + ungroup_frames(correction, pixels.shape[0], pixels.shape[2])
            mse = F.mse_loss(pixels, target)
        metrics = {"loss/seraena": mse, "loss_weighted/seraena": weight * mse, "seraena/score_gap": gap}
        if self.diagnostics_every and step % self.diagnostics_every == 0:
            metrics["seraena/correction_over_reconstruction"] = _gradient_ratio(weight * mse, loss, out.video)
        return weight * mse, {name: value.detach() for name, value in metrics.items()}

    def correction(self, real: Tensor, fake: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised correction of fake images [N, C, H, W] in [0, 1], and mean D(fake) - D(real)."""
        self.discriminator.eval()
        with torch.enable_grad(), autocast(self.device, self.precision):
            fake = fake.detach().requires_grad_()
            with torch.no_grad():
                real_scores = self.discriminator(real, context).float()
            fake_scores = self.discriminator(fake, context).float()
            distance = (real_scores - fake_scores).square().mean((1, 2, 3)).sum()
            (gradient,) = torch.autograd.grad(distance, fake)
        gap = fake_scores.detach().mean() - real_scores.mean()
        return -gradient / (gradient.std(correction=0) + self.eps), gap

    def discriminator_loss(self, batch: ClipBatch, out: Reconstruction, step: int) -> LossAndMetrics:
        """Raises ValueError if sizes do not fit, or differ from those in the buffer."""
        real, fake, context = (tensor.detach() for tensor in self._inputs(batch, out))
        self._check_same_size(fake, context)
        draws = self._generator("draws", step, len(self._pending))
        is_fake = torch.rand((len(real), 1, 1, 1), generator=draws) < 0.5
        is_fake = to_device(is_fake, real.device)
        fakes, contexts = self.buffer.gather(self._draw_fakes(len(real), draws), fake, context)
        images = torch.where(is_fake, fakes, real)
        contexts = torch.where(is_fake, contexts, context)
        loss = self.discriminator_criterion(images, contexts, is_fake)
        # In host memory once the step's status has been read; a copy in `step` would wait for the GPU again.
        self._pending.append((to_host(fake.half()), to_host(context.half())))
        self._step = step
        skipped = torch.full((), float(self.skipped), device=real.device)
        return loss, {"seraena/discriminator_loss": loss.detach(), "seraena/skipped": skipped}

    def discriminator_criterion(self, images: Tensor, contexts: Tensor, is_fake: Tensor) -> Tensor:
        """MSE of scores in train mode against 1 where is_fake [N, 1, 1, 1], -1 elsewhere."""
        with autocast(self.device, self.precision):
            scores = torch.func.functional_call(self.discriminator, self.train_mode(), (images, contexts))
        with autocast_off(images.device):
            return F.mse_loss(scores.float(), (is_fake.float() * 2 - 1).expand(scores.shape))

    def step(self, grad_norm: float) -> None:
        """Update the discriminator. If the averaged gradient is not finite, on all ranks alike, skip and count it."""
        if self.update(self.lr, grad_norm):
            for i, (images, contexts) in enumerate(self._pending):
                self.buffer.push(images, contexts, self._generator("places", self._step, i))
        self.reset_step()

    def _reset(self) -> None:
        super()._reset()
        self._pending: list[tuple[Tensor, Tensor]] = []  # images and contexts for the buffer, per micro-batch

    def rank_state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """An empty state, of a rank that the saved run did not have, empties the buffer."""
        self.buffer.load_state_dict(state or {"images": [], "contexts": []})

    def _generator(self, purpose: str, step: int, micro_batch: int) -> torch.Generator:
        return generator_of(self.seed, "seraena", purpose, step, self.rank, micro_batch)

    def _draw_fakes(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices for ReplayBuffer.gather: fresh_fraction of them (in expectation) each element's own fake, the others
        random ones of buffer and batch."""
        kept = len(self.buffer)
        own = torch.randperm(count, generator=generator)
        own = own[: int(count * self.fresh_fraction + torch.rand((), generator=generator).item())]
        indices = torch.randint(kept + count, (count,), generator=generator)
        indices[own] = kept + own
        return indices

    def _inputs(self, batch: ClipBatch, out: Reconstruction) -> tuple[Tensor, Tensor, Tensor]:
        """Real and fake images and their context, checked, in fp32; only the fakes have a gradient."""
        real, fake = self.require_pair(batch, out)
        z = out.z
        if z.ndim != 5 or z.shape[0] != real.shape[0]:
            raise ValueError(f"latents of {len(real)} clips are [{len(real)}, C, t, h, w]; these are {list(z.shape)}")
        if z.shape[1] != self.context_channels:
            raise ValueError(
                f"the latents have {plural(z.shape[1], 'channel')}, adversary.context_channels is "
                f"{self.context_channels}; set it to {z.shape[1]}"
            )
        if min(real.shape[-2:]) < SERAENA_STRIDE:
            raise ValueError(
                f"the clip is {real.shape[-2]}x{real.shape[-1]}; Seraena needs {SERAENA_STRIDE} pixels or more"
            )
        groups = -(-real.shape[2] // self.frames)
        scores = len(real) * groups * math.prod(side // SERAENA_STRIDE for side in real.shape[-2:])
        if self.norm == "batch" and scores == 1:
            raise ValueError(
                "one image that small gives the batch norms a single value; use adversary.norm=group, or larger clips"
            )
        pair = self.buffer.bytes_of(3 * self.frames * real.shape[-2] * real.shape[-1], z[0, :, 0].numel())
        if not self.buffer.capacity(pair):
            raise ValueError(
                f"adversary.buffer_gib is {self.buffer_gib:g}, and one image of {plural(self.frames, 'frame')} takes "
                f"{pair / 2**30:.3g} GiB; raise it, or use null for no limit"
            )
        context = group_latents(z.detach().float(), groups, nearest=self.context == "nearest")
        real, fake = (group_frames((video.float() + 1) / 2, self.frames) for video in (real, fake))
        return real, fake, context

    def _check_same_size(self, images: Tensor, contexts: Tensor) -> None:
        """Raises ValueError unless images and contexts have the sizes of those in the buffer."""
        if len(self.buffer):
            image, context = self.buffer.pairs[0]
        elif self._pending:
            image, context = (batch[0] for batch in self._pending[0])
        else:
            return
        if (image.shape, context.shape) != (images.shape[1:], contexts.shape[1:]):
            raise ValueError(
                f"images and latents are {list(images.shape[1:])} and {list(contexts.shape[1:])}, those in Seraena's "
                f"buffer {list(image.shape)} and {list(context.shape)}; train at one resolution, and start a new run "
                "with stage.init_from for another"
            )


def _gradient_ratio(loss: Tensor, other: Tensor, video: Tensor) -> Tensor:
    """|d loss / d video| / |d other / d video|; infinite where `other` has no gradient."""
    (gradient,) = torch.autograd.grad(loss, video, retain_graph=True)
    (other_gradient,) = torch.autograd.grad(other, video, retain_graph=True, allow_unused=True)
    return gradient.norm() / (torch.zeros_like(gradient) if other_gradient is None else other_gradient).norm()


def ungroup_frames(images: Tensor, clips: int, count: int) -> Tensor:
    """Inverse of group_frames, [clips, 3, count, H, W], without the frames that filled the last group."""
    frames = images.reshape(clips, -1, 3, *images.shape[2:])
    return frames[:, :count].transpose(1, 2)


def group_latents(z: Tensor, groups: int, *, nearest: bool) -> Tensor:
    """Latents [B, C, t, h, w] -> [B * groups, C, h, w], one for every group of frames.

    Their mean over time, as published. nearest: for each group the mean of the latents that it overlaps in time.
    """
    if not nearest:
        return z.mean(2).repeat_interleave(groups, 0)
    return F.adaptive_avg_pool3d(z, (groups, *z.shape[3:])).transpose(1, 2).flatten(0, 1)

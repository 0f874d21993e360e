"""GAN on reconstructions with a PatchGAN discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vae3d.adversarial.adaptive import AdaptiveWeight
from vae3d.adversarial.base import (
    Betas,
    Decay,
    DiscriminatorAdversary,
    LossAndMetrics,
    Positive,
    Step,
    UpdatePhase,
    Weight,
    group_frames,
)
from vae3d.adversarial.criteria import CRITERIA, gradient_penalty, lecam, over_scales
from vae3d.adversarial.discriminators import MultiScale, Norm, PatchGAN, PatchGAN3D
from vae3d.arguments import Count, Depth, Width
from vae3d.errors import UserError
from vae3d.precision import autocast, autocast_off
from vae3d.schedules import ALL_ON, Schedule, learning_rate
from vae3d.types import ClipBatch, Reconstruction

NETWORKS = {"frames": PatchGAN, "clips": PatchGAN3D}


@dataclass(kw_only=True, eq=False)
class Gan(DiscriminatorAdversary):
    """`LPIPSWithDiscriminator` of CompVis/latent-diffusion `ldm/modules/losses/contperceptual.py` without its LPIPS,
    with a choice of discriminators, losses and regularisers.

    By default both networks train in every step, on the same reconstructions: the generator against the discriminator
    from before the step, in eval mode and frozen; the discriminator on detached reconstructions, in one forward pass
    with the clips. Power iteration of spectral norms and running statistics advance in the second pass only, and are
    kept aside until `step`, so a skipped step leaves no trace. Invalid pixels count as reconstructed perfectly.

    input: `frames`, each by itself, in 2D, or whole `clips`, in 3D. channels, layers, norm, groups, scales: see
    PatchGAN and MultiScale; the loss is the mean over scales.
    criterion: a name in criteria.CRITERIA. lecam: weight of LeCAM. lecam_decay: decay of its running averages, which
    start at 0 and are updated after each step. r1, r2: gamma in gamma / 2 * penalty, on clips and on reconstructions,
    in fp32; lazy as in StyleGAN2: every penalty_every steps, times penalty_every.

    weight: of the generator's loss, 0 before step `start` and ramped up over the next `ramp` steps. Before `start` it
    costs nothing. adaptive: multiply by AdaptiveWeight, at most adaptive_max.
    discriminator_start: its first step, by default `start`; set it earlier to pretrain the discriminator.
    alternate: from `start` on alternate the two updates, the generator first, as diffusers' train_autoencoderkl.py and
    the article of Glx.MLExamples' sd_vae_lightning do: half as many updates of each for the same clips.
    lr, betas, weight_decay, grad_clip (None: no clipping): of the discriminator's AdamW. schedule, warmup_steps,
    min_lr, cycles, power: see schedules.learning_rate, over the steps from discriminator_start to max_steps.
    precision: of the discriminator's activations; fp16 would need a loss scaler.
    Raises ValueError for settings that do not go together.
    """

    input: Literal["frames", "clips"] = "frames"
    channels: Width = 64
    layers: Depth = 3
    norm: Norm = "spectral_group"
    groups: Count = 32
    scales: Count = 1
    criterion: Literal["hinge", "vanilla", "non_saturating", "relativistic", "hinge_non_saturating"] = "hinge"
    lecam: Weight = 0.0
    lecam_decay: Decay = 0.999
    r1: Weight = 0.0
    r2: Weight = 0.0
    penalty_every: Count = 16
    weight: Weight = 1.0
    adaptive: bool = True
    adaptive_max: Positive = 1e4
    start: Step = 0
    ramp: Step = 0
    discriminator_start: Step | None = None
    alternate: bool = False
    lr: Positive = 1e-4
    betas: Betas = (0.5, 0.9)
    weight_decay: Weight = 0.0
    grad_clip: Positive | None = 1.0
    schedule: Schedule = "constant"
    warmup_steps: Step = 0
    max_steps: Step = 0
    min_lr: Weight = 0.0
    cycles: Count = 1
    power: Positive = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"

    name = "gan"
    title = "the GAN"
    decay_start = None  # right after the warm-up

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "batch" and (self.r1 or self.r2):
            raise ValueError(
                "adversary.norm=batch mixes images, so adversary.r1 and adversary.r2 would not be gradients of an "
                "image's own logits; use another norm, or 0 for both"
            )
        with torch.device("meta"):  # finds wrong groups; spectral norm cannot be wrong, and takes 0.2 s to begin
            self.build({"spectral_group": "group", "spectral": "none"}.get(self.norm, self.norm))
        self.adaptive_weight = AdaptiveWeight(self.adaptive_max) if self.adaptive else None

    def build(self, norm: Norm | None = None) -> MultiScale:
        """norm: instead of the one that was set."""
        settings = {"channels": self.channels, "layers": self.layers, "norm": norm or self.norm, "groups": self.groups}
        return MultiScale([NETWORKS[self.input](**settings) for _ in range(self.scales)])

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        self.averages = torch.zeros(2, self.scales, device=device)  # of the logits of clips and of reconstructions
        super().load(model, device, seed, rank, also_reduce=[self.averages])
        if self.adaptive_weight is not None:
            self.adaptive_weight.load(model, device)

    def update_phase(self, step: int) -> UpdatePhase:
        if self.alternate and step >= self.start:
            return UpdatePhase(model=(step - self.start) % 2 == 0, discriminator=(step - self.start) % 2 == 1)
        return super().update_phase(step)

    def generator_loss(self, batch: ClipBatch, out: Reconstruction, loss: Tensor, step: int) -> LossAndMetrics:
        """Raises ValueError if sizes differ, no trained part reaches the pixels, or as AdaptiveWeight does."""
        weight = torch.full((), self.weight_at(step), device=batch.video.device)  # torch.tensor would wait for a GPU
        if not self.weight_at(step):
            return weight, {}
        real, fake = self._inputs(batch, out)
        self.require_grad(out)
        with autocast_off(fake.device):
            value = self.generator_criterion(real, fake)
            metrics = {"loss/gan": value}
            if self.adaptive_weight is not None:
                factor, clamped = self.adaptive_weight(loss, value)
                weight = weight * factor
                metrics |= {"gan/adaptive_weight": factor, "gan/clamped": clamped}
            weighted = weight * value
        metrics |= {"gan/weight": weight, "loss_weighted/gan": weighted}
        return weighted, {name: metric.detach() for name, metric in metrics.items()}

    def generator_criterion(self, real: Tensor, fake: Tensor) -> Tensor:
        """Unweighted loss of the generator, with the discriminator frozen and in eval mode."""
        self.discriminator.eval()
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fake_logits = self._logits(frozen, fake)
        criterion = CRITERIA[self.criterion]
        real_logits = self._logits(frozen, real) if criterion.paired else fake_logits
        return over_scales(criterion.generator, real_logits, fake_logits)

    def discriminator_loss(self, batch: ClipBatch, out: Reconstruction, step: int) -> LossAndMetrics:
        """Raises ValueError if sizes differ."""
        real, fake = (images.detach() for images in self._inputs(batch, out))
        self._step = step
        with autocast_off(real.device):
            loss, metrics = self.discriminator_criterion(real, fake)
            if (self.r1 or self.r2) and self.apply_penalty(step):
                penalties = self.penalties(real, fake)
                gammas = {"gan/r1": self.r1, "gan/r2": self.r2}
                loss = loss + self.penalty_every / 2 * sum(gammas[name] * value for name, value in penalties.items())
                metrics |= penalties
        metrics["gan/skipped"] = torch.full((), float(self.skipped), device=real.device)
        metrics["gan/discriminator_grad_norm"] = torch.full((), self.grad_norm, device=real.device)
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def discriminator_criterion(self, real: Tensor, fake: Tensor) -> LossAndMetrics:
        """Loss of the discriminator in train mode, without its gradient penalties, and metrics."""
        pairs = [logits.chunk(2) for logits in self._logits(self.train_mode(), torch.cat([real, fake]))]
        real_logits, fake_logits = zip(*pairs, strict=True)
        value = loss = over_scales(CRITERIA[self.criterion].discriminator, real_logits, fake_logits)
        means = torch.stack([torch.stack([x.mean() for x in logits]) for logits in (real_logits, fake_logits)]).detach()
        self._logit_means.append(means)
        fraction = partial(over_scales, real=real_logits, fake=fake_logits)
        metrics = {
            "gan/discriminator_loss": value,
            "gan/logits_real": means[0].mean(),
            "gan/logits_fake": means[1].mean(),
            "gan/real_accuracy": fraction(lambda real, fake: (real > 0).float().mean()),
            "gan/fake_accuracy": fraction(lambda real, fake: (fake < 0).float().mean()),
            "gan/pair_accuracy": fraction(lambda real, fake: (real > fake).float().mean()),
        }
        if self.lecam:
            values = [lecam(*logits, *means) for logits, means in zip(pairs, self.averages.unbind(1), strict=True)]
            metrics["gan/lecam"] = torch.stack(values).mean()
            loss = loss + self.lecam * metrics["gan/lecam"]
        return loss, metrics

    def apply_penalty(self, step: int) -> bool:
        """Whether this step's update of the discriminator has gradient penalties: one in penalty_every."""
        alternating = self.alternate and step >= self.start
        updates = (step - self.discriminator_start) // (2 if alternating else 1)
        return step >= ALL_ON or updates % self.penalty_every == 0

    def penalties(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """R1 and R2, where their gamma is not 0, in fp32, with the singular vectors of the forward pass before."""
        self.discriminator.eval()
        penalties = {}
        for name, gamma, images in (("gan/r1", self.r1, real), ("gan/r2", self.r2, fake)):
            if gamma:
                images.requires_grad_()
                logits = functional_call(self.discriminator, self._buffers, (images,))
                penalties[name] = gradient_penalty(logits, images)
        return penalties

    def sync_remaining(self, step: int, micro_batches: int) -> Tensor | None:
        if self.adaptive_weight is not None and self.update_phase(step).model and self.weight_at(step):
            return self.adaptive_weight.sync_remaining(micro_batches)
        return None

    def error(self) -> UserError:
        """Of an adaptive weight of 0."""
        return AdaptiveWeight.error()

    def average_gradients(self) -> Tensor:
        self._means = torch.stack(self._logit_means).mean(0)
        return super().average_gradients(also_reduce=[self._means])

    def step(self, grad_norm: float) -> None:
        """Update the discriminator. If the averaged gradient is not finite, on all ranks alike, skip and count it."""
        first = self.discriminator_start
        lr = learning_rate(self, self._step - first, self.max_steps - first)
        if self.update(lr, grad_norm):
            self.averages.lerp_(self._means, 1 - self.lecam_decay)
        self.reset_step()

    def _reset(self) -> None:
        super()._reset()
        self._logit_means: list[Tensor] = []  # [clips and reconstructions, scales], per micro-batch

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"averages": self.averages, "grad_norm": self.grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.averages = state["averages"].to(self.device)
        self.grad_norm = state["grad_norm"]

    def _logits(self, tensors: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """Logits of every scale in fp32, with `tensors` in place of the discriminator's parameters or buffers."""
        with autocast(self.device, self.precision):
            return [logits.float() for logits in functional_call(self.discriminator, tensors, (x,))]

    def _inputs(self, batch: ClipBatch, out: Reconstruction) -> tuple[Tensor, Tensor]:
        """Real and fake frames [B * T, 3, H, W] or clips [B, 3, T, H, W] in fp32; the fake ones have the gradient."""
        real, fake = (video.float() for video in self.require_pair(batch, out))
        if batch.valid is not None:
            fake = torch.where(batch.valid, fake, real)
        return (real, fake) if self.input == "clips" else (group_frames(real, 1), group_frames(fake, 1))

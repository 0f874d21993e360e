"""GAN on reconstructions with a PatchGAN discriminator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vae3d.adversarial.adaptive import AdaptiveWeight
from vae3d.adversarial.base import UpdatePhase, check_settings, require_grad, require_pair, update_discriminator
from vae3d.adversarial.criteria import CRITERIA, gradient_penalty, lecam, over_scales
from vae3d.adversarial.discriminators import MultiScale, PatchGAN, PatchGAN3D
from vae3d.adversarial.frame_groups import group_frames
from vae3d.arguments import ArgumentError
from vae3d.precision import autocast, autocast_off
from vae3d.restore import check_like, load_optimizer
from vae3d.schedules import ALL_ON, learning_rate
from vae3d.schedules import ramp as ramp_at
from vae3d.seeding import seed_of
from vae3d.types import Clip, Reconstruction

NETWORKS = {"frames": PatchGAN, "clips": PatchGAN3D}
CHOICES = {"input": NETWORKS, "criterion": CRITERIA, "precision": ("fp32", "bf16")}
MINIMUMS = dict.fromkeys(("lecam", "r1", "r2", "weight", "start", "ramp", "discriminator_start"), 0)
MINIMUMS |= {"scales": 1, "penalty_every": 1}


class Gan:
    """`LPIPSWithDiscriminator` of CompVis/latent-diffusion `ldm/modules/losses/contperceptual.py` without its LPIPS,
    with a choice of discriminators, losses and regularisers.

    By default both networks train in every step, on the same reconstructions: the generator against the discriminator
    from before the step, in eval mode and frozen; the discriminator on detached reconstructions, in one forward pass
    with the clips. Power iteration of spectral norms and running statistics advance in the second pass only, and are
    kept aside until `step`, so a skipped step leaves no trace. Invalid pixels count as reconstructed perfectly.

    input: `frames`, each by itself, in 2D, or whole `clips`, in 3D. channels, layers, norm, groups, scales: see
    PatchGAN and MultiScale; the loss is the mean over scales.
    criterion: a name in criteria.CRITERIA. lecam: weight of this regulariser; lecam_decay: of its running averages,
    which start at 0 and are updated after each step. r1, r2: gamma in gamma / 2 * penalty, on clips and on
    reconstructions, in fp32; lazy as in StyleGAN2: every penalty_every steps, times penalty_every.

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

    def __init__(
        self,
        *,
        input: str = "frames",
        channels: int = 64,
        layers: int = 3,
        norm: str = "spectral_group",
        groups: int = 32,
        scales: int = 1,
        criterion: str = "hinge",
        lecam: float = 0.0,
        lecam_decay: float = 0.999,
        r1: float = 0.0,
        r2: float = 0.0,
        penalty_every: int = 16,
        weight: float = 1.0,
        adaptive: bool = True,
        adaptive_max: float = 1e4,
        start: int = 0,
        ramp: int = 0,
        discriminator_start: int | None = None,
        alternate: bool = False,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.9),
        weight_decay: float = 0.0,
        grad_clip: float | None = 1.0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        max_steps: int = 0,
        min_lr: float = 0.0,
        cycles: int = 1,
        power: float = 1.0,
        precision: str = "fp32",
    ) -> None:
        self.input = input
        self.network = {"channels": channels, "layers": layers, "norm": norm, "groups": groups}
        self.scales = scales
        self.criterion = criterion
        self.lecam = lecam
        self.lecam_decay = lecam_decay
        self.r1 = r1
        self.r2 = r2
        self.penalty_every = penalty_every
        self.weight = weight
        self.adaptive = AdaptiveWeight(adaptive_max) if adaptive else None
        self.start = start
        self.ramp = ramp
        self.discriminator_start = start if discriminator_start is None else discriminator_start
        self.alternate = alternate
        self.adamw = {"betas": tuple(betas), "weight_decay": weight_decay}
        self.grad_clip = grad_clip
        self.schedule = {
            "lr": lr,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "max_steps": max_steps - self.discriminator_start,
            "min_lr": min_lr,
            "cycles": cycles,
            "power": power,
        }
        self.precision = precision
        check_settings(vars(self), CHOICES, MINIMUMS)
        if not 0 <= lecam_decay < 1:
            raise ValueError(f"adversary.lecam_decay is {lecam_decay}; use 0 to less than 1")
        for key, value in (("adaptive_max", adaptive_max), ("grad_clip", grad_clip)):
            if value is not None and not value > 0:
                raise ValueError(f"adversary.{key} is {value}; use a positive number")
        if norm == "batch" and (r1 or r2):
            raise ValueError(
                "adversary.norm=batch mixes images, so adversary.r1 and adversary.r2 would not be gradients of an "
                "image's own logits; use another norm, or 0 for both"
            )
        self.lr_at(ALL_ON)  # raises for an unknown schedule
        with torch.device("meta"):
            self._build()
        self.skipped = 0  # steps whose gradients were not finite
        self.grad_norm = 0.0  # of the last update, before clipping
        self._reset()

    def _build(self) -> MultiScale:
        return MultiScale([NETWORKS[self.input](**self.network) for _ in range(self.scales)])

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed_of(seed, "gan"))  # of the CPU only
            self.discriminator = self._build().to(device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=self.schedule["lr"], **self.adamw)
        self.averages = torch.zeros(2, self.scales, device=device)  # of the logits of clips and of reconstructions
        if self.adaptive is not None:
            self.adaptive.load(model, device)

    def update_phase(self, step: int) -> UpdatePhase:
        if self.alternate and step >= self.start:
            return UpdatePhase(generator=(step - self.start) % 2 == 0, discriminator=(step - self.start) % 2 == 1)
        return UpdatePhase(generator=True, discriminator=step >= self.discriminator_start)

    def weight_at(self, step: int) -> float:
        """Weight of the generator's loss, without the adaptive weight."""
        return self.weight * ramp_at(step, self.start, self.start + self.ramp)

    def lr_at(self, step: int) -> float:
        return learning_rate(step - self.discriminator_start, **self.schedule)

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if sizes differ, no trained part reaches the pixels, or as AdaptiveWeight does."""
        weight = torch.tensor(self.weight_at(step), device=clip.video.device)
        if not self.weight_at(step):
            return weight, {}
        real, fake = self._inputs(clip, out)
        require_grad("the GAN", out)
        with autocast_off(fake.device):
            value = self.generator_criterion(real, fake)
            metrics = {"loss/gan": value}
            if self.adaptive is not None:
                factor, clamped = self.adaptive(loss, value)
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

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if sizes differ."""
        real, fake = (images.detach() for images in self._inputs(clip, out))
        if not self._buffers:
            self._buffers = {name: tensor.clone() for name, tensor in self.discriminator.named_buffers()}
        self._step = step
        with autocast_off(real.device):
            loss, metrics = self.discriminator_criterion(real, fake)
            if (self.r1 or self.r2) and self.apply_penalty(step):
                penalties = self.penalties(real, fake)
                gammas = {"gan/r1": self.r1, "gan/r2": self.r2}
                loss = loss + self.penalty_every / 2 * sum(gammas[name] * value for name, value in penalties.items())
                metrics |= penalties
        metrics["gan/skipped"] = torch.tensor(float(self.skipped), device=real.device)
        metrics["gan/discriminator_grad_norm"] = torch.tensor(self.grad_norm, device=real.device)
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def discriminator_criterion(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the discriminator in train mode, without its gradient penalties, and metrics."""
        self.discriminator.train()
        pairs = [logits.chunk(2) for logits in self._logits(self._buffers, torch.cat([real, fake]))]
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

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        if self.adaptive is not None and self.update_phase(step).generator and self.weight_at(step):
            self.adaptive.sync_remaining(micro_batches)

    def step(self) -> None:
        """Update the discriminator. If the averaged gradient is not finite, on all ranks alike, skip and count it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self._step)
        means = torch.stack(self._logit_means).mean(0)
        norm = update_discriminator(
            self.discriminator, self.optimizer, self._buffers, self.grad_clip, also_reduce=[means]
        )
        if math.isfinite(norm):
            self.grad_norm = norm
            self.averages.lerp_(means, 1 - self.lecam_decay)
        else:
            self.skipped += 1
        self.reset_step()

    def reset_step(self) -> None:
        self.optimizer.zero_grad()
        self._reset()

    def _reset(self) -> None:
        """Drop what this optimizer step kept aside."""
        self._buffers: dict[str, Tensor] = {}  # the discriminator's, as this step's micro-batches changed them
        self._logit_means: list[Tensor] = []  # [clips and reconstructions, scales], per micro-batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
            "skipped": self.skipped,
            "grad_norm": self.grad_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError for the state of another discriminator."""
        check_like(state, self.state_dict() | {"optimizer": None}, "adversary")
        self.discriminator.load_state_dict(state["discriminator"])
        load_optimizer(self.optimizer, state["optimizer"], "adversary.optimizer")
        self.averages = state["averages"].to(self.device)
        self.skipped = state["skipped"]
        self.grad_norm = state["grad_norm"]

    def rank_state_dict(self) -> dict[str, Any]:
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary has state of a rank, and a GAN has none")

    def _logits(self, tensors: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """Logits of every scale in fp32, with `tensors` in place of the discriminator's parameters or buffers."""
        with autocast(self.device, self.precision):
            return [logits.float() for logits in functional_call(self.discriminator, tensors, (x,))]

    def _inputs(self, clip: Clip, out: Reconstruction) -> tuple[Tensor, Tensor]:
        """Real and fake frames [B * T, 3, H, W] or clips [B, 3, T, H, W] in fp32; the fake ones have the gradient."""
        real, fake = (video.float() for video in require_pair("the GAN", clip, out))
        if clip.valid is not None:
            fake = torch.where(clip.valid, fake, real)
        return (real, fake) if self.input == "clips" else (group_frames(real, 1), group_frames(fake, 1))

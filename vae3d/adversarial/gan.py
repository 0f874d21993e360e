"""A GAN on reconstructions: a PatchGAN tells them from the clips, and the decoder is taught to deceive it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vae3d.adversarial.adaptive import AdaptiveWeight
from vae3d.adversarial.base import UpdatePhase, require_pair, update
from vae3d.adversarial.criteria import CRITERIA, gradient_penalty, lecam, over_scales
from vae3d.adversarial.groups import images_of
from vae3d.adversarial.patchgan import MultiScale, PatchGAN, PatchGAN3D
from vae3d.arguments import ArgumentError
from vae3d.precision import autocast_off
from vae3d.restore import check_like, load_optimizer
from vae3d.schedules import ALL_ON, learning_rate
from vae3d.schedules import ramp as ramp_at
from vae3d.seeding import seed_of
from vae3d.types import Clip, Reconstruction

NETWORKS = {"frames": PatchGAN, "clips": PatchGAN3D}
PRECISIONS = ("fp32", "bf16")


class Gan:
    """`LPIPSWithDiscriminator` of CompVis/latent-diffusion `ldm/modules/losses/contperceptual.py` without its LPIPS,
    with other discriminators, losses and regularisers at choice.

    Both networks learn in every step, from the same reconstructions: the generator from the discriminator as it was
    before the step, in eval mode and without a gradient of its own; the discriminator from detached reconstructions, in
    one forward pass with the clips. Power iteration of spectral norms and running statistics go on in the second pass
    only, and are kept aside until `step`: a step that is skipped leaves no trace. Pixels that are not valid count as
    reconstructed perfectly.

    input: `frames`, one by one, in 2D, or whole `clips`, in 3D. channels, layers, norm, groups, scales: see PatchGAN
    and MultiScale; the loss of several scales is their mean.
    criterion: a name in criteria.CRITERIA. lecam: weight of that regulariser, of lecam_decay; its averages begin at 0
    and follow each step, so that a step sees those before it. r1, r2: gamma of gamma / 2 * penalty, on clips and on
    reconstructions, computed in fp32 every penalty_every steps and as many times as large then, as in StyleGAN2.

    weight: of the generator's loss, 0 before step `start` and rising over `ramp` steps from there; what it costs also
    begins there. adaptive: times AdaptiveWeight, at most adaptive_max.
    discriminator_start: its first step, by default `start`; an earlier one puts it ahead of the generator.
    alternate: from `start` on let the two take turns, the generator first, as the requirement and the diffusers script
    do: half as many updates of each for the same clips.
    lr, betas, weight_decay, grad_clip (None: any norm): of the discriminator's AdamW. schedule, warmup_steps, min_lr,
    cycles, power: see schedules.learning_rate, over the steps from discriminator_start to max_steps.
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
        self.input, self.norm, self.scales = input, norm, scales
        self.shape = {"channels": channels, "layers": layers, "norm": norm, "groups": groups}
        self.criterion, self.lecam, self.lecam_decay = criterion, lecam, lecam_decay
        self.r1, self.r2, self.penalty_every = r1, r2, penalty_every
        self.weight, self.start, self.ramp, self.alternate = weight, start, ramp, alternate
        self.adaptive_max, self.adaptive = adaptive_max, AdaptiveWeight(adaptive_max) if adaptive else None
        self.discriminator_start = start if discriminator_start is None else discriminator_start
        self.adamw = {"betas": tuple(betas), "weight_decay": weight_decay}
        self.rate = {"lr": lr, "schedule": schedule, "warmup_steps": warmup_steps, "min_lr": min_lr}
        self.rate |= {"cycles": cycles, "power": power}
        self.grad_clip, self.max_steps, self.precision = grad_clip, max_steps, precision
        self._check_known_settings()
        self.skipped = 0  # steps whose gradients were not finite
        self.grad_norm = 0.0  # of the last update, before clipping
        self._forget()

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed_of(seed, "gan"))  # the CPU's alone
            self.discriminator = self._network().to(device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=self.rate["lr"], **self.adamw)
        self.averages = torch.zeros(2, self.scales, device=device)  # of logits of clips and of reconstructions
        if self.adaptive is not None:
            self.adaptive.load(model, device)

    def update_phase(self, step: int) -> UpdatePhase:
        if self.alternate and step >= self.start:
            return UpdatePhase(generator=(step - self.start) % 2 == 0, discriminator=(step - self.start) % 2 == 1)
        return UpdatePhase(generator=True, discriminator=step >= self.discriminator_start)

    def weight_at(self, step: int) -> float:
        """Of the generator's loss, but for the adaptive weight."""
        return self.weight * ramp_at(step, self.start, self.start + self.ramp)

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if sizes do not fit, no trained part reaches the pixels, or the adaptive weight has none to
        measure at."""
        strength = torch.tensor(self.weight_at(step), device=clip.video.device)
        if not self.weight_at(step):
            return strength, {}
        real, fake = self._images(clip, out)
        if not out.video.requires_grad:
            raise ValueError("no part that trains reaches the pixels, which the GAN judges; use adversary=none")
        with autocast_off(fake.device):
            value = self.deceive(real, fake)
            metrics = {"loss/gan": value}
            if self.adaptive is not None:
                factor, clamped = self.adaptive(loss, value)
                strength = strength * factor
                metrics |= {"gan/adaptive_weight": factor, "gan/clamped": clamped}
            weighted = strength * value
        metrics |= {"gan/weight": strength, "loss_weighted/gan": weighted}
        return weighted, {name: metric.detach() for name, metric in metrics.items()}

    def deceive(self, real: Tensor, fake: Tensor) -> Tensor:
        """The generator's loss on images or clips, by a discriminator in eval mode that gets no gradient."""
        self.discriminator.eval()
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        of_fake = self._logits(frozen, fake)
        criterion = CRITERIA[self.criterion]
        of_real = self._logits(frozen, real) if criterion.paired else of_fake
        return over_scales(criterion.generator, of_real, of_fake)

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if sizes do not fit."""
        real, fake = (images.detach() for images in self._images(clip, out))
        if not self._buffers:
            self._buffers = {name: tensor.clone() for name, tensor in self.discriminator.named_buffers()}
        self._step = step
        with autocast_off(real.device):
            loss, metrics = self.judge(real, fake)
            if (self.r1 or self.r2) and self.penalised(step):
                penalties = self.penalties(real, fake)
                gammas = {"gan/r1": self.r1, "gan/r2": self.r2}
                loss = loss + self.penalty_every / 2 * sum(gammas[name] * value for name, value in penalties.items())
                metrics |= penalties
        told = {"skipped": float(self.skipped), "discriminator_grad_norm": self.grad_norm}
        metrics |= {f"gan/{name}": torch.tensor(value, device=real.device) for name, value in told.items()}
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on images or clips without its penalties, in train mode, and what it tells."""
        self.discriminator.train()
        pairs = [logits.chunk(2) for logits in self._logits(self._buffers, torch.cat([real, fake]))]
        of_real, of_fake = zip(*pairs, strict=True)
        value = loss = over_scales(CRITERIA[self.criterion].discriminator, of_real, of_fake)
        means = torch.stack([torch.stack([x.mean() for x in logits]) for logits in (of_real, of_fake)]).detach()
        self._means.append(means)
        share = partial(over_scales, real=of_real, fake=of_fake)
        metrics = {
            "gan/discriminator_loss": value,
            **{f"gan/logits_{name}": mean.mean() for name, mean in zip(("real", "fake"), means, strict=True)},
            "gan/real_accuracy": share(lambda real, fake: (real > 0).float().mean()),
            "gan/fake_right": share(lambda real, fake: (fake < 0).float().mean()),
            "gan/pair_right": share(lambda real, fake: (real > fake).float().mean()),
        }
        if self.lecam:
            regular = [lecam(*both, *seen) for both, seen in zip(pairs, self.averages.unbind(1), strict=True)]
            metrics["gan/lecam"] = torch.stack(regular).mean()
            loss = loss + self.lecam * metrics["gan/lecam"]
        return loss, metrics

    def penalised(self, step: int) -> bool:
        """Whether an update of the discriminator at this step is one of every penalty_every."""
        turns = self.alternate and step >= self.start
        updates = (step - self.discriminator_start) // (2 if turns else 1)
        return step >= ALL_ON or updates % self.penalty_every == 0

    def penalties(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """R1 and R2, each if wanted, in fp32, under the singular vectors that the forward pass before has left."""
        self.discriminator.eval()
        found = {}
        for name, gamma, images in (("gan/r1", self.r1, real), ("gan/r2", self.r2, fake)):
            if gamma:
                images.requires_grad_()
                logits = functional_call(self.discriminator, self._buffers, (images,))
                found[name] = gradient_penalty(logits, images)
        return found

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        if self.adaptive is not None and self.update_phase(step).generator and self.weight_at(step):
            self.adaptive.sync_remaining(micro_batches)

    def step(self) -> None:
        """A step whose averaged gradient is not finite is discarded, on all ranks alike, and counted."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self._step)
        means = torch.stack(self._means).mean(0)
        norm = update(self.discriminator, self.optimizer, self._buffers, self.grad_clip, also=[means])
        if not math.isfinite(norm):
            self.skipped += 1
            self.reset_step()
            return
        self.grad_norm = norm
        self.averages.lerp_(means, 1 - self.lecam_decay)
        self.reset_step()

    def lr_at(self, step: int) -> float:
        before = self.discriminator_start
        return learning_rate(step - before, max_steps=self.max_steps - before, **self.rate)

    def reset_step(self) -> None:
        self.optimizer.zero_grad()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        parts = {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "averages": self.averages, "skipped": self.skipped, "grad_norm": self.grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError for the state of another discriminator."""
        check_like(state, self.state_dict() | {"optimizer": None}, "adversary")
        self.discriminator.load_state_dict(state["discriminator"])
        load_optimizer(self.optimizer, state["optimizer"], "adversary.optimizer")
        self.averages = state["averages"].to(self.device)
        self.skipped, self.grad_norm = state["skipped"], state["grad_norm"]

    def rank_state_dict(self) -> dict[str, Any]:
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary is of a rank, of which a GAN keeps nothing")

    def _network(self) -> MultiScale:
        return MultiScale([NETWORKS[self.input](**self.shape) for _ in range(self.scales)])

    def _forget(self) -> None:
        """Drop what this optimizer step kept aside."""
        self._buffers: dict[str, Tensor] = {}  # the discriminator's, as this step's micro-batches changed them
        self._means: list[Tensor] = []  # of logits [clips and reconstructions, scales], per micro-batch

    def _logits(self, tensors: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """Of every scale, in fp32, with these in place of the discriminator's own parameters or buffers."""
        half = self.precision == "bf16" and self.device.type != "meta"
        how: AbstractContextManager[object]
        how = torch.autocast(self.device.type, torch.bfloat16) if half else autocast_off(self.device)
        with how:
            return [logits.float() for logits in functional_call(self.discriminator, tensors, (x,))]

    def _images(self, clip: Clip, out: Reconstruction) -> tuple[Tensor, Tensor]:
        """Real and fake frames [B * T, 3, H, W] or clips [B, 3, T, H, W] in fp32; the fake ones carry the gradient."""
        real, fake = (video.float() for video in require_pair("the GAN", clip, out))
        if clip.valid is not None:
            fake = torch.where(clip.valid, fake, real)
        return (real, fake) if self.input == "clips" else (images_of(real, 1), images_of(fake, 1))

    def _check_known_settings(self) -> None:
        for key, allowed in (("input", NETWORKS), ("criterion", CRITERIA), ("precision", PRECISIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"adversary.{key} is {getattr(self, key)!r}; use {' or '.join(allowed)}")
        least = {
            "weight": 0,
            "start": 0,
            "ramp": 0,
            "discriminator_start": 0,
            "scales": 1,
            "lecam": 0,
            "r1": 0,
            "r2": 0,
        }
        for key, bound in {**least, "penalty_every": 1}.items():
            if getattr(self, key) < bound:
                raise ValueError(f"adversary.{key} is {getattr(self, key)}; use {bound} or more")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"adversary.lecam_decay is {self.lecam_decay}; use 0 to less than 1")
        for key in ("adaptive_max", "grad_clip"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"adversary.{key} is {getattr(self, key)}; use a positive number")
        if self.discriminator_start > self.start:
            raise ValueError(
                f"adversary.discriminator_start is {self.discriminator_start}, after adversary.start={self.start}, so "
                "that the generator would learn to deceive random weights; use that or less, or null"
            )
        if self.norm == "batch" and (self.r1 or self.r2):
            raise ValueError(
                "adversary.norm=batch mixes images, so that adversary.r1 and adversary.r2 would not be gradients of an "
                "image's own logits; use another norm, or 0 for both"
            )
        self.lr_at(ALL_ON)
        with torch.device("meta"):
            self._network()

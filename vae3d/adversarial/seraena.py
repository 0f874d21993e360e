"""Seraena (madebyollin/seraena): a discriminator that corrects reconstructions instead of judging them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.adversarial.base import UpdatePhase, require_pair, update
from vae3d.adversarial.groups import context_of, images_of, video_of
from vae3d.adversarial.patch import NORMS, STRIDE, ConditionalPatchDiscriminator
from vae3d.adversarial.replay import Replay
from vae3d.precision import autocast_off
from vae3d.restore import check_like, load_optimizer
from vae3d.schedules import ramp as ramp_at
from vae3d.seeding import generator_of, seed_of
from vae3d.types import Clip, Reconstruction

CONTEXTS = ("mean", "nearest")
PRECISIONS = ("fp32", "bf16")


class Seraena:
    """After `seraena.py` and `TAEHV_Training_Example.ipynb` of madebyollin/seraena. Groups of frames are images
    [N, 3 * frames, H, W] in [0, 1] (see groups.images_of), each with the latents that it was decoded from.

    Generator: with c = -d/dfake of sum_n mean (D(real) - D(fake))^2, D in eval mode, and one standard deviation for
    the whole micro-batch, the target is fake + c / (std(c) + floor) and the loss MSE(fake, target). By construction its
    value is 1 where std(c) is far above the floor, and less elsewhere: it does not tell how well the generator does.
    The score gap and the ratio of gradients tell more. A mask of valid pixels and the weight of pixels do not enter.
    Discriminator: of the fakes a share of `fresh` is the batch's, the others are drawn from buffer and batch; each
    place of the batch shows its fake (target 1) or its real image (target -1), by a coin; MSE; AdamW with torch's
    defaults for the rest.

    Unlike there, the correction comes from the discriminator before this step's update, since a step that is skipped
    must leave no trace: what a step changes, running statistics and buffer included, is put aside until `step`.
    All draws are pure functions of (seed, step, rank, micro-batch). Half precision is bf16, which needs no loss scaler;
    fp16 is refused, since the correction's gradient would underflow.

    context_channels: of the latents.
    weight: of the generator's loss, 0 before step `start` and rising over `ramp` steps from there.
    discriminator_start: its first step, by default `start`; an earlier one puts it ahead of the generator.
    frames: of one image. context: the clip's latents as their `mean`, as published, or those `nearest` in time.
    floor: keeps corrections small where c is. c is smaller the larger the image, by its area, so that with the
    published 1e-5, for 64 x 64, the pull weakens.
    buffer_length: images kept on each rank. grad_clip: norm of the discriminator's gradient, None for any.
    diagnostics_every: steps between measurements of the ratio of gradients, 0 for none.
    """

    def __init__(
        self,
        *,
        context_channels: int,
        weight: float = 1.0,
        start: int = 0,
        ramp: int = 0,
        discriminator_start: int | None = None,
        frames: int = 3,
        context: str = "mean",
        floor: float = 1e-5,
        buffer_length: int = 16384,
        fresh: float = 0.5,
        lr: float = 3e-4,
        betas: Sequence[float] = (0.9, 0.99),
        grad_clip: float | None = None,
        norm: str = "batch",
        channels: Sequence[int] = (64, 128, 256, 512, 512, 512),
        precision: str = "fp32",
        diagnostics_every: int = 50,
    ) -> None:
        self.weight, self.start, self.ramp = weight, start, ramp
        self.discriminator_start = start if discriminator_start is None else discriminator_start
        self.frames, self.context, self.context_channels = frames, context, context_channels
        self.floor, self.fresh, self.lr, self.betas, self.grad_clip = floor, fresh, lr, tuple(betas), grad_clip
        self.norm, self.channels, self.precision, self.diagnostics_every = norm, channels, precision, diagnostics_every
        self.buffer = Replay(buffer_length)
        self._check_known_settings()
        self.skipped = 0  # steps whose gradients were not finite
        self._forget()

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        self.device, self.seed, self.rank = device, seed, rank
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed_of(seed, "seraena"))  # the CPU's alone
            network = ConditionalPatchDiscriminator(
                3 * self.frames, self.context_channels, self.channels, norm=self.norm
            )
        self.discriminator = network.to(device)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, betas=self.betas)

    def update_phase(self, step: int) -> UpdatePhase:
        return UpdatePhase(generator=True, discriminator=step >= self.discriminator_start)

    def generator_loss(
        self, clip: Clip, out: Reconstruction, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if sizes do not fit or no trained part reaches the pixels."""
        strength = self.weight * ramp_at(step, self.start, self.start + self.ramp)
        if not strength:
            return torch.zeros((), device=clip.video.device), {}
        real, fake, context = self._images(clip, out)
        if not out.video.requires_grad:
            raise ValueError("no part that trains reaches the pixels, which Seraena corrects; use adversary=none")
        with autocast_off(fake.device):
            correction, gap = self.correction(real, fake, context)
            pixels = (out.video.float() + 1) / 2
            target = pixels.detach() + video_of(correction, pixels.shape[0], pixels.shape[2])
            mse = F.mse_loss(pixels, target)
        metrics = {"loss/seraena": mse, "loss_weighted/seraena": strength * mse, "seraena/score_gap": gap}
        if self.diagnostics_every and step % self.diagnostics_every == 0:
            metrics["seraena/correction_over_reconstruction"] = _gradient_ratio(strength * mse, loss, out.video)
        return strength * mse, {name: value.detach() for name, value in metrics.items()}

    def correction(self, real: Tensor, fake: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to fake images [N, C, H, W] in [0, 1], of standard deviation 1; and mean D(fake) - D(real)."""
        self.discriminator.eval()
        with torch.enable_grad(), self._autocast():
            fake = fake.detach().requires_grad_()
            with torch.no_grad():
                wanted = self.discriminator(real, context).float()
            found = self.discriminator(fake, context).float()
            distance = (wanted - found).square().mean((1, 2, 3)).sum()
            (gradient,) = torch.autograd.grad(distance, fake)
        return -gradient / (gradient.std(correction=0) + self.floor), found.detach().mean() - wanted.mean()

    def discriminator_loss(self, clip: Clip, out: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if sizes do not fit, or are others than before."""
        real, fake, context = (tensor.detach() for tensor in self._images(clip, out))
        self._check_same_size(fake, context)
        draws = self._generator("draws", step, len(self._pending))
        is_fake = torch.rand((len(real), 1, 1, 1), generator=draws) < 0.5
        is_fake = is_fake.to(real.device)
        fakes, contexts = self.buffer.pick(self._choose(len(real), draws), fake, context)
        images, contexts = torch.where(is_fake, fakes, real), torch.where(is_fake, contexts, context)
        loss = self.loss_on(images, contexts, is_fake)
        self._pending.append((fake.half(), context.half()))
        self._step = step
        skipped = torch.tensor(float(self.skipped), device=real.device)
        return loss, {"seraena/discriminator_loss": loss.detach(), "seraena/skipped": skipped}

    def loss_on(self, images: Tensor, contexts: Tensor, is_fake: Tensor) -> Tensor:
        """MSE of train-mode scores against 1 where is_fake [N, 1, 1, 1], -1 elsewhere."""
        if not self._statistics:
            self._statistics = {name: tensor.clone() for name, tensor in self.discriminator.named_buffers()}
        self.discriminator.train()
        with self._autocast():
            scores = torch.func.functional_call(self.discriminator, self._statistics, (images, contexts))
        with autocast_off(images.device):
            return F.mse_loss(scores.float(), (is_fake.float() * 2 - 1).expand(scores.shape))

    def sync_remaining(self, step: int, micro_batches: int) -> None:
        """Only `step` communicates."""

    def step(self) -> None:
        """A step whose averaged gradient is not finite is discarded, on all ranks alike, and counted."""
        norm = update(self.discriminator, self.optimizer, self._statistics, self.grad_clip)
        if not math.isfinite(norm):
            self.skipped += 1
            self.reset_step()
            return
        for i, (images, contexts) in enumerate(self._pending):
            self.buffer.push(images, contexts, self._generator("places", self._step, i))
        self.reset_step()

    def reset_step(self) -> None:
        self.optimizer.zero_grad()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        parts = {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError for the state of another discriminator."""
        check_like(state, self.state_dict() | {"optimizer": None}, "adversary")
        self.discriminator.load_state_dict(state["discriminator"])
        load_optimizer(self.optimizer, state["optimizer"], "adversary.optimizer")
        for group in self.optimizer.param_groups:  # the checkpoint's own came back with its moments
            group["lr"] = self.lr
        self.skipped = state["skipped"]

    def rank_state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Empty: an empty buffer, for a rank that the checkpoint's run did not have."""
        self.buffer.load_state_dict(state or {"images": [], "contexts": []})

    def _forget(self) -> None:
        """Drop what this optimizer step kept aside."""
        self._pending: list[tuple[Tensor, Tensor]] = []  # per micro-batch, on its way to the buffer
        self._statistics: dict[str, Tensor] = {}  # running ones, as this step's micro-batches changed them

    def _generator(self, purpose: str, step: int, micro_batch: int) -> torch.Generator:
        return generator_of(self.seed, "seraena", purpose, step, self.rank, micro_batch)

    def _choose(self, count: int, generator: torch.Generator) -> Tensor:
        """For every place of the batch, which fake to show: its own in a share of `fresh`, on average where that is no
        whole number, or any of buffer and batch."""
        kept = len(self.buffer)
        own = torch.randperm(count, generator=generator)
        own = own[: int(count * self.fresh + torch.rand((), generator=generator).item())]
        chosen = torch.randint(kept + count, (count,), generator=generator)
        chosen[own] = kept + own
        return chosen

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32" or self.device.type == "meta":
            return autocast_off(self.device)
        return torch.autocast(self.device.type, torch.bfloat16)

    def _images(self, clip: Clip, out: Reconstruction) -> tuple[Tensor, Tensor, Tensor]:
        """Real and fake images and their context, all checked and in fp32; only fakes carry a gradient."""
        self._check_shapes(clip, out)
        groups = -(-clip.video.shape[2] // self.frames)
        context = context_of(out.z.detach().float(), groups, nearest=self.context == "nearest")
        real, fake = (images_of((video.float() + 1) / 2, self.frames) for video in (clip.video, out.video))
        return real, fake, context

    def _check_shapes(self, clip: Clip, out: Reconstruction) -> None:
        real, z = require_pair("Seraena", clip, out)[0], out.z
        if z.ndim != 5 or z.shape[0] != real.shape[0]:
            raise ValueError(f"latents of {len(real)} clips are [{len(real)}, C, t, h, w]; these are {list(z.shape)}")
        if z.shape[1] != self.context_channels:
            raise ValueError(
                f"the latents have {z.shape[1]} channels, adversary.context_channels is {self.context_channels}; "
                f"set it to {z.shape[1]}"
            )
        if min(real.shape[-2:]) < STRIDE:
            raise ValueError(f"the clip is {real.shape[-2]}x{real.shape[-1]}; Seraena needs {STRIDE} pixels or more")
        places = -(-real.shape[2] // self.frames) * len(real) * math.prod(side // STRIDE for side in real.shape[-2:])
        if self.norm == "batch" and places == 1:
            raise ValueError(
                "one image that small gives the batch norms a single value; use adversary.norm=group, or larger clips"
            )

    def _check_same_size(self, images: Tensor, contexts: Tensor) -> None:
        """Where images lie together, in the buffer, all are of one size."""
        known = self.buffer.pairs[0] if len(self.buffer) else None
        if known is None and self._pending:
            known = self._pending[0][0][0], self._pending[0][1][0]
        if known is not None and (known[0].shape, known[1].shape) != (images.shape[1:], contexts.shape[1:]):
            before, now = ([list(tensor.shape) for tensor in pair] for pair in (known, (images[0], contexts[0])))
            raise ValueError(
                f"images and latents are {now[0]} and {now[1]}, those in Seraena's buffer {before[0]} and {before[1]}; "
                "train at one resolution, and go to another one by a new run with stage.init_from"
            )

    def _check_known_settings(self) -> None:
        for key, allowed in (("context", CONTEXTS), ("norm", NORMS), ("precision", PRECISIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"adversary.{key} is {getattr(self, key)!r}; use {' or '.join(allowed)}")
        least = {"weight": 0, "start": 0, "ramp": 0, "discriminator_start": 0, "frames": 1, "diagnostics_every": 0}
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise ValueError(f"adversary.{key} is {getattr(self, key)}; use {bound} or more")
        if self.buffer.length < 1:
            raise ValueError(f"adversary.buffer_length is {self.buffer.length}; use 1 or more")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"adversary.fresh is {self.fresh}; use a share, 0 to 1")
        if self.floor <= 0:
            raise ValueError(f"adversary.floor is {self.floor}; use a positive number")
        if not self.channels:
            raise ValueError("adversary.channels is empty; give the width of every block")
        if self.discriminator_start > self.start:
            raise ValueError(
                f"adversary.discriminator_start is {self.discriminator_start}, after adversary.start={self.start}, so "
                "that its first corrections would be of random weights; use that or less, or null"
            )


def _gradient_ratio(loss: Tensor, other: Tensor, video: Tensor) -> Tensor:
    """Norm of d loss / d video over norm of d other / d video; infinite where `other` does not pull at all."""
    (mine,) = torch.autograd.grad(loss, video, retain_graph=True)
    (others,) = torch.autograd.grad(other, video, retain_graph=True, allow_unused=True)
    return mine.norm() / (torch.zeros_like(mine) if others is None else others).norm()

"""The interface of adversarial training, and what the adversaries share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from vae3d.arguments import ArgumentError, Range, Size, check_fields
from vae3d.distributed import all_reduce_mean, reduction_buffer
from vae3d.errors import UserError
from vae3d.layout import place
from vae3d.optim import adamw
from vae3d.pixels import as_rgb
from vae3d.restore import check_like, load_optimizer
from vae3d.schedules import ramp
from vae3d.seeding import seed_of
from vae3d.types import ClipBatch, Reconstruction

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
Step = Annotated[int, Range(0, 10**12)]
Weight = Annotated[float, Range(0, 1e12)]
Positive = Annotated[float, Range(1e-30, 1e30)]
Decay = Annotated[float, Range(0, 1 - 1e-9)]
Betas = Annotated[Sequence[Decay], Size(2, 2)]


class UpdatePhase(NamedTuple):
    """Which networks a step updates: the model that is trained (the generator of a GAN), and its discriminator."""

    model: bool
    discriminator: bool


class Adversary:
    """Adversarial training: discriminators with their optimizer and state. The base class has none.

    optimizer: the discriminators', from `load` on; None without any.

    The generator's loss uses a frozen discriminator, the discriminator's loss detached reconstructions. In each step
    the trainer computes and differentiates both for every micro-batch, then calls `sync_remaining`, and then, on all
    ranks alike, `average_gradients` and `step`, or `reset_step`. `average_gradients` and `generator_loss` may
    communicate between ranks; `sync_remaining` makes up for the calls of generator_loss that this rank skipped. None of
    them may wait for the device: the trainer reads what a decision needs, twice in a step.
    """

    optimizer: torch.optim.Optimizer | None = None

    def load(self, model: nn.Module, device: torch.device, seed: int, rank: int) -> None:
        """Build on the device of training; called once, before anything else.

        model: the generator, with its frozen parts frozen. seed: the run's.
        """

    def update_phase(self, step: int) -> UpdatePhase:
        return UpdatePhase(model=True, discriminator=False)

    def generator_loss(self, batch: ClipBatch, out: Reconstruction, loss: Tensor, step: int) -> LossAndMetrics:
        """Weighted loss to add to the objective's `loss`, and metrics."""
        return torch.zeros((), device=batch.video.device), {}

    def discriminator_loss(self, batch: ClipBatch, out: Reconstruction, step: int) -> LossAndMetrics:
        raise NotImplementedError

    def sync_remaining(self, step: int, micro_batches: int) -> Tensor | None:
        """Join the collectives of generator_loss calls that this rank skipped in this step (memory, files).

        Returns a flag on the device, equal on all ranks: whether `error` ends the run. None: it does not.
        """
        return None

    def error(self) -> UserError:
        """The error for which sync_remaining returned a flag."""
        raise NotImplementedError

    def average_gradients(self) -> Tensor:
        """Average the discriminator's gradients over ranks and clip them.

        Returns their norm before clipping, a scalar on the device.
        """
        raise NotImplementedError

    def step(self, grad_norm: float) -> None:
        """Update the discriminator with the averaged gradients, and zero them. grad_norm: of average_gradients."""
        raise NotImplementedError

    def reset_step(self) -> None:
        """Zero the gradients and drop all else that this optimizer step computed."""

    def state_dict(self) -> dict[str, Any]:
        """State that is equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary has the state of a discriminator, and this run has none")

    def rank_state_dict(self) -> dict[str, Any]:
        """State of this rank alone, such as a replay buffer; may be empty."""
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ArgumentError("adversary has state of a rank, and this run's adversary has none")


class NoAdversary(Adversary):
    """Trains without a discriminator."""


class DiscriminatorAdversary(Adversary):
    """What Gan and Seraena share: a discriminator with its AdamW, schedules, and skipped steps.

    Both train the discriminator under functional_call with copies of its buffers (running statistics, singular
    vectors), which `step` keeps and `reset_step` drops: a skipped step leaves no trace. Settings are fields of the
    subclasses, which are dataclasses, and are checked against their annotations.
    """

    name: str  # in seeds
    title: str  # in errors
    weight: Weight
    start: Step
    ramp: Step
    discriminator_start: Step | None
    lr: Positive
    betas: Betas
    weight_decay: Weight
    eps = 1e-8  # torch's default
    grad_clip: Positive | None

    def __post_init__(self) -> None:
        check_fields(vars(self), type(self), key="adversary")
        if self.discriminator_start is None:
            self.discriminator_start = self.start
        if self.discriminator_start > self.start:
            raise ValueError(
                f"adversary.discriminator_start is {self.discriminator_start}, after adversary.start={self.start}: the "
                "generator would train against random weights; use that or less, or null"
            )
        self.skipped = 0  # steps whose gradients were not finite
        self.grad_norm = 0.0  # of the last update, before clipping
        self._reset()

    def build(self) -> nn.Module:
        """A discriminator with random weights."""
        raise NotImplementedError

    def load(
        self, model: nn.Module, device: torch.device, seed: int, rank: int, also_reduce: Sequence[Tensor] = ()
    ) -> None:
        """also_reduce: tensors like those that `average_gradients` will be given."""
        self.device = device
        self.seed = seed
        self.rank = rank
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed_of(seed, self.name))  # of the CPU only
            self.discriminator = place(self.build(), device)
        self.optimizer = adamw(self.discriminator.parameters(), self, device)
        # Allocated before the first step, see ReplicatedDataParallel.
        statistics = [buffer for buffer in self.discriminator.buffers() if buffer.is_floating_point()]
        self._reduction_buffer = reduction_buffer([*self.discriminator.parameters(), *statistics, *also_reduce])

    def update_phase(self, step: int) -> UpdatePhase:
        return UpdatePhase(model=True, discriminator=step >= self.discriminator_start)

    def weight_at(self, step: int) -> float:
        """Weight of the generator's loss."""
        return self.weight * ramp(step, self.start, self.start + self.ramp)

    def train_mode(self) -> dict[str, Tensor]:
        """Switch the discriminator to train mode. Returns the copies of its buffers, which micro-batches change."""
        if not self._buffers:
            self._buffers = {name: tensor.clone() for name, tensor in self.discriminator.named_buffers()}
        self.discriminator.train()
        return self._buffers

    def average_gradients(self, also_reduce: Sequence[Tensor] = ()) -> Tensor:
        """Also average buffers and `also_reduce`: each rank normalised by its own clips, so all continue with the mean
        of their running statistics."""
        parameters = list(self.discriminator.parameters())
        statistics = [buffer for buffer in self._buffers.values() if buffer.is_floating_point()]
        all_reduce_mean([*(p.grad for p in parameters), *statistics, *also_reduce], self._reduction_buffer)
        return nn.utils.clip_grad_norm_(parameters, self.grad_clip or math.inf)

    def update(self, lr: float, grad_norm: float) -> bool:
        """Update the discriminator and its buffers; returns whether it did.

        If the norm of the gradients is not finite, on all ranks alike, nothing changes but `skipped`.
        """
        if not math.isfinite(grad_norm):
            self.skipped += 1
            return False
        self.grad_norm = grad_norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for name, buffer in self.discriminator.named_buffers():
            buffer.copy_(self._buffers[name])
        return True

    def reset_step(self) -> None:
        self.optimizer.zero_grad()
        self._reset()

    def _reset(self) -> None:
        """Drop what this optimizer step kept aside."""
        self._buffers: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ArgumentError for the state of another discriminator."""
        check_like(state, self.state_dict() | {"optimizer": None}, "adversary")
        self.discriminator.load_state_dict(state["discriminator"])
        load_optimizer(self.optimizer, state["optimizer"], "adversary.optimizer")
        self.skipped = state["skipped"]

    def require_pair(self, batch: ClipBatch, out: Reconstruction) -> tuple[Tensor, Tensor]:
        """The colours of the clip and of its reconstruction, [B, 3, T, H, W]; see pixels.as_rgb.

        Raises ValueError if there is no reconstruction, or one of another size.
        """
        if out.video is None:
            raise ValueError(
                f"{self.title} needs reconstructed pixels, but no loss term does; add one, such as loss=recon_kl"
            )
        real, fake = list(batch.video.shape), list(out.video.shape)
        if fake != real:
            raise ValueError(f"the clip is {real}, its reconstruction {fake}; they must agree")
        return as_rgb(batch.video), as_rgb(out.video)

    def require_grad(self, out: Reconstruction) -> None:
        """Raises ValueError if the reconstruction has no gradient to train the generator with."""
        if not out.video.requires_grad:
            raise ValueError(f"no trained part reaches the pixels, on which {self.title} works; use adversary=none")


def group_frames(video: Tensor, frames: int) -> Tensor:
    """[B, 3, T, H, W] -> [B * ceil(T / frames), frames * 3, H, W].

    The last group is filled with frames from the first on, cyclically, as `TAEHV_Training_Example.ipynb` of
    madebyollin/seraena fills 9 frames to 12 with the first 3.
    """
    count = video.shape[2]
    order = torch.arange(-(-count // frames) * frames, device=video.device) % count
    return video.transpose(1, 2)[:, order].reshape(-1, frames * video.shape[1], *video.shape[3:])

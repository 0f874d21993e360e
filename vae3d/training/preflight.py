"""The first step's errors before the first step: every loss, on the shortest and the longest clip."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from vae3d.adversarial.base import UpdatePhase
from vae3d.errors import UserError
from vae3d.schedules import ALL_ON
from vae3d.training.freeze import PartError
from vae3d.training.metrics import StepMetrics
from vae3d.types import Clip

if TYPE_CHECKING:
    from vae3d.training.vae_trainer import Trainer


class PreflightError(UserError):
    """A step that cannot work at all."""


def preflight(trainer: Trainer) -> None:
    """Forward and backward passes on noise of a micro-batch's size, with every loss term and the adversary on, so that
    a term that starts at step 50,000 fails now; where two networks take turns, those of each turn. Leaves no trace: no
    update, no gradient, no random state.

    Raises PreflightError, on every rank, if memory does not suffice or a loss is not finite; PartError if a part that
    is to train gets no gradient.
    """
    counts = trainer.data.schedule.frames.all()
    phases = {trainer.adversary.update_phase(step): step for step in (ALL_ON, ALL_ON + 1)}
    for frames, (phase, step) in product(dict.fromkeys((counts[0], counts[-1])), phases.items()):
        metrics, clip = StepMetrics(), _noise(trainer, frames)
        clips = [clip] * trainer.strategy.rehearsal_clips
        error = trainer.strategy.run_guarded(lambda: _first_step(trainer, clips, phase, metrics, step))  # noqa: B023
        trainer.adversary.sync_remaining(step, len(clips))
        status = trainer.vote([clip], metrics, error, stop=False)
        what = f"a micro-batch of {'x'.join(map(str, clip.video.shape))}"
        params_without_grad = trainer.strategy.params_without_grad() if status.complete and phase.generator else []
        trainer.strategy.skip(unscaled=False)
        trainer.adversary.reset_step()
        if not status.complete:
            raise PreflightError(
                f"{what} does not fit into memory ({status.error()}): {error or 'see the other ranks'}; raise "
                "trainer.accumulate, lower data.height, data.width or data.frames.max, or set "
                "model.gradient_checkpointing=true if the model has it"
            )
        if not status.finite:
            told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.means().items() if "/" in name)
            raise PreflightError(
                f"{what} of noise gives a loss that is not finite: {told}; look at the first such term"
            )
        require_all_gradients(params_without_grad)


def _first_step(trainer: Trainer, clips: list[Clip], phase: UpdatePhase, metrics: StepMetrics, step: int) -> None:
    """Passes beside as much memory as the two moments take that AdamW makes at its first step."""
    moments = [] if trainer.optimizer.state else [torch.empty_like(p) for p in trainer.parameters for _ in range(2)]
    trainer.accumulate(clips, phase, metrics, step)
    del moments


def require_all_gradients(names: list[str]) -> None:
    """Raises PartError if there are any."""
    if names:
        raise PartError(
            f"stage.train names parts that no loss term reaches: {len(names)} parameters such as "
            f"{names[0]} got no gradient; take the part out of stage.train or add a term that reads it"
        )


def _noise(trainer: Trainer, frames: int) -> Clip:
    plan, settings = trainer.data.schedule, trainer.data.settings
    shape = (plan.micro_batch, frames, settings.height, settings.width)
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(-plan.micro_batch, 0)
    names = ["noise"] * plan.micro_batch
    if settings.depth is None:
        video = torch.randint(0, 256, (shape[0], 3, *shape[1:]), dtype=torch.uint8, generator=generator)
        return Clip(video, positions, names)
    video = torch.rand(shape[0], 1, *shape[1:], generator=generator).mul_(2).sub_(1).expand(-1, 3, -1, -1, -1)
    valid = torch.ones(shape[0], 1, *shape[1:], dtype=torch.bool)
    return Clip(video.contiguous(), positions, names, valid=valid, depth_bounds=torch.tensor([[0.1, 20.0]] * shape[0]))

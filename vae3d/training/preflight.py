"""Preflight: forward and backward on noise with every loss on, at the smallest and the largest batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from vae3d.adversarial.base import Adversary, UpdatePhase
from vae3d.data.batches.batch_schedule import BatchShape
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.streaming import StreamingData
from vae3d.data.loader import TrainingData
from vae3d.errors import UserError
from vae3d.schedules import ALL_ON
from vae3d.training.freeze import PartError
from vae3d.training.step_status import StepMetrics, StepStatus
from vae3d.training.strategy import Strategy
from vae3d.types import ClipBatch


class PreflightError(UserError):
    """A step that cannot work."""


def preflight(
    strategy: Strategy,
    adversary: Adversary,
    data: TrainingData | StreamingData,
    accumulate: int,
    forward_backward: Callable[[Sequence[ClipBatch], UpdatePhase, int, StepMetrics], None],
    sync_status: Callable[[StepMetrics, str | None, Tensor | None], StepStatus],
) -> None:
    """Find errors of any step before the first: a term that starts at step 50,000 fails now.

    Every update phase is tried on micro-batches of the fewest and of the most frames, and, with buckets and mixtures,
    of the fewest and of the most pixels; on two if a step has several, since the gradients of the first are there while
    the second runs. No weight, gradient, optimizer state or random state changes.
    accumulate: micro-batches of a step. forward_backward, sync_status: of the Trainer.
    Raises PreflightError, on every rank, if memory runs out or a loss is not finite; PartError if a trainable part gets
    no gradient.
    """
    count = min(2, accumulate)
    phases = {adversary.update_phase(step): step for step in (ALL_ON, ALL_ON + 1)}
    for shape, (phase, step) in product(extremes(data.shapes()), phases.items()):
        batch, metrics = noise(shape, data.streams[shape.stream].settings), StepMetrics()

        def run(batch=batch, phase=phase, step=step, metrics=metrics) -> None:
            moments = [adamw_moments(strategy.optimizer), adamw_moments(adversary.optimizer)]
            forward_backward([batch] * count, phase, step, metrics)
            del moments

        with strategy.no_update(count):
            error = strategy.run_guarded(run)
            adversary_error = adversary.sync_remaining(step, count)
            status = sync_status(metrics, error, adversary_error)
            params_without_grad = strategy.params_without_grad() if status.completed and phase.model else []
        adversary.reset_step()
        if status.adversary_error:
            raise adversary.error()
        check_status(status, error, metrics, "x".join(map(str, batch.video.shape)))
        if params_without_grad:
            raise PartError(
                f"stage.train names parts that no loss term reaches: {len(params_without_grad)} parameters such as "
                f"{params_without_grad[0]} got no gradient; take the part out of stage.train or add a term that uses it"
            )


def extremes(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """Those of the fewest and of the most frames, and of the fewest and of the most pixels, none twice."""
    by_frames = sorted(shapes, key=lambda shape: (shape.frames, shape.pixels))
    by_pixels = sorted(shapes, key=lambda shape: (shape.pixels, shape.frames))
    return list(dict.fromkeys((by_frames[0], by_frames[-1], by_pixels[0], by_pixels[-1])))


def adamw_moments(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """As much memory as AdamW allocates in its first step; nothing if it has stepped, or there is none."""
    if optimizer is None or optimizer.state:
        return []
    return [torch.empty_like(p) for group in optimizer.param_groups for p in group["params"] for _ in range(2)]


def check_status(status: StepStatus, error: str | None, metrics: StepMetrics, shape: str) -> None:
    if status.mismatch:
        raise PreflightError(f"a micro-batch of {shape}: the ranks differ: {status.mismatch}")
    if not status.completed:
        raise PreflightError(
            f"a micro-batch of {shape} does not fit into memory ({status.failure()}): {error or 'see other ranks'}; "
            "raise trainer.accumulate, lower data.batch_size, data.height, data.width or data.frames.max, or set "
            "model.gradient_checkpointing=true if the model has it"
        )
    if not status.finite:
        losses = ", ".join(f"{name} {value.item():.4g}" for name, value in metrics.means().items() if "/" in name)
        raise PreflightError(
            f"a micro-batch of {shape} of noise gives a loss that is not finite: {losses}; check the first such term"
        )


def noise(batch: BatchShape, settings: ClipSettings) -> ClipBatch:
    """Clips of random pixels, or depths, as the data loader gives them."""
    shape = (batch.clips, batch.frames, batch.height, batch.width)
    generator = torch.Generator().manual_seed(0)
    positions, names = torch.arange(-batch.clips, 0), ["noise"] * batch.clips
    if settings.depth is None:
        video = torch.randint(0, 256, (shape[0], settings.channels, *shape[1:]), dtype=torch.uint8, generator=generator)
        return ClipBatch(video, positions, names)
    video = (
        torch.rand(shape[0], 1, *shape[1:], generator=generator)
        .mul_(2)
        .sub_(1)
        .expand(-1, settings.channels, -1, -1, -1)
    )
    valid = torch.ones(shape[0], 1, *shape[1:], dtype=torch.bool)
    return ClipBatch(
        video.contiguous(), positions, names, valid=valid, depth_bounds=torch.tensor([[0.1, 20.0]] * shape[0])
    )

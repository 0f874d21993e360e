"""How a diffusion model is doing: its loss on held-out latents, and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vae3d import distributed
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.processes import QUARTILES, quartile_sums, training_losses
from vae3d.diffusion.quality import sliced_wasserstein
from vae3d.diffusion.sampling import sample_latents
from vae3d.latents.codec import LatentCodec
from vae3d.pixels import PixelError
from vae3d.report.images import grid
from vae3d.seeding import generator_of
from vae3d.training.memory import attempted

if TYPE_CHECKING:
    from vae3d.training.diffusion_trainer import DiffusionTrainer

FPS = 8.0
BATCH = 16  # samples at once


def validate(trainer: DiffusionTrainer) -> dict[str, float]:
    """Log the loss on held-out latents and show samples, of the averaged weights."""
    trainer.network.eval()
    with trainer.ema.applied():
        values = held_out_losses(trainer)
        if trainer.accelerator.is_main_process:  # the others wait at the next step
            values |= _samples(trainer)
    trainer.network.train()
    trainer.log.scalars(values, trainer.step)
    return values


@torch.no_grad()
def held_out_losses(trainer: DiffusionTrainer) -> dict[str, float]:
    """val/loss and, by quarter of the times, val/loss_q0..q3: squared errors over validation.draws times and noises
    for each held-out clip, the same at every validation."""
    sums = torch.zeros(QUARTILES, 2, dtype=torch.float64, device=trainer.device)
    for z, batch in trainer.held_out:
        for draw in range(trainer.config.validation.draws):
            noise = [
                generator_of(trainer.seed, position, draw, "validation", device=trainer.device)
                for position in batch.positions
            ]
            labels = batch.labels if trainer.network.num_classes else None
            with trainer.accelerator.autocast():
                losses = training_losses(trainer.network, trainer.process, z, noise, labels)
            sums += quartile_sums(losses["mse"], losses["t_normalised"])
    distributed.all_reduce_mean([sums])
    total = sums.sum(0)
    values = {"val/loss": float(total[0] / total[1])} if total[1] else {}
    return values | {f"val/loss_q{q}": float(a / n) for q, (a, n) in enumerate(sums.tolist()) if n}


def _samples(trainer: DiffusionTrainer) -> dict[str, float]:
    """Show samples and, the first time, held-out clips as the autoencoder gives them back; how far both are apart."""
    settings, data, known = trainer.config.validation, trainer.data, trainer.data.trained_classes
    sampling = Sampling(settings.steps, settings.method, settings.guidance, shift=settings.shift)
    count = range(settings.samples)

    def draw() -> tuple[Tensor, np.ndarray]:
        with trainer.accelerator.autocast():
            z = sample_latents(
                trainer.network,
                trainer.process,
                data.latent_shape,
                sampling,
                seed=trainer.seed,
                indices=count,
                labels=[known[i % len(known)] for i in count] if known else None,
                batch_size=BATCH,
                device=trainer.device,
            )
        return z, decoded(data.codec, z, data.size)

    try:
        drawn, reason = attempted(draw)
    except PixelError as error:
        drawn, reason = None, str(error)
    if drawn is None:
        trainer.log.warn(f"no samples at step {trainer.step}: {reason}")
        return {}
    z, frames = drawn
    _show(trainer, "samples", frames)
    if trainer.real and not trainer.shown:
        shown = torch.cat(trainer.real)[: len(z)]
        _show(trainer, "held out, as the autoencoder gives it back", decoded(data.codec, shown, data.size))
        trainer.shown = True
    values = {"val/sample_rms": float(z.square().mean().sqrt())}  # of the data: 1
    if trainer.real:
        values["val/sliced_wasserstein"] = sliced_wasserstein(z, torch.cat(trainer.real).to(z.device))
    return values


def decoded(codec: LatentCodec, z: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    """Normalised latents [N, C, t, h, w] -> [N, T, H, W, 3] uint8, of frames, height and width `size`."""
    pixels = torch.cat([codec.decode(part, size[0], size[1:]) for part in z.split(BATCH)])
    assert pixels.dtype == torch.uint8, "the codec's pixel_range is uint8 wherever files are read and written"
    return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()


def _show(trainer: DiffusionTrainer, name: str, frames: np.ndarray) -> None:
    picture = grid(frames)
    if len(picture) == 1:
        trainer.log.image(f"val/{name}", picture[0], trainer.step)
    else:
        trainer.log.video(f"val/{name}", picture, FPS, trainer.step)

"""Validation of a diffusion model: its loss on held-out latents, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from vae3d import distributed
from vae3d.diffusion.data import Batch
from vae3d.diffusion.processes import QUARTILES, Process, quartile_sums, training_losses
from vae3d.latents.codec import LatentCodec
from vae3d.report.images import grid
from vae3d.seeding import generator_of
from vae3d.training.runlog import RunLog

FPS = 8.0
BATCH = 16  # samples at once


@torch.no_grad()
def held_out_sums(
    network: nn.Module,
    process: Process,
    held_out: Sequence[tuple[Tensor, Batch]],
    draws: int,
    seed: int,
    autocast: Callable[[], AbstractContextManager[object]],
    device: torch.device,
) -> Tensor:
    """[QUARTILES, 2]: by quarter of the timesteps, the sum and the number of mean squared errors on this rank.

    Each held-out latent is noised `draws` times, with the same timesteps and noise at every validation.
    """
    sums = torch.zeros(QUARTILES, 2, dtype=torch.float64, device=device)
    for z, batch in held_out:
        for draw in range(draws):
            noise = [generator_of(seed, position, draw, "validation", device=device) for position in batch.positions]
            labels = batch.labels if network.num_classes else None
            with autocast():
                losses = training_losses(network, process, z, noise, labels)
            sums += quartile_sums(losses["mse"], losses["t_normalised"])
    return sums


def held_out_losses(sums: Tensor) -> dict[str, float]:
    """val/loss and, by quarter of the timesteps, val/loss_q0 to val/loss_q3, from `held_out_sums` of all ranks."""
    distributed.all_reduce_mean([sums])
    total = sums.sum(0)
    values = {"val/loss": float(total[0] / total[1])} if total[1] else {}
    return values | {f"val/loss_q{q}": float(a / n) for q, (a, n) in enumerate(sums.tolist()) if n}


def decoded(codec: LatentCodec, z: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    """Normalised latents [N, C, t, h, w] -> [N, T, H, W, 3] uint8. size: frames, height, width."""
    pixels = torch.cat([codec.decode(part, size[0], size[1:]) for part in z.split(BATCH)])
    assert pixels.dtype == torch.uint8, "the codec's pixel_range is uint8 wherever files are read and written"
    return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()


def log_frames(log: RunLog, name: str, frames: np.ndarray, step: int) -> None:
    """Log clips [N, T, H, W, 3] uint8 as one grid: an image, or a video."""
    picture = grid(frames)
    if len(picture) == 1:
        log.image(f"val/{name}", picture[0], step)
    else:
        log.video(f"val/{name}", picture, FPS, step)

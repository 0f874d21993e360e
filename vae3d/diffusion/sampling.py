"""Samples: latents from noise, and pictures, videos and arrays of what they decode to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vae3d.diffusion.base import Sampling
from vae3d.diffusion.conditioning import guided
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import Process
from vae3d.hashing import json_hash
from vae3d.inference.video import write_image, write_video
from vae3d.io import atomic_write, naming, remove
from vae3d.latents.shards import checksum
from vae3d.report.images import grid
from vae3d.seeding import generator_of

OURS = re.compile(
    r"(grid|data)\.(png|mp4)|\d{6,}(_.*)?\.(png|mp4)|samples_[\dx]+\.npz|(distances|command)\.json"
)  # files of samples
LATENTS = ".latents"  # folder of the latents that were drawn, until all files are written
FAR = 2.0  # by how much latents of samples may be larger or smaller than those of data before that is told
MOST_IN_GRID = 100  # samples: more cannot be seen


@torch.no_grad()
def sample_latents(
    network: nn.Module,
    process: Process,
    latent_shape: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    indices: Sequence[int],
    labels: Sequence[int] | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normalised latents [N, C, t, h, w] fp32 of the samples numbered `indices`, on `device`, where the network is.

    A sample is a function of (seed, its index) and its label: batch size, rank and number of samples change it by no
    more than rounding. Its noise is drawn on the CPU, so that it is the same on every device.
    labels: one class per sample; None: without a class. Raises ValueError as conditioning.guided and the process do.
    """
    if labels is not None and len(labels) != len(indices):
        raise ValueError(f"got {len(labels)} labels for {len(indices)} samples; give one each")
    training = network.training
    network.eval()
    try:
        done = [torch.empty(0, *latent_shape, device=device)]
        for start in range(0, len(indices), batch_size):
            part = slice(start, start + batch_size)
            generators = [generator_of(seed, index, "sample") for index in indices[part]]
            given = None if labels is None else torch.tensor(labels[part], device=device)
            z = torch.stack([torch.randn(tuple(latent_shape), generator=g) for g in generators]).to(device)
            done.append(_denoise(network, process, sampling, z, given, generators))
        return torch.cat(done)
    finally:
        network.train(training)


def _denoise(
    network: nn.Module,
    process: Process,
    sampling: Sampling,
    z: Tensor,
    labels: Tensor | None,
    generators: list[torch.Generator],
) -> Tensor:
    evaluate = guided(network, labels, sampling.guidance, sampling.interval)
    sampler = process.sampler(sampling)
    for index, (time, level) in enumerate(zip(sampler.times, sampler.levels, strict=True)):
        output = evaluate(z, torch.full((len(z),), time, device=z.device), level)
        z = sampler.step(output, index, z, generators)
    return z


def check_latent_rms(rms: float, process: Process, sampling: Sampling) -> str | None:
    """What is wrong with samples whose latents have this root mean square, and what to do; None near the 1 of data."""
    if 1 / FAR <= rms <= FAR:
        return None
    advice = ["train for longer"]
    if rms < 1:
        advice += ["take more steps"] + ["raise or leave out clip"] * (sampling.clip is not None)
    else:
        advice += ["lower guidance"] * (sampling.guidance > 1)
        advice += ["set clip=5, which bounds what is predicted"] * (sampling.clip is None)
        if isinstance(process, GaussianDiffusion) and process.prediction == "epsilon":
            advice.append(
                "train with process.prediction=v or process=flow: latents that are predicted by their noise carry its "
                f"error times {process.alphas_cumprod[-1].rsqrt():.0f} at the first step"
            )
    return (
        f"the latents of these samples have a root mean square of {rms:.3g}, those of the data one of 1: these are no "
        f"samples like the data. To mend it, {', or '.join(advice)}"
    )


def rounds(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """This rank's share of the numbers of `count` samples, batch by batch. All ranks have equally many batches, some of
    which may be empty, so that they can meet after each."""
    for start in range(0, count, batch_size * world_size):
        yield list(range(start, min(count, start + batch_size * world_size)))[rank::world_size]


def clear(folder: Path) -> None:
    """Remove what sampling writes, and nothing else."""
    remove(folder / LATENTS)
    for path in folder.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink()


def kept_latents(folder: Path, indices: Sequence[int], draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """draw(indices), or what a killed process of the same command drew before: sampling is what takes long."""
    if not indices:
        return draw(indices)
    file = folder / LATENTS / f"{indices[0]:06d}-{json_hash(list(indices))}.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as opened:
                if opened.metadata() == {"crc32": str(checksum({"z": (z := opened.get_tensor("z"))}))}:
                    return z
        except SafetensorError:  # of a machine that lost power
            pass
    z = draw(indices)
    cpu = z.cpu().contiguous()
    with naming(file):
        file.parent.mkdir(exist_ok=True)
        with atomic_write(file) as stream:
            stream.write(save({"z": cpu}, {"crc32": str(checksum({"z": cpu}))}))
    return z


def write_grid(stem: Path, frames: np.ndarray, *, columns: int | None = None, fps: float = 8.0) -> Path:
    """Write samples [N, T, H, W, 3] uint8 side by side, images as stem.png, videos as stem.mp4; returns the path."""
    picture = grid(frames, columns)
    if len(picture) == 1:
        path = stem.with_name(f"{stem.name}.png")
        write_image(path, picture[0])
    else:
        path = stem.with_name(f"{stem.name}.mp4")
        write_video(path, picture, fps, "h264")
    return path


def write_files(folder: Path, names: Sequence[str], frames: np.ndarray, fps: float = 8.0) -> None:
    """Write samples [N, T, H, W, 3] uint8, images as NAME.png, videos as NAME.mp4; a / in a name becomes _."""
    for name, sample in zip(names, frames, strict=True):
        stem = folder / name.replace("/", "_")
        if len(sample) == 1:
            write_image(stem.with_name(f"{stem.name}.png"), sample[0])
        else:
            write_video(stem.with_name(f"{stem.name}.mp4"), sample, fps, "h264")


def write_npz(folder: Path, frames: np.ndarray, labels: Sequence[int] | None = None) -> Path:
    """Write images [N, 1, H, W, 3] uint8 as samples_NxHxWx3.npz, which evaluators of openai/guided-diffusion read:
    arr_0 the images [N, H, W, 3], and arr_1 the labels [N] int64, if there are any. Returns the path.

    Raises ValueError for videos, and if the numbers differ.
    """
    if frames.shape[1] != 1:
        raise ValueError(f"samples have {frames.shape[1]} frames; the npz holds images, write_grid writes videos")
    if labels is not None and len(labels) != len(frames):
        raise ValueError(f"got {len(labels)} labels for {len(frames)} images; give one each")
    images = frames[:, 0]
    path = folder / f"samples_{'x'.join(map(str, images.shape))}.npz"
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            np.savez(stream, *([images] if labels is None else [images, np.asarray(labels, np.int64)]))
    return path

"""Draw samples: latents from noise, and their files."""

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
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import Process
from vae3d.hashing import json_hash
from vae3d.inference.video import video_suffix, write_image, write_video
from vae3d.io import atomic_write, naming, remove
from vae3d.latents.codec import LatentCodec
from vae3d.latents.shards import checksum
from vae3d.pixels import Quantized
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import on_host

OUTPUTS = re.compile(
    r"(grid|data)\.(png|mp4)|\d{6,}(_.*)?\.(png|mp4|mkv)|samples_[\dx]+\.npz|(distances|command)\.json"
)  # files that sampling writes
LATENTS = ".latents"  # folder of the latents, until all files are written
MAX_RMS_RATIO = 2.0  # samples whose latents are larger or smaller than the data's by this factor cause a warning
MAX_IN_GRID = 100  # samples
DECODED_AT_ONCE = 16  # samples
MAX_LABEL = 200  # bytes; a file name has at most 255, some of them for temporary ones


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
    """Draw the samples numbered `indices`: normalised latents [N, C, t, h, w] in fp32, on the device of the network.

    A sample is a function of seed, index and label: batch size, rank and number of samples change it only by rounding.
    Noise is drawn on the CPU, so that it is the same for every device.
    labels: one class per sample; None: unconditional.
    Raises ValueError as guided and Process.sampler do.
    """
    if labels is not None and len(labels) != len(indices):
        raise ValueError(f"got {plural(len(labels), 'label')} for {plural(len(indices), 'sample')}; pass one each")
    training = network.training
    network.eval()
    try:
        batches = [torch.empty(0, *latent_shape, device=device)]
        for start in range(0, len(indices), batch_size):
            part = slice(start, start + batch_size)
            generators = [generator_of(seed, int(index), "sample") for index in indices[part]]
            z = torch.stack([torch.randn(tuple(latent_shape), generator=g) for g in generators]).to(device)
            batch_labels = None if labels is None else torch.tensor(labels[part], device=device)
            evaluate = guided(network, batch_labels, sampling.guidance, sampling.interval)
            sampler = process.sampler(sampling)
            for step, (timestep, t) in enumerate(zip(sampler.timesteps, sampler.t_normalised, strict=True)):
                output = evaluate(z, torch.full((len(z),), timestep, device=z.device), t)
                z = sampler.step(output, step, z, generators)
            batches.append(z)
        return torch.cat(batches)
    finally:
        network.train(training)


def guided(
    network: nn.Module,
    labels: Tensor | None,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Wrap a network in classifier-free guidance: (z, timesteps [B], t in [0, 1]) -> output in fp32.

    output = u + scale (c - u), with the conditional output c and the unconditional u (arXiv 2207.12598, equation 6,
    with w = scale - 1). Scale 1 is the conditional network, bit for bit. Learned variances are those of c: they are
    interpolation weights, which cannot be extrapolated.
    interval: t between which guidance applies, both included; elsewhere the scale is 1 (arXiv 2404.07724).
    Raises ValueError for guidance without classes or labels, and for labels out of range.
    """
    classes = network.num_classes
    if scale != 1.0 and (labels is None or not classes):
        raise ValueError(f"guidance scale is {scale:g}, which needs a network with classes, and labels; use 1")
    if labels is not None and classes and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(f"labels are {int(labels.min())}..{int(labels.max())}; the network has 0..{classes - 1}")

    def evaluate(z: Tensor, timesteps: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not interval[0] <= t <= interval[1]:
            return network(z, timesteps, labels).float()
        both = torch.cat([labels, torch.full_like(labels, classes)])
        output = network(torch.cat([z, z]), torch.cat([timesteps, timesteps]), both).float()
        conditional, unconditional = output.chunk(2)
        channels = z.shape[1]
        prediction, base = conditional[:, :channels], unconditional[:, :channels]
        return torch.cat([base + scale * (prediction - base), conditional[:, channels:]], 1)

    return evaluate


def decoded(codec: LatentCodec, z: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    """Normalised latents [N, C, t, h, w] -> [N, T, H, W, C] uint8. size: frames, height, width.

    Raises NotFiniteError.
    """
    parts = on_host(decode_parts(codec, z, size), codec.device)
    return np.concatenate([part.numpy(codec.output_name).copy() for part in parts])


def decode_parts(codec: LatentCodec, z: Tensor, size: tuple[int, int, int]) -> Iterator[Quantized]:
    """As `decoded`, batch by batch on the codec's device, and not checked."""
    for part in z.split(DECODED_AT_ONCE):
        yield codec.decode_unchecked(part, size[0], size[1:])


def check_latent_rms(rms: float, of_data: float, process: Process, sampling: Sampling) -> str | None:
    """A warning, with hints, for samples whose latents' root mean square is far from the data's; else None."""
    if of_data / MAX_RMS_RATIO <= rms <= of_data * MAX_RMS_RATIO:
        return None
    hints = ["train for longer"]
    if rms < of_data:
        hints += ["take more steps"]
        if sampling.clip is not None:
            hints += ["raise or leave out clip"]
    else:
        if sampling.guidance > 1:
            hints += ["lower guidance"]
        if sampling.clip is None:
            hints += [f"set clip={5 * of_data:.2g}, which bounds the predicted latents"]
        if isinstance(process, GaussianDiffusion) and process.prediction == "epsilon":
            factor = process.alphas_cumprod[-1].rsqrt()
            hints += [
                "train with process.prediction=v or process=flow: with epsilon, errors of the predicted noise reach "
                f"the latents times {factor:.0f} at the first step"
            ]
    return (
        f"the latents of these samples have a root mean square of {rms:.3g}; the data have {of_data:.3g}, so the "
        f"samples do not look like the data; {', or '.join(hints)}"
    )


def per_rank_batches(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Indices of this rank's samples, batch by batch; all ranks get the same number of batches, some may be empty."""
    for start in range(0, count, batch_size * world_size):
        yield list(range(start, min(count, start + batch_size * world_size)))[rank::world_size]


def clear(folder: Path) -> None:
    """Delete the files that sampling writes, and nothing else."""
    remove(folder / LATENTS)
    for path in folder.iterdir():
        if OUTPUTS.fullmatch(path.name):
            path.unlink()


def cached_latents(folder: Path, indices: Sequence[int], draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """draw(indices), or its result from a killed process of the same command."""
    if not indices:
        return draw(indices)
    file = folder / LATENTS / f"{indices[0]:06d}-{json_hash(list(indices))}.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as opened:
                if opened.metadata() == {"crc32": str(checksum({"z": (z := opened.get_tensor("z"))}))}:
                    return z
        except SafetensorError:  # truncated, after a power failure
            pass
    z = draw(indices)
    cpu = z.cpu().contiguous()
    with naming(file):
        file.parent.mkdir(exist_ok=True)
        with atomic_write(file) as stream:
            stream.write(save({"z": cpu}, {"crc32": str(checksum({"z": cpu}))}))
    return z


def file_stem(index: int, label: str) -> str:
    """Name of a sample's file, without suffix: its number and its class, of which at most MAX_LABEL bytes."""
    clean = "".join(c if c.isprintable() and c != "/" else "_" for c in label).encode()[:MAX_LABEL]
    return f"{index:06d}" + (f"_{clean.decode(errors='ignore')}" if label else "")


def write_frames(stem: Path, frames: np.ndarray, fps: float = 8.0) -> Path:
    """Write frames [T, H, W, 3] uint8: stem.png for one, stem.mp4 for more; RGBA [T, H, W, 4] as stem.mkv, lossless.

    Returns the path.
    """
    if len(frames) == 1:
        path = stem.with_name(f"{stem.name}.png")
        write_image(path, frames[0])
    else:
        channels = frames.shape[-1]
        path = stem.with_name(f"{stem.name}{video_suffix(channels)}")
        write_video(path, frames, fps, "lossless" if channels == 4 else "h264")
    return path


def write_npz(folder: Path, frames: np.ndarray, labels: Sequence[int] | None = None) -> Path:
    """Write images [N, 1, H, W, C] uint8 as samples_NxHxWx3.npz for openai/guided-diffusion's evaluator. Returns the
    path.

    arr_0: images [N, H, W, 3]. arr_1: labels [N] int64, if any.
    Raises ValueError for videos, and for another number of labels than images.
    """
    if frames.shape[1] != 1:
        raise ValueError(
            f"samples have {plural(frames.shape[1], 'frame')}; the npz holds images, use grid or files for videos"
        )
    if labels is not None and len(labels) != len(frames):
        raise ValueError(f"got {plural(len(labels), 'label')} for {plural(len(frames), 'image')}; pass one each")
    images = frames[:, 0]
    path = folder / f"samples_{'x'.join(map(str, images.shape))}.npz"
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            np.savez(stream, *([images] if labels is None else [images, np.asarray(labels, np.int64)]))
    return path

"""Probes of an autoencoder: what makes its latents hard to diffuse, and its decoder sensitive to errors.

Latents z are normalised, [N, C, t, h, w]; pixels [N, 3, T, H, W] in [-1, 1]. All functions are pure, sum in fp64, and
return None for undefined values, such as the spectral slope of a constant. Channel moments, covariance eigenvalues and
the participation ratio are in latents.statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vae3d.latents.statistics import finite
from vae3d.metrics.frame import decibel, gradient_energy
from vae3d.seeding import randn_like

MIN_KL = 0.01  # nats per latent element; a channel with less has collapsed
MIN_VARIANCE_SHARE = 0.01  # variance of the posterior mean / variance of samples; likewise
HALF_NYQUIST = 0.5
NO_POWER = 1e-14  # relative power below which a signal counts as constant
NOISE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # in standard deviations of a channel


class Codec(Protocol):
    """The part of LatentCodec that probes use."""

    space_stride: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels -> mean of the normalised latents."""

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Normalised latents -> pixels, num_frames frames."""


@dataclass(frozen=True)
class Spectrum:
    """Power by frequency. frequency: 1 is Nyquist; the mean (frequency 0) is left out.

    slope: of log power over log frequency. White noise has 0, natural images about -2 (Field, JOSA A 1987), since power
    is averaged over rings. high: fraction of the power above half Nyquist (half of the power at it); white noise has
    0.5 in time and about 0.8 in space, a little less on small grids. None if all frequencies lie on one side.
    """

    frequency: list[float]
    power: list[float]
    slope: float | None
    high: float | None


def channel_kl(mean: Tensor, std: Tensor) -> Tensor | None:
    """KL(N(mean, std^2) || N(0, 1)) of raw latents [N, C, t, h, w], per channel: [C] nats per element.

    None for deterministic encoders (std 0 everywhere)."""
    if not std.any():
        return None
    mean, variance = mean.double(), std.double().square()
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean((0, 2, 3, 4))


def collapsed(std_of_mean: Tensor, std: Tensor, kl: Tensor | None) -> list[int]:
    """Indices of collapsed channels, whose latents do not depend on the input.

    Their KL is below MIN_KL nats per element (arXiv 1511.06349), or the variance of their posterior mean is at most
    MIN_VARIANCE_SHARE of the variance of their samples (arXiv 1509.00519, whose samples have variance 1).
    std_of_mean, std: [C], standard deviations over the data, of posterior means and of samples. kl: see channel_kl.
    """
    constant = std_of_mean.square() <= MIN_VARIANCE_SHARE * std.square()
    return (constant if kl is None else constant | (kl < MIN_KL)).nonzero().flatten().tolist()


def dct_power(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Mean squared coefficients of an orthonormal DCT-II of x [N, ...] along `axes` (negative), averaged over all other
    axes: fp64, with the sizes of `axes`.

    Unlike the DFT, the DCT sees no jump between opposite borders (as arXiv 2502.14831, section 3). White noise of
    variance v has v at every frequency.
    """
    bases = {axis: dct_basis(x.shape[axis]).to(x.device) for axis in axes}
    total = 0.0
    for sample in x:
        y = sample.double()
        for axis, basis in bases.items():
            y = (y.movedim(axis, -1) @ basis.T).movedim(-1, axis)
        others = [axis for axis in range(-y.ndim, 0) if axis not in bases]
        total = total + (y.square().mean(others) if others else y.square())
    return total / len(x)


def dct_basis(size: int) -> Tensor:
    """Orthonormal DCT-II basis, [size, size] fp64: row k is the k-th basis function."""
    n = torch.arange(size, dtype=torch.float64)
    basis = (2 / size) ** 0.5 * torch.cos(torch.pi * n[:, None] * (n + 0.5) / size)
    basis[0] /= 2**0.5
    return basis


def spectrum(power: Tensor) -> Spectrum:
    """Spectrum of dct_power along one axis, or along two axes, averaged over rings of equal radius.

    Corners beyond Nyquist count only in `high`."""
    power = power.cpu()
    axes = [torch.arange(size, dtype=torch.float64) / size for size in power.shape]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt().flatten()
    power, steps = power.flatten(), min(power.shape)
    varying = power[1:].sum()
    if varying <= NO_POWER * power.sum():
        return Spectrum([], [], None, None)
    ring = (radius * steps).round().long()
    rings = [number for number in range(1, steps) if (ring == number).any()]
    frequency = torch.stack([radius[ring == number].mean() for number in rings])
    mean = torch.stack([power[ring == number].mean() for number in rings])
    above = (radius > HALF_NYQUIST).double() + (radius == HALF_NYQUIST).double() / 2
    high = float((above * power).sum() / varying) if above.max() == 1 and above[1:].min() == 0 else None
    return Spectrum(frequency.tolist(), mean.tolist(), _slope(frequency, mean), high)


def _slope(frequency: Tensor, power: Tensor) -> float | None:
    """Least squares fit of logarithms, with equal weight for every ring."""
    if len(frequency) < 3 or (power <= 0).any():
        return None
    x, y = frequency.log(), power.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def local_correlation(z: Tensor) -> dict[str, float | None]:
    """Mean correlation of the channel vectors of all pairs of positions in windows of 2 x 2 x 2.

    first: of the first frame, in windows of 1 x 2 x 2; rest: of the other frames; mean: of both.
    SSVAE (arXiv 2512.05394; zai-org/SSVAE, calc_local_corr.py), whose loss demands at least 0.75. Channels are
    standardised first; positions behind the last whole window are dropped. None for a single channel.
    """
    if z.shape[1] < 2:
        return {"first": None, "rest": None, "mean": None}
    z = z.double() - z.double().mean((0, 2, 3, 4), keepdim=True)
    std = z.square().mean((0, 2, 3, 4), keepdim=True).sqrt()
    z = z / torch.where(std > 0, std, 1.0)
    first = _window_correlation(z[:, :, :1], (1, 2, 2))
    rest = _window_correlation(z[:, :, 1:], (2, 2, 2))
    defined = [value for value in (first, rest) if value is not None]
    return {"first": first, "rest": rest, "mean": sum(defined) / len(defined) if defined else None}


def _window_correlation(z: Tensor, window: tuple[int, int, int]) -> float | None:
    """window: frames, rows and columns. None if no whole window fits."""
    whole = [size // side * side for size, side in zip(z.shape[2:], window, strict=True)]
    if 0 in whole:
        return None
    z = z[:, :, : whole[0], : whole[1], : whole[2]]
    a, b, c = window
    vectors = rearrange(z, "n c (t a) (h b) (w c2) -> (a b c2) (n t h w) c", a=a, b=b, c2=c)
    vectors = F.normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)
    pairs = [(vectors[i] * vectors[j]).sum(-1).mean() for i, j in combinations(range(len(vectors)), 2)]
    return float(torch.stack(pairs).mean())


def first_against_rest(first: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Per channel: mean of the first latent frame minus that of the others, in their standard deviations, and the ratio
    of the standard deviations. In causal VAEs the first latent frame stands for one video frame.

    first, rest: of statistics.ChannelMoments.summary().
    """
    a, b = ({key: torch.tensor(part[key], dtype=torch.float64) for key in ("mean", "std")} for part in (first, rest))
    return {"mean_gap": finite((a["mean"] - b["mean"]) / b["std"]), "std_ratio": finite(a["std"] / b["std"])}


# Transforms tau of pixels and latents. side: space stride for pixels, 1 for latents.
TRANSFORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scale": lambda x, side: F.avg_pool3d(x, (1, 2, 2)),  # by 1/2, bilinear: each pixel is the mean of four
    "rot90": lambda x, side: torch.rot90(x, 1, (-2, -1)),
    "flip": lambda x, side: x.flip(-1),
    "shift": lambda x, side: x[..., side:, side:],  # by one latent, cropped
}


def encoder_equivariance(codec: Codec, pixels: Tensor, mean: Tensor | float = 0.0) -> dict[str, Tensor]:
    """|E(tau x) - tau E(x)| / |E(x)| per clip, [N], for every tau of TRANSFORMS. 0 is equivariant, sqrt(2) unrelated.

    Norms are root mean squares, since scaled clips have fewer latents. mean: [C], of the latents, subtracted in |E(x)|,
    where it would hide errors. EQ-VAE (arXiv 2502.09509) trains for scale and rotation, arXiv 2502.14831 for scale.
    """
    z = codec.encode(pixels)
    centred = z - _per_channel(mean).to(z) if isinstance(mean, Tensor) else z - mean
    errors = {}
    for name, tau in TRANSFORMS.items():
        moved = codec.encode(tau(pixels, codec.space_stride))
        errors[name] = (_mean_square(moved - tau(z, 1)) / _mean_square(centred)).sqrt()
    return errors


def decoder_equivariance(codec: Codec, z: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """PSNR of D(tau z) against tau x per clip, [N] dB, for every tau of TRANSFORMS. z: E(x)."""
    frames = pixels.shape[2]
    return {
        name: psnr(codec.decode(tau(z, 1), frames), tau(pixels, codec.space_stride)) for name, tau in TRANSFORMS.items()
    }


def noise_curve(
    codec: Codec,
    z: Tensor,
    pixels: Tensor,
    std: Tensor,
    generators: Sequence[torch.Generator],
    sigmas: Sequence[float] = NOISE,
) -> Tensor:
    """PSNR of D(z + sigma std eps) against the pixels, [len(sigmas), N] dB: the effect of errors of a diffusion model.

    std: [C], of the latents. generators: one per clip; eps is the same for every sigma.
    """
    noise = randn_like(z, generators) * _per_channel(std).to(z)
    return torch.stack([psnr(codec.decode(z + sigma * noise, pixels.shape[2]), pixels) for sigma in sigmas])


def interpolation(
    codec: Codec, a: Tensor, b: Tensor, frames: int, lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The decoded midpoint of two latents a and b, per pair, [N]:

    sharpness: gradient energy of D((a+b)/2), divided by the mean of D(a)'s and D(b)'s; 1 is as sharp as the ends, a
    double exposure of unrelated images has 1/2.
    mse: of D((a+b)/2) against (D(a)+D(b))/2, for pixels in [0, 1]; 0 for a linear decoder, which cross-fades.
    lpips: mean distance of D((a+b)/2) to the ends, divided by their distance; at least 1/2 for a metric. The function
    takes two batches of frames [N, 3, H, W] in [-1, 1], and returns [N, 1, 1, 1].
    """
    ends = [codec.decode(z, frames).clamp(-1, 1) for z in (a, b)]
    middle = codec.decode((a + b) / 2, frames).clamp(-1, 1)
    energies = [_energy(video) for video in (middle, *ends)]
    found = {
        "sharpness": 2 * energies[0] / (energies[1] + energies[2]),
        "mse": _mean_square(middle - (ends[0] + ends[1]) / 2) / 4,
    }
    if lpips is not None:
        to_ends = (_per_clip(lpips, middle, ends[0]) + _per_clip(lpips, middle, ends[1])) / 2
        found["lpips"] = to_ends / _per_clip(lpips, *ends)
    return found


def tiling_error(whole: Codec, tiled: Codec, pixels: Tensor) -> dict[str, Tensor]:
    """Errors of coding in tiles, per clip, [N]: `latents`, |difference| / |latents|; `psnr` of tiled against whole
    reconstructions, dB; `worst_line`, the root mean square difference of the worst row or column of pixels, divided by
    that of all, which is 1 without a seam."""
    z, z_tiled = whole.encode(pixels), tiled.encode(pixels)
    rec, rec_tiled = (c.decode(z, pixels.shape[2]).clamp(-1, 1) for c in (whole, tiled))
    square = (rec_tiled - rec).double().square() / 4
    lines = torch.cat([square.mean((1, 2, 3)), square.mean((1, 2, 4))], dim=1)
    mean = square.mean((1, 2, 3, 4))
    return {
        "latents": (_mean_square(z_tiled - z) / _mean_square(z)).sqrt(),
        "psnr": psnr(rec_tiled, rec),
        "worst_line": torch.where(mean > 0, lines.amax(1) / mean, 1.0).sqrt(),
    }


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """PSNR per clip, [N] dB, with pixels clamped to [-1, 1]; 100 for equal pixels."""
    error = _mean_square(video.clamp(-1, 1) - reference.clamp(-1, 1)) / 4
    return torch.tensor([decibel(mse) for mse in error.tolist()], dtype=torch.float64)


def _per_channel(values: Tensor) -> Tensor:
    return values[None, :, None, None, None]


def _mean_square(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1)


def _energy(video: Tensor) -> Tensor:
    return torch.stack([gradient_energy(clip.transpose(0, 1) / 2).mean() for clip in video])


def _per_clip(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean distance over the frames of each clip."""
    pairs = zip(x, y, strict=True)
    return torch.stack([distance(a.transpose(0, 1), b.transpose(0, 1)).double().mean() for a, b in pairs])

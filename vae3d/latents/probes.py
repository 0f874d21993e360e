"""What makes latents hard to learn for a diffusion model, and a decoder unforgiving: measures of one autoencoder.

Latents z are normalised, [N, C, t, h, w]; pixels [N, 3, T, H, W] in [-1, 1]. Every function depends on its arguments
alone, sums in float64, and gives None where a figure is not defined, such as the slope of a constant. Moments of
channels, the eigenvalues of their covariance and the participation ratio are those of latents.statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vae3d.metrics.frame import decibel, gradient_energy
from vae3d.seeding import randn_like

MIN_KL = 0.01  # nats per latent element, below which a channel tells nothing of its input
MIN_VARIANCE_SHARE = 0.01  # of a channel's variance
HALF_NYQUIST = 0.5
NO_POWER = 1e-14  # of the mean square: rounding, no variation
NOISE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # standard deviations of a channel


class Codec(Protocol):
    """What LatentCodec offers, as far as it is needed here."""

    space_stride: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to the mean of their normalised latents."""

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Normalised latents to pixels of num_frames frames."""


@dataclass(frozen=True)
class Spectrum:
    """How power is spread over frequencies, of which 1 is Nyquist's, in bins that leave out the mean (frequency 0).

    slope: of log power over log frequency, 0 of white noise; natural images have about -2 (Field, JOSA A 1987), since
    power is averaged over a ring. high: share of the power above half of Nyquist's frequency (and half of that at
    it); of white noise 0.5 in time and about 0.8 in the plane, a little less on a small grid. None where all
    frequencies lie on one side of it.
    """

    frequency: list[float]
    power: list[float]
    slope: float | None
    high: float | None


def channel_kl(mean: Tensor, std: Tensor) -> Tensor | None:
    """KL(N(mean, std^2) || N(0, 1)) of raw latents [N, C, t, h, w], the mean of every channel, [C] nats per element.
    None where std is 0 everywhere, which says that the encoder is deterministic."""
    if not std.any():
        return None
    mean, variance = mean.double(), std.double().square()
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean((0, 2, 3, 4))


def collapsed(std_of_mean: Tensor, std: Tensor, kl: Tensor | None) -> list[int]:
    """Channels that tell nothing of their input: their KL is below MIN_KL nats per element (Bowman et al., arXiv
    1511.06349), or the variance of their posterior's mean at most MIN_VARIANCE_SHARE of the variance of their samples
    (Burda et al., arXiv 1509.00519, whose samples have variance 1).

    std_of_mean, std: [C], deviations of the posteriors' means and of samples over the data. kl: of channel_kl.
    """
    still = std_of_mean.square() <= MIN_VARIANCE_SHARE * std.square()
    return (still if kl is None else still | (kl < MIN_KL)).nonzero().flatten().tolist()


def dct_power(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Mean square of the coefficients of an orthonormal DCT-II of `x` [N, ...] along `axes` (negative), over all other
    axes: float64, of the sizes of `axes`. The DCT knows no jump between opposite borders (arXiv 2502.14831, section 3,
    looks at latents through it); white noise of variance v has v at every frequency."""
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
    """[size, size] float64: row k is the k-th function of the orthonormal DCT-II."""
    k, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = (2 / size) ** 0.5 * torch.cos(torch.pi * k * (place + 0.5) / size)
    basis[0] /= 2**0.5
    return basis


def spectrum(power: Tensor) -> Spectrum:
    """Of dct_power along one axis, or along two, averaged over rings of equal radius. Corners beyond Nyquist's
    frequency count in `high` alone."""
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
    """Least squares in logarithms, each ring counting alike."""
    if len(frequency) < 3 or (power <= 0).any():
        return None
    x, y = frequency.log(), power.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def local_correlation(z: Tensor, window: tuple[int, int, int] = (2, 2, 2)) -> dict[str, float | None]:
    """Mean correlation of the channel vectors of every two places in a window (time, rows, columns): `first` of the
    first frame, in whose windows time is 1, `rest` of the others, and their `mean`.

    SSVAE (arXiv 2512.05394; zai-org/SSVAE `calc_local_corr.py`), whose loss asks for 0.75 at least. Channels are
    brought to mean 0 and deviation 1 first; places behind the last whole window do not count. None of a single channel.
    """
    if z.shape[1] < 2:
        return {"first": None, "rest": None, "mean": None}
    z = z.double() - z.double().mean((0, 2, 3, 4), keepdim=True)
    std = z.square().mean((0, 2, 3, 4), keepdim=True).sqrt()
    z = z / torch.where(std > 0, std, 1.0)
    first = _window_correlation(z[:, :, :1], (1, *window[1:]))
    rest = _window_correlation(z[:, :, 1:], window)
    known = [value for value in (first, rest) if value is not None]
    return {"first": first, "rest": rest, "mean": sum(known) / len(known) if known else None}


def _window_correlation(z: Tensor, window: tuple[int, int, int]) -> float | None:
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
    """How the latents of the first frame, which stands alone in a causal VAE, differ from the others, of every channel:
    the difference of their means in standard deviations of the others, and the ratio of their deviations.
    first, rest: statistics.ChannelMoments.summary() of both."""
    a, b = ({key: torch.tensor(told[key], dtype=torch.float64) for key in ("mean", "std")} for told in (first, rest))
    return {"mean_gap": finite((a["mean"] - b["mean"]) / b["std"]), "std_ratio": finite(a["std"] / b["std"])}


def _halved(x: Tensor) -> Tensor:
    """Frames of half the size, each pixel the mean of four: bilinear scaling by exactly 1/2."""
    return F.avg_pool3d(x, (1, 2, 2))


# What is done to pixels and, with the side of a latent for its second argument, to latents.
TRANSFORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scale": lambda x, side: _halved(x),
    "rot90": lambda x, side: torch.rot90(x, 1, (-2, -1)),
    "flip": lambda x, side: x.flip(-1),
    "shift": lambda x, side: x[..., side:, side:],  # by a latent, and what leaves the frame is cut off
}


def encoder_equivariance(codec: Codec, pixels: Tensor, mean: Tensor | float = 0.0) -> dict[str, Tensor]:
    """|E(tau x) - tau E(x)| / |E(x)| of every clip, [N], for every tau of TRANSFORMS; norms are root mean squares,
    since scaled latents are fewer. 0 is equivariant; sqrt(2) is what two unrelated latents have.

    mean: [C], of the latents, which is taken off in |E(x)|, where it would hide errors. EQ-VAE (arXiv 2502.09509) and
    scale equivariance (arXiv 2502.14831) train for scale and rotation.
    """
    z = codec.encode(pixels)
    centred = z - _along_channels(mean).to(z) if isinstance(mean, Tensor) else z - mean
    errors = {}
    for name, tau in TRANSFORMS.items():
        moved = codec.encode(tau(pixels, codec.space_stride))
        errors[name] = (_mean_square(moved - tau(z, 1)) / _mean_square(centred)).sqrt()
    return errors


def decoder_equivariance(codec: Codec, z: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """PSNR of D(tau z) against tau x of every clip, [N] dB, for every tau of TRANSFORMS. z: E(x)."""
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
    """PSNR of D(z + sigma std eps) against the pixels, [len(sigmas), N] dB: what the errors of a diffusion model cost.

    std: [C], of the latents. generators: one per clip; its eps is the same for every sigma.
    """
    noise = randn_like(z, generators) * _along_channels(std).to(z)
    return torch.stack([psnr(codec.decode(z + sigma * noise, pixels.shape[2]), pixels) for sigma in sigmas])


def interpolation(
    codec: Codec, a: Tensor, b: Tensor, frames: int, lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """What lies midway between clips whose latents are a and b, of every pair, [N]:

    sharpness: gradient energy of D((a+b)/2) over the mean of D(a)'s and D(b)'s: 1 is an image like others, a double
    exposure of unrelated images has 1/2. mse: of D((a+b)/2) against (D(a)+D(b))/2, of pixels in [0, 1]: 0 of a linear
    decoder, which cross-fades. lpips: of D((a+b)/2), mean distance to both, over their distance; at least 1/2 where
    the distance is a metric. lpips takes frames [N, 3, H, W] in [-1, 1] twice, and gives [N, 1, 1, 1].
    """
    ends = [codec.decode(z, frames).clamp(-1, 1) for z in (a, b)]
    middle = codec.decode((a + b) / 2, frames).clamp(-1, 1)
    energies = [_energy(video) for video in (middle, *ends)]
    found = {
        "sharpness": 2 * energies[0] / (energies[1] + energies[2]),
        "mse": _mean_square(middle - (ends[0] + ends[1]) / 2) / 4,
    }
    if lpips is not None:
        to_a, to_b, apart = (_per_clip(lpips, x, y) for x, y in ((middle, ends[0]), (middle, ends[1]), tuple(ends)))
        found["lpips"] = (to_a + to_b) / 2 / apart
    return found


def tiling_error(whole: Codec, tiled: Codec, pixels: Tensor) -> dict[str, Tensor]:
    """What coding in tiles changes, of every clip, [N]: `latents`, |difference| / |latents| of the encoder; `psnr` of
    the reconstructions against each other, dB; `worst_line`, the root mean square difference in the worst row or column
    of pixels in [0, 1], over that of all, which is 1 where no seam stands out."""
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
    """Of every clip, [N] dB, of pixels clamped to [-1, 1]; 100 where they are equal."""
    error = _mean_square(video.clamp(-1, 1) - reference.clamp(-1, 1)) / 4
    return torch.tensor([decibel(mse) for mse in error.tolist()], dtype=torch.float64)


def finite(values: Tensor) -> list[float | None]:
    """As a list in which None stands for what is not defined."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _along_channels(values: Tensor) -> Tensor:
    return values[None, :, None, None, None]


def _mean_square(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1)


def _energy(video: Tensor) -> Tensor:
    return torch.stack([gradient_energy(clip.transpose(0, 1) / 2).mean() for clip in video])


def _per_clip(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean over the frames of every clip."""
    pairs = zip(x, y, strict=True)
    return torch.stack([distance(a.transpose(0, 1), b.transpose(0, 1)).double().mean() for a, b in pairs])

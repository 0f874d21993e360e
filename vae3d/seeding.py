"""Random numbers as a pure function of (seed, position, purpose): no generator state to save or restore."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vae3d.transfer import to_device

Generators = torch.Generator | Sequence[torch.Generator] | None


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings; equal on every machine and Python version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_of(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device`, seeded by seed_of."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of x's shape, on x's device.

    generator: None (the device's default), one for the whole batch, or one per clip, so that the noise of a clip does
    not depend on batch, rank and world size. Noise is drawn on the generator's device: a CPU generator gives the same
    noise wherever x is.
    Raises ValueError if the number of generators is not the batch size.
    """

    def noise(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        device = x.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=x.dtype)

    if generator is None or isinstance(generator, torch.Generator):
        return to_device(noise(x.shape, generator), x.device)
    if len(generator) != x.shape[0]:
        raise ValueError(f"got {len(generator)} generators for a batch of {x.shape[0]} clips; give one per clip")
    return to_device(torch.stack([noise(x.shape[1:], g) for g in generator]), x.device)


def uniform(clips: int, device: torch.device, generator: Generators = None) -> Tensor:
    """Uniform numbers in [0, 1), one per clip, [clips]. generator: as in randn_like."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(clips, generator=generator, device=device)
    return torch.cat([torch.rand(1, generator=g, device=device) for g in generator])

"""Tiny Wan VAEs with random weights in every layer, their diffusers counterparts, and chunked coding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vae3d.checkpoints.wan import to_diffusers
from vae3d.models.wan import WanVAE

STYLES = {
    "wan": {"channels": 8, "latent_channels": 4},
    "wan22": {"channels": 8, "decoder_channels": 16, "latent_channels": 6, "patch": 2, "shortcuts": True},
}


def model(style: str = "wan", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> WanVAE:
    """Four levels, as published, with weights that keep activations near 1 and reconstructions within [-1, 1]."""
    built = WanVAE(**{**STYLES[style], **changes})
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=rng))
            elif name.endswith("bias"):
                p.copy_(0.02 * torch.randn(p.shape, generator=rng))
            else:
                p.copy_(torch.randn(p.shape, generator=rng) * (1.0 / p[0].numel() ** 0.5))
        built.decoder.head["2"].weight.mul_(0.3)
    return built.to(dtype).eval()


def reference(ours: WanVAE, style: str = "wan") -> torch.nn.Module:
    """diffusers' AutoencoderKLWan with the weights of `ours`."""
    from diffusers import AutoencoderKLWan

    settings = STYLES[style]
    pixels = 3 * settings.get("patch", 1) ** 2
    theirs = AutoencoderKLWan(
        base_dim=settings["channels"],
        decoder_base_dim=settings.get("decoder_channels"),
        z_dim=settings["latent_channels"],
        is_residual=style == "wan22",
        in_channels=pixels,
        out_channels=pixels,
        patch_size=settings.get("patch"),
    )
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    return theirs.eval()


def clip(
    ours: WanVAE, frames: int, height: int = 2, width: int = 3, *, batch: int = 1, seed: int = 0, beyond: int = 0
) -> Tensor:
    """[batch, 3, frames, H, W] in [-1, 1]; sides in latents, plus `beyond` pixels."""
    stride = ours.spec.space_stride
    size = (batch, 3, frames, height * stride + beyond, width * stride + beyond)
    dtype = ours.conv1.weight.dtype
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def latents(ours: WanVAE, count: int, height: int = 2, width: int = 3, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, ours.spec.channels, count, height, width, generator=rng, dtype=ours.conv1.weight.dtype)


def moments(posterior) -> Tensor:
    return torch.cat([posterior.mean, posterior.logvar], 1)


def encode_in(coder, video: Tensor, lengths: Sequence[int]) -> Tensor:
    """Moments of a clip encoded in chunks of these lengths."""
    coded, cache = [], None
    for piece in video.split(list(lengths), 2):
        posterior, cache = coder.encode_chunk(piece, cache)
        coded.append(moments(posterior))
    return torch.cat(coded, 2)


def decode_in(coder, z: Tensor, lengths: Sequence[int]) -> Tensor:
    coded, cache = [], None
    for piece in z.split(list(lengths), 2):
        video, cache = coder.decode_chunk(piece, cache)
        coded.append(video)
    return torch.cat(coded, 2)


def gradients(network: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()

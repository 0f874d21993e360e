"""Tiny configurations of diffusers' autoencoders, and clips that suit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vae3d.models.diffusers_vae import DiffusersVAE

WIDTHS = [8, 8, 8, 8]
STATS = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.9, 1.1, 1.2, 0.8]}
IMAGE = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
GROUPS = {"layers_per_block": 1, "norm_num_groups": 2}
WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **STATS}
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**IMAGE, **GROUPS, "block_out_channels": [8, 8], "shift_factor": 0.2},
    "AutoencoderKLFlux2": {**IMAGE, **GROUPS, "block_out_channels": [8, 8], "latent_channels": 4},
    "AsymmetricAutoencoderKL": {
        **IMAGE, "norm_num_groups": 2, "down_block_out_channels": [8, 8], "up_block_out_channels": [8, 8],
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3,
        "num_encoder_blocks": [1] * 3, "num_decoder_blocks": [1] * 3,
    },
    "AutoencoderDC": {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {
            "block_types": ["ResBlock", "EfficientViTBlock"],
            "block_out_channels": [8, 8],
            "layers_per_block": [1, 1],
            "qkv_multiscales": [[], [5]],
        }.items()
    } | {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.4},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [32, 32],
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32, "scaling_factor": 0.7,
    },
    "AutoencoderKLKVAE": {
        "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": [1, 1],
    },
    "AutoencoderKLQwenImage21": {**WAN, "decoder_base_dim": 4, "dim_mult": [1, 1, 2, 2, 2]},
    "AutoencoderRAE": {
        "encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16, "patch_size": 8, "encoder_input_size": 16,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 4, "block_out_channels": WIDTHS, "decoder_block_out_channels": WIDTHS,
        "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5, "patch_size": 2,
        "spatio_temporal_scaling": [True, True, False, False], "timestep_conditioning": True,
        "decoder_spatio_temporal_scaling": [True, True, False, False], "decoder_inject_noise": [True] + [False] * 4,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4, "block_out_channels": [8, 8, 16, 16], "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 4, "patch_size": 1,
    },
    "AutoencoderKLHunyuanVideo": {**GROUPS, "block_out_channels": WIDTHS, "latent_channels": 4},
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": [8, 8, 16], "layers_per_block": 1, "spatial_compression_ratio": 4,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4, "block_out_channels": [8, 8, 16], "layers_per_block": 1, "spatial_compression_ratio": 4,
    },
    "AutoencoderKLCogVideoX": {**GROUPS, "block_out_channels": WIDTHS, "latent_channels": 4},
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": [32] * 4, "decoder_block_out_channels": [32] * 4, "latent_channels": 4,
        "layers_per_block": [1] * 5, **STATS,
    },
    "AutoencoderKLWan": WAN,
    "AutoencoderKLQwenImage": {**WAN, "input_channels": 4},
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": [8] * 3, "decode_block_out_channels": [8] * 4,
        "num_layers": 1, "patch_size": 2, "attention_resolutions": [16], "resolution": 32,
        "spatial_compression_ratio": 4, "temporal_compression_ratio": 4,
        "latents_mean": [0.1, 0.3] * 4, "latents_std": [0.9, 1.1] * 4,
    },
    "AutoencoderKLMagvit": {**GROUPS, "block_out_channels": WIDTHS, "latent_channels": 4},
    "AutoencoderKLAllegro": {**GROUPS, "block_out_channels": WIDTHS, "latent_channels": 4, "sample_size": 320},
    "AutoencoderKLKVAEVideo": {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4},
    "Kandinsky6SRVAE": {
        "latent_channels": 4, "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8, 16, 32, 64],
        "layers_per_block": 1,
    },
    "AutoencoderVidTok": {"ch": 8, "ch_mult": [1, 1, 1, 1], "z_channels": 4, "num_res_blocks": 1},
    "AutoencoderKLMiniMaxH3": {
        "latent_channels": 4, "block_out_channels": WIDTHS, "layers_per_block": 1,
        "spatial_downsample_factors": [2, 2, 2, 1], "temporal_downsample_factors": [1, 2, 2, 1], "norm_num_groups": 2,
        "decoder_num_layers": 1, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16, **STATS,
    },
    "AutoencoderKLTemporalDecoder": {
        "down_block_types": ["DownEncoderBlock2D"] * 2, "block_out_channels": [32, 32], "layers_per_block": 1,
    },
}  # fmt: skip
# (frames, height, width) that a class takes without padding, more than one latent long; the others take 9 x 16 x 16
SIZES = {
    "AutoencoderKLCogVideoX": (17, 8, 8),  # two chunks
    "AutoencoderKLMochi": (7, 8, 8),
    "AutoencoderKLAllegro": (8, 16, 16),
    "AutoencoderKLKVAEVideo": (25, 8, 8),
    "Kandinsky6SRVAE": (21, 8, 8),
    "AutoencoderKLMiniMaxH3": (22, 16, 16),
    "AutoencoderKLLTX2Video": (9, 32, 32),
    "AutoencoderKLHunyuanVideo": (17, 8, 8),  # in pieces
    "AutoencoderKLMagvit": (9, 8, 8),
    "AutoencoderKLHunyuanVideo15": (9, 8, 8),
    "AutoencoderKLHunyuanImageRefiner": (3, 8, 8),
    "AutoencoderKLQwenImage21": (3, 32, 16),
    "AutoencoderKLCosmos": (9, 8, 8),
    "AutoencoderVidTok": (9, 8, 8),
    **dict.fromkeys(("AutoencoderKLWan", "AutoencoderKLQwenImage"), (9, 8, 8)),
    **dict.fromkeys(
        (
            "AutoencoderKL", "AutoencoderKLFlux2", "AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC",
            "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE", "AutoencoderKLTemporalDecoder",
        ),
        (3, 8, 8),
    ),
    "AutoencoderRAE": (3, 16, 16),
}  # fmt: skip
# Fewer frames for a training step, where that is still two chunks or all that there is.
TRAINED = {
    "AutoencoderKLCogVideoX": 9,
    "AutoencoderKLAllegro": 4,
    "AutoencoderKLKVAEVideo": 5,
    "Kandinsky6SRVAE": 5,
    "AutoencoderKLHunyuanVideo": 5,
    "AutoencoderKLHunyuanVideo15": 5,
    "AutoencoderKLHunyuanImageRefiner": 2,
    "AutoencoderKLCosmos": 5,
    "AutoencoderVidTok": 5,
    "AutoencoderKLMagvit": 5,
    **dict.fromkeys(("AutoencoderKLWan", "AutoencoderKLQwenImage"), 5),
    **dict.fromkeys(
        (
            "AutoencoderKL", "AutoencoderKLFlux2", "AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC",
            "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE", "AutoencoderKLTemporalDecoder",
            "AutoencoderKLQwenImage21", "AutoencoderRAE",
        ),
        1,
    ),
}  # fmt: skip


def clip(kind: str, frames: int | None = None) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1]."""
    default, height, width = SIZES.get(kind, (9, 16, 16))
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, 3, frames or default, height, width, generator=generator) * 2 - 1


def randomised(network: nn.Module) -> nn.Module:
    """Small random values also where a class starts at zero, so that nothing is equal by chance."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(("encoder_mean", "encoder_std")):
            noise = 0.05 * torch.randn(tensor.shape, generator=generator)
            tensor.data.add_(noise.abs() if "var" in name or "std" in name else noise)
    return network


def model(kind: str, **settings: Any) -> DiffusersVAE:
    torch.manual_seed(0)
    made = DiffusersVAE(kind, CONFIGS[kind], **settings)
    randomised(made.vae)
    if made.table.stats_saved:
        made._read_stats()
    return made.eval()

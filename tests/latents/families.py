"""A tiny model of every family, with factors that are not 0 and 1 where it keeps any, and clips that suit it."""

from __future__ import annotations

import torch
from torch import nn

from tests import tiny
from tests.models.test_diffusers_vae import COGVIDEOX, HUNYUAN
from vae3d.models.diffusers_vae import DiffusersVAE

DIFFUSERS = {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
FACTORS = ["model.latents_mean=[0.5,-1,0,0.25]", "model.latents_std=[2,0.5,1,4]"]
OVERRIDES = {
    "spatial": ["model.scaling_factor=0.7", "+model.shift_factor=0.1"],
    "sd_vae": [],
    "temporal_vae": FACTORS,
    "opensora_v1_2": [],
    "wan": FACTORS,
    "wan22": FACTORS,
    "taehv": [],
}
RAW_TAEHV = ["model.variant=taeos1_2", *FACTORS]
NAMES = [*OVERRIDES, "taehv_raw", COGVIDEOX, HUNYUAN]


def model(name: str) -> nn.Module:
    if name in (COGVIDEOX, HUNYUAN):
        torch.manual_seed(0)
        return DiffusersVAE(name, {**DIFFUSERS, "scaling_factor": 0.6})
    if name == "taehv_raw":
        return tiny.model("taehv", *RAW_TAEHV)
    return tiny.model(name, *OVERRIDES[name])


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """[batch, 3, frames, height, width] in [-1, 1]."""
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1

"""Open-Sora 1.2's VAE (hpcai-tech/OpenSora-VAE-v1.2): a 2D VAE of diffusers inside a temporal VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vae3d.checkpoints import ldm
from vae3d.checkpoints.published import PublishedWeights, State, count_layers, rename_keys
from vae3d.io import read_json

MARKER = "temporal_vae.encoder.conv_in.conv.weight"  # a key that only these files have
SPATIAL, TEMPORAL = "spatial_vae.module.", "temporal_vae."
SCALING_FACTOR = 0.18215  # hard-coded in Open-Sora 1.2 around its SDXL VAE; needed for its weights (Open-Sora#493)
MICRO_FRAMES = 17  # of the published VAE
PUBLISHED_STATS = {"latents_mean": "shift", "latents_std": "scale"}  # our buffers -> keys of the published files


def read(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """Configuration and state of an OpenSoraVAE. Raises KeyError or ValueError for a network of another form."""
    state, notes = weights.state, weights.notes
    spatial = {k.removeprefix(SPATIAL): v for k, v in state.items() if k.startswith(SPATIAL)}
    spatial = rename_keys(spatial, ldm.OLD_ATTENTION)
    temporal = {k.removeprefix(TEMPORAL): v for k, v in state.items() if k.startswith(TEMPORAL)}
    temporal_config = _temporal_config(temporal)
    channels = temporal_config["latent_channels"]

    buffers = {}
    for name, key in PUBLISHED_STATS.items():
        if key in state:  # 0-dimensional in files that the original training script wrote
            if state[key].numel() not in (1, channels):
                raise ValueError(f"{key} has the shape {list(state[key].shape)}; its latents have {channels} channels")
            buffers[name] = state[key].reshape(-1).expand(channels).clone()
        else:
            buffers[name] = torch.full((channels,), 1.0 if key == "scale" else 0.0)
            notes.append(f"the file has no `{key}`; {buffers[name].tolist()} is used")
    if not weights.config_json:
        notes.append(f"no config.json beside the file; micro_frames {MICRO_FRAMES} is used, as published")

    config = {
        "_target_": "vae3d.models.opensora.OpenSoraVAE",
        "spatial": ldm.spatial_config(spatial, {}, {"scaling_factor": SCALING_FACTOR}, notes),
        "temporal": temporal_config,
        "micro_frames": weights.config_json.get("micro_frame_size", MICRO_FRAMES),
        **{name: buffer.tolist() for name, buffer in buffers.items()},
    }
    own = {f"{SPATIAL}{key}": tensor for key, tensor in spatial.items()}
    own |= {f"{TEMPORAL}{key}": tensor for key, tensor in temporal.items()}
    own |= {name: buffer.reshape(1, -1, 1, 1, 1) for name, buffer in buffers.items()}
    stats = PUBLISHED_STATS.values()
    unknown = {k: v for k, v in state.items() if not k.startswith((SPATIAL, TEMPORAL)) and k not in stats}
    return config, own | unknown  # the strict loader then names the unknown


def to_published(state: State) -> State:
    """An OpenSoraVAE's state under the published keys. The keys of other models do not change."""
    return {PUBLISHED_STATS.get(key, key): tensor for key, tensor in state.items()}


def _temporal_config(state: State) -> dict[str, Any]:
    """Constructor arguments of TemporalVAE, from the shapes."""
    levels = count_layers(state, r"encoder\.block_res_blocks\.(\d+)\.")
    widths = [state[f"encoder.block_res_blocks.{i}.0.conv1.conv.weight"].shape[0] for i in range(levels)]
    return {
        "_target_": "vae3d.models.temporal.TemporalVAE",
        "in_channels": state["encoder.conv_in.conv.weight"].shape[1],
        "latent_channels": state["post_quant_conv.conv.weight"].shape[0],
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "downsample": [f"encoder.conv_blocks.{i}.conv.weight" in state for i in range(levels - 1)],
        "layers": count_layers(state, r"encoder\.res_blocks\.(\d+)\."),
    }


def config_json(config: dict[str, Any], state: State) -> dict[str, Any]:
    """config.json of hpcai-tech/OpenSora-VAE-v1.2. config: arguments of OpenSoraVAE."""
    published = read_json(Path(__file__).with_name("opensora_config.json"))
    latents = {name: state[name].flatten().tolist() for name in ("scale", "shift")}
    return published | {"micro_frame_size": config["micro_frames"], **latents}

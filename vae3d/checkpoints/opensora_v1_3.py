"""Open-Sora 1.3's VAE (hpcai-tech/OpenSora-VAE-v1.3); its keys are this project's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vae3d.checkpoints.published import PublishedWeights, State, count_layers
from vae3d.io import read_yaml

MARKER = "encoder.mid.attn_1.q.conv.weight"  # a key that only these files have
PUBLISHED = Path(__file__).parents[1] / "conf/model/opensora_v1_3.yaml"


def read(weights: PublishedWeights) -> tuple[dict[str, Any], State]:
    """Configuration and state of an OpenSoraV13VAE. Raises KeyError or ValueError for a network of another form."""
    state, published = weights.state, read_yaml(PUBLISHED)
    levels = count_layers(state, r"encoder\.down\.(\d+)\.")
    base = state["encoder.conv_in.conv.weight"].shape[0]
    widths = [state[f"encoder.down.{level}.block.0.conv1.conv.weight"].shape[0] for level in range(levels)]
    if any(width % base for width in widths):
        raise ValueError(f"its levels have {widths} channels, which are no multiples of the first convolution's {base}")
    latents = state["decoder.conv_in.conv.weight"].shape[1]
    stats = {name: published[name] for name in ("latents_mean", "latents_std")}
    used = "those of the published weights"
    if latents != published["latent_channels"]:
        stats, used = {"latents_mean": [0.0] * latents, "latents_std": [1.0] * latents}, "0 and 1"
    weights.notes.append(f"the file does not hold its latents' mean and standard deviation; {used} are used")
    weights.assumed += ["latents_mean", "latents_std"]
    config = {
        "_target_": "vae3d.models.opensora_v1_3.OpenSoraV13VAE",
        "channels": base,
        "multipliers": [width // base for width in widths],
        "downsample": [f"encoder.down.{level}.downsample.conv.conv.weight" in state for level in range(levels - 1)],
        "layers": count_layers(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": latents,
        "micro_frames": published["micro_frames"],
        **stats,
    }
    return config, state

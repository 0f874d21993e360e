"""Denoisers and processes that a file may name, and the settings of a denoiser that depend on the latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vae3d.arguments import annotations_of, check_value, short
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import Process
from vae3d.diffusion.transformer import VideoTransformer
from vae3d.diffusion.unet import LatentUNet
from vae3d.diffusion.wan import WanTransformer
from vae3d.models.registry import TARGET, build_model, is_known, target_of

NETWORKS = {target_of(cls): cls for cls in (LatentUNet, VideoTransformer, WanTransformer)}
PROCESSES = {target_of(cls): cls for cls in (GaussianDiffusion, RectifiedFlow)}


def network_config(config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, Any]:
    """A denoiser's configuration with what is null chosen for latents [C, t, h, w].

    Raises ValueError for another number of channels, and for values that the network does not take.
    """
    channels = latent_shape[0]
    if config.get("channels") not in (None, channels):
        raise ValueError(f"channels is {short(config['channels'])}; the latents have {channels}")
    whole = {**config, "channels": channels}
    if not is_known(config, NETWORKS):
        return whole
    cls = NETWORKS[config[TARGET]]
    for name, kind in annotations_of(cls.__init__).items():
        if whole.get(name) is not None:
            check_value(whole[name], kind, name)
    return cls.infer_defaults(whole, latent_shape)


def build_network(config: Mapping[str, Any], latent_shape: Sequence[int], source: object = "network") -> nn.Module:
    """The denoiser that a file describes, with random weights. source: the file, for errors.

    Raises FileError for a class that is not in NETWORKS and for arguments that it does not take.
    """
    whole = network_config(config, latent_shape)
    network = build_model(whole, source, "network", NETWORKS)
    network.config = whole
    return network


def build_process(config: Any, source: object = "process") -> Process:
    """The process that a file describes. Raises FileError as build_network does."""
    return build_model(config, source, "process", PROCESSES)

"""Networks and processes from plain data, which checkpoints keep, so that sampling builds what was trained."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from vae3d.arguments import annotations_of, check_value, short
from vae3d.diffusion import transformer, unet, wan
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import Process
from vae3d.errors import UserError

# kind -> (the network, what fills in the settings that depend on the size of the latents)
NETWORKS: dict[str, tuple[type[nn.Module], Callable[..., dict[str, Any]]]] = {
    "unet": (unet.LatentUNet, unet.infer_defaults),
    "transformer": (transformer.VideoTransformer, transformer.infer_defaults),
    "wan": (wan.WanTransformer, transformer.infer_defaults),
}
PROCESSES: dict[str, type[Process]] = {"gaussian": GaussianDiffusion, "flow": RectifiedFlow}

# Settings that change how a network runs, not what its weights compute.
RUNNING = ("gradient_checkpointing", "dropout")


def network_config(config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, Any]:
    """Every setting that builds the network for latents [C, t, h, w], with its kind: what a checkpoint keeps.

    config: kind, and what differs from the defaults of that network; one that is complete comes back as it is.
    Raises ValueError for an unknown kind or setting, and for another number of latent channels.
    """
    kind, given = _kind("network", config, NETWORKS)
    cls, fitted = NETWORKS[kind]
    defaults = _settings(cls)
    given = {name: value for name, value in given.items() if value is not None}
    _check(kind, given, annotations_of(cls.__init__))
    if given.get("channels") not in (None, latent_shape[0]):
        raise ValueError(f"the network is for latents of {given['channels']} channels; these have {latent_shape[0]}")
    return {"kind": kind, **_plain(defaults | fitted(given | {"channels": latent_shape[0]}, latent_shape))}


def build_network(config: Mapping[str, Any], latent_shape: Sequence[int]) -> nn.Module:
    """The network of network_config(config, latent_shape), which it keeps as `config`, with random weights.

    Raises ValueError as network_config and the network itself do.
    """
    whole = network_config(config, latent_shape)
    network = NETWORKS[whole["kind"]][0](**{name: value for name, value in whole.items() if name != "kind"})
    network.config = whole
    return network


def process_config(process: Process) -> dict[str, Any]:
    """Plain data that build_process makes the process from."""
    kind = next(kind for kind, cls in PROCESSES.items() if type(process) is cls)
    return {"kind": kind, **dataclasses.asdict(process)}


def build_process(config: Mapping[str, Any]) -> Process:
    """config: kind, gaussian or flow, and what differs from its defaults. Raises ValueError as network_config does."""
    kind, given = _kind("process", config, PROCESSES)
    _check(kind, given, annotations_of(PROCESSES[kind]))
    return PROCESSES[kind](**given)


def require_same(trained: Mapping[str, Any], asked: Mapping[str, Any], what: str) -> None:
    """Raises UserError naming each setting in which two complete configurations of a network or a process differ;
    those that only change how it runs may."""
    trained, asked = _plain(trained), _plain(asked)
    keys = sorted({*trained, *asked} - {*RUNNING})
    if unlike := [key for key in keys if trained.get(key) != asked.get(key)]:
        told = "; ".join(f"{key} is {trained.get(key)!r} there, {asked.get(key)!r} here" for key in unlike)
        raise UserError(f"the checkpoint's {what} is another one: {told}; leave these out to use the checkpoint's")


def _kind(what: str, config: Mapping[str, Any], kinds: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    given = dict(config)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"kind of {what} is {short(kind)}; use one of {', '.join(kinds)}")
    return kind, given


def _check(kind: str, given: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    if unknown := sorted(set(given) - set(annotations)):
        raise ValueError(f"{kind} has no {short(', '.join(unknown))[1:-1]}; it has {', '.join(annotations)}")
    for name, value in given.items():
        check_value(value, annotations[name], f"{kind}: {name}")


def _settings(cls: type) -> dict[str, Any]:
    """Name -> default, None where there is none."""
    parameters = inspect.signature(cls).parameters
    return {name: None if p.default is p.empty else p.default for name, p in parameters.items()}


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON and YAML give them back."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value

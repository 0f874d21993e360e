"""Models that a file may name. Building one from a file looks up no other code by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vae3d.arguments import ArgumentError, annotations_of, short
from vae3d.errors import UserError
from vae3d.io import FileError
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.opensora_v1_3 import OpenSoraV13VAE
from vae3d.models.spatial import SpatialVAE
from vae3d.models.taehv import TAEHV
from vae3d.models.taesd import TAESD
from vae3d.models.temporal import TemporalVAE
from vae3d.models.wan import WanVAE

TARGET = "_target_"  # as in conf/model, so that one configuration serves both
# Arguments of models that change memory, and results by rounding only.
RUNNING = ("frame_batch", "gradient_checkpointing", "chunk_latents")


def target_of(cls: type) -> str:
    """A class's name under `_target_`."""
    return f"{cls.__module__}.{cls.__qualname__}"


# Add a new model here, so that its exports can be loaded. Its constructor must check its arguments (vae3d.arguments).
MODELS: dict[str, type[nn.Module]] = {
    target_of(cls): cls
    for cls in (SpatialVAE, TemporalVAE, OpenSoraVAE, OpenSoraV13VAE, WanVAE, TAEHV, TAESD, DiffusersVAE)
}


def build_model(
    config: Any, source: object, key: str = "", classes: Mapping[str, type] = MODELS, kind: type = object
) -> Any:
    """Build a model with random weights from a configuration of plain dicts, whose `_target_` is a key of `classes`.

    source, key: the file, and the configuration's key in it, for errors. kind: base class of the result.
    Raises FileError for a class that is not in `classes`, and for arguments that are unknown, missing, of another type,
    out of range or inconsistent.
    """
    choices = [target for target, cls in classes.items() if issubclass(cls, kind)]
    if not isinstance(config, Mapping):
        raise FileError(f"{source}: {key} is {short(config)}; give a dict with {TARGET}, one of {', '.join(choices)}")
    path = f"{key}." if key else ""
    target = config.get(TARGET)
    if not isinstance(target, str) or target not in choices:
        own = ". To load another class that you trust, build it yourself and call vae3d.load(path, model)"
        raise FileError(
            f"{source}: {path}{TARGET} is {short(target)}; use one of {', '.join(choices)}"
            f"{own if classes is MODELS else ''}"
        )
    cls = classes[target]
    given = {name: value for name, value in config.items() if name != TARGET}
    _check_names(given, cls, f"{source}: {path}", path)
    for name, annotation in annotations_of(cls.__init__).items():
        if name in given and inspect.isclass(annotation) and issubclass(annotation, nn.Module):
            given[name] = build_model(given[name], source, f"{path}{name}", classes, annotation)
    try:
        return cls(**given)
    except ArgumentError as error:
        raise FileError(f"{source}: {path}{error}") from error
    except ValueError as error:  # arguments that do not fit together
        raise FileError(f"{source}: {key or 'model'} ({cls.__name__}): {error}") from error


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration that builds a model with the same arguments. Raises UserError for an unknown class."""
    target = target_of(type(model))
    if target not in MODELS:
        raise UserError(f"{target} is not a model of this project ({', '.join(MODELS)})")
    return {TARGET: target} | {name: _plain(value) for name, value in model.init_arguments.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return config_of(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def is_known(config: Any, classes: Mapping[str, type] = MODELS) -> bool:
    """Whether a configuration names one of `classes`."""
    return isinstance(config, Mapping) and isinstance(config.get(TARGET), str) and config[TARGET] in classes


def _check_names(given: Iterable[str], cls: type, where: str, path: str) -> None:
    parameters = inspect.signature(cls).parameters
    for name in given:
        if name not in parameters:
            close = difflib.get_close_matches(name[:80], parameters, n=1, cutoff=0.5)
            hint = f"did you mean {path}{close[0]}?" if close else f"use one of {', '.join(parameters)}"
            raise FileError(f"{where}{name[:80]} is not an argument of {cls.__name__}; {hint}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if missing:
        raise FileError(f"{where}{missing[0]} is missing; {cls.__name__} needs {', '.join(missing)}")

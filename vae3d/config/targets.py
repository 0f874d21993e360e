"""Checks of _target_ nodes."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any


def target_errors(node: Any, path: str = "") -> list[str]:
    """Arguments of every `_target_` that its signature does not have or misses."""
    if not isinstance(node, dict):
        return []
    errors = [reason for key, value in node.items() for reason in target_errors(value, f"{path}{key}.")]
    if "_target_" not in node:
        return errors
    target, name = node["_target_"], path.rstrip(".")
    try:
        parameters = inspect.signature(_locate(target)).parameters
    except (ImportError, AttributeError, ValueError) as error:
        return [*errors, f"{path}_target_={target} cannot be imported: {error}"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return errors
    given = [key for key in node if not key.startswith("_")]
    for key in given:
        if key not in parameters:
            errors.append(f"{path}{key} is not an argument of {target}{nearest(key, parameters, path)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in given and parameter.kind is not parameter.VAR_POSITIONAL:
            errors.append(f"{name} lacks the argument {key} of {target}")
    return errors


def _locate(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def nearest(key: str, options: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; there are {', '.join(options)}" if options else "; it takes none"

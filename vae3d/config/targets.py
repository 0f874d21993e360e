"""Checks of `_target_` nodes: does the class exist, and does it take these arguments?

Classes of this package are read from their source, since importing them would import torch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vae3d.config.issues import MISSING, NO_VALUE, ConfigIssue, nearest, walk

ROOT = Path(__file__).parents[2]


class Signature(NamedTuple):
    """Arguments of a class: name -> whether it is required. open: it takes **kwargs, too."""

    arguments: dict[str, bool]
    open: bool = False


def target_issues(tree: Any) -> Iterator[ConfigIssue]:
    """Arguments that a `_target_` at any depth does not have, or that are missing."""
    for key, node in walk(tree):
        if isinstance(node, dict) and node.get("_target_") not in (None, MISSING):
            yield from _node_issues(node, f"{key}." if key else "")


def _node_issues(node: Mapping[str, Any], prefix: str) -> Iterator[ConfigIssue]:
    target = node["_target_"]
    try:
        signature = signature_of(str(target))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        yield ConfigIssue(f"{prefix}_target_", target, f"cannot be imported: {error}")
        return
    given = [name for name in node if not name.startswith("_")]
    for name in given:
        if name not in signature.arguments and not signature.open:
            hint = nearest(name, signature.arguments, prefix)
            yield ConfigIssue(f"{prefix}{name}", NO_VALUE, f"is not an argument of {target}", hint, malformed=True)
    for name, required in signature.arguments.items():
        if required and name not in given:
            yield ConfigIssue(f"{prefix}{name}", NO_VALUE, f"is a required argument of {target}", f"set {prefix}{name}")


def signature_of(target: str) -> Signature:
    """Signature of a class or function. Raises ImportError, AttributeError or ValueError if it cannot be found."""
    module, _, name = target.rpartition(".")
    if module.startswith("vae3d.") and (found := _from_source(module, name)):
        return found
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    named = {p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return Signature(named, any(p.kind is p.VAR_KEYWORD for p in parameters))


@cache
def _module(name: str) -> Mapping[str, ast.stmt]:
    """Top-level definitions and imported names of a module of this package; empty if it has no such file."""
    file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(file.read_text()).body if file.is_file() else []:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({alias.asname or alias.name: node for alias in node.names})
    return found


def _from_source(module: str, name: str) -> Signature | None:
    """None where the source does not say: an unknown name, or a base class from elsewhere with a constructor."""
    node = _module(module).get(name)
    if isinstance(node, ast.ImportFrom):
        return _from_source(node.module or "", name)
    if isinstance(node, ast.FunctionDef):
        return _arguments(node.args)
    if not isinstance(node, ast.ClassDef):
        return None
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item.args, skip=1)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return Signature({ast.unparse(field.target): field.value is None for field in fields})
    return _from_source(module, ast.unparse(node.bases[0])) if node.bases else Signature({})


def _arguments(args: ast.arguments, skip: int = 0) -> Signature:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    pairs = [*zip(positional, defaults, strict=True)][skip:]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return Signature({argument.arg: default is None for argument, default in pairs}, args.kwarg is not None)

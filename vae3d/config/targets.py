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

from vae3d.config.issues import MISSING, NO_VALUE, ConfigIssue, nearest

ROOT = Path(__file__).parents[2]


class Argument(NamedTuple):
    """An argument of a class. default, annotation: as source text; default None: required."""

    default: str | None
    annotation: str = ""


class Signature(NamedTuple):
    arguments: dict[str, Argument]
    open: bool = False  # takes **kwargs
    doc: str = ""


def target_issues(node: Any, key: str = "") -> Iterator[ConfigIssue]:
    """Arguments that a `_target_` at any depth does not have, or that are missing."""
    if not isinstance(node, dict):
        return
    prefix = f"{key}." if key else ""
    for name, value in node.items():
        yield from target_issues(value, f"{prefix}{name}")
    target = node.get("_target_")
    if target in (None, MISSING):
        return
    try:
        signature = signature_of(str(target))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        yield ConfigIssue(f"{prefix}_target_", target, f"cannot be imported: {error}")
        return
    given = [name for name in node if not name.startswith("_")]
    if not signature.open:
        for name in given:
            if name not in signature.arguments:
                hint = nearest(name, signature.arguments, prefix)
                yield ConfigIssue(f"{prefix}{name}", NO_VALUE, f"is not an argument of {target}", hint, True)
    for name, argument in signature.arguments.items():
        if argument.default is None and name not in given:
            yield ConfigIssue(f"{prefix}{name}", NO_VALUE, f"is a required argument of {target}", f"set {prefix}{name}")


def signature_of(target: str) -> Signature:
    """Signature of a class or function. Raises ImportError, AttributeError or ValueError if it cannot be found."""
    module, _, name = target.rpartition(".")
    if module.startswith("vae3d.") and (found := _from_source(module, name)):
        return found
    return _from_object(getattr(importlib.import_module(module), name))


def _from_object(target: Any) -> Signature:
    parameters = inspect.signature(target).parameters.values()
    arguments = {
        p.name: Argument(None if p.default is p.empty else repr(p.default))
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    return Signature(arguments, any(p.kind is p.VAR_KEYWORD for p in parameters))


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
        return _arguments(node.args, ast.get_docstring(node) or "")
    if not isinstance(node, ast.ClassDef):
        return None
    doc = ast.get_docstring(node) or ""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item.args, doc, skip=1)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return Signature(
            {
                ast.unparse(item.target): Argument(item.value and ast.unparse(item.value), ast.unparse(item.annotation))
                for item in node.body
                if isinstance(item, ast.AnnAssign)
            },
            doc=doc,
        )
    if not node.bases:
        return Signature({}, doc=doc)
    found = _from_source(module, ast.unparse(node.bases[0]))
    return found and found._replace(doc=doc)


def _arguments(args: ast.arguments, doc: str, skip: int = 0) -> Signature:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    pairs = [*zip(positional, defaults, strict=True)][skip:]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return Signature(
        {
            arg.arg: Argument(default and ast.unparse(default), ast.unparse(arg.annotation) if arg.annotation else "")
            for arg, default in pairs
        },
        args.kwarg is not None,
        doc,
    )

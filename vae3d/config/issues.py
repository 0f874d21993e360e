"""What is wrong with a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vae3d.errors import UserError
from vae3d.text import plural

MISSING = "???"  # Hydra's mark for a value that only the user can give
NO_VALUE = object()


@dataclass(frozen=True)
class ConfigIssue:
    """One error of a configuration.

    key: dotted, with indices of lists: data.frames.max, optim.betas[1]. value: as given, NO_VALUE if there is none.
    malformed: the key does not exist or its value has the wrong type, so the value that was meant is missing. weights:
    names of the files of pretrained networks whose absence is the error.
    """

    key: str
    value: Any
    message: str
    hint: str = ""
    malformed: bool = False
    weights: tuple[str, ...] = ()

    def __str__(self) -> str:
        given = "" if self.value is NO_VALUE else f"={_text(self.value)}"
        return f"{self.key}{given}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class ConfigError(UserError):
    """All errors of a configuration. Equal ones, such as a file that several loss terms lack, are listed once."""

    def __init__(self, issues: list[ConfigIssue]) -> None:
        lines = {f"  {issue}": issue for issue in issues}
        self.issues = list(lines.values())
        super().__init__("\n".join([f"the configuration has {plural(len(lines), 'error')}:", *lines]))


def raise_if_any(issues: list[ConfigIssue]) -> None:
    if issues:
        raise ConfigError(issues)


def is_within(key: str, parent: str) -> bool:
    """Whether a dotted key is `parent` or one of its descendants."""
    return key == parent or key.startswith((f"{parent}.", f"{parent}["))


def add_new(issues: list[ConfigIssue], found: Iterable[ConfigIssue]) -> list[ConfigIssue]:
    """The issues, and of those found later the ones of other keys."""
    keys = {issue.key for issue in issues}
    return issues + [issue for issue in found if issue.key not in keys]


def nearest(name: str, options: Iterable[str], prefix: str = "") -> str:
    """A hint at the nearest valid name, or at all of them if none is near."""
    options = list(options)
    if close := close_match(name, options):
        return f"did you mean {prefix}{close}?"
    return f"use one of {', '.join(options)}" if options else "there are none"


def close_match(name: str, options: Iterable[str]) -> str | None:
    """The option of which `name` may be a misspelling."""
    return next(iter(difflib.get_close_matches(name, list(options), n=1, cutoff=0.65)), None)


def walk(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, node or value) of everything in a tree of dicts and lists, itself included."""
    yield key, node
    if isinstance(node, dict):
        for name, value in node.items():
            yield from walk(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{key}[{index}]")


def _text(value: Any) -> str:
    """As it would be typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)

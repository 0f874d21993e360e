"""Overrides of the command line that Hydra itself would refuse, one at a time and in its own words."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from vae3d.config.issues import ConfigIssue, nearest
from vae3d.config.schema import CONF


def is_group(name: str) -> bool:
    """Whether an override of this name chooses a file of a folder in conf/, as model=wan does."""
    return (CONF / name).is_dir() or "@" in name or "/" in name


def override_issues(overrides: Sequence[str]) -> list[ConfigIssue]:
    """Overrides that cannot be parsed, and files that a folder of conf/ does not have.

    Not checked: Hydra's own groups, which depend on its plugins; and files where the user adds folders of their own.
    """
    own_folders = any("hydra.searchpath" in o or o.startswith(("--config-dir", "-cd")) for o in overrides)
    issues = []
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if override.startswith("-") or "=" not in override:
            continue
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            issues.append(ConfigIssue(name, value, f"cannot be parsed: {reason}", "put the value in quotes"))
            continue
        if own_folders or override.startswith("~") or name.startswith("hydra") or not (CONF / name).is_dir():
            continue
        files = sorted(path.stem for path in (CONF / name).glob("*.yaml"))
        for choice in value.strip("[]").split(","):  # a list, or a sweep
            choice = choice.strip("'\" ")
            if choice not in ("", "null", *files) and "(" not in choice:
                message = f"there is no such file in conf/{name}"
                issues.append(ConfigIssue(name, choice, message, nearest(choice, files)))
    return issues

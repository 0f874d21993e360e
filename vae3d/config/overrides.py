"""Overrides of the command line as Hydra takes them, and the errors of those that it would refuse one at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from vae3d.config.fields import allowed, fields_of
from vae3d.config.issues import ConfigIssue, nearest
from vae3d.config.schema import CONF, TrainConfig


def allow_unknown_keys(arguments: Sequence[str]) -> list[str]:
    """Command-line overrides as Hydra takes them.

    Plain `key=value` overrides get `++` in front: Hydra would stop at the first unknown key, and vae3d.config lists
    all. Values that Hydra's grammar does not accept, such as paths with `=`, brackets or letters beyond ASCII, are
    quoted, and `~/` is the home folder.
    """
    return [_override(argument) for argument in arguments]


def _override(argument: str) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or not name[:1].isalpha() or _is_group(name):
        return argument
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    try:
        _parse(f"{name}={value}")
    except HydraException:
        if value[:1] + value[-1:] not in ("[]", "{}"):  # of which Hydra says what is wrong
            value = quoted(value)
    return f"{'' if key != name or name.startswith('hydra.') else '++'}{key}={value}"


def quoted(text: str) -> str:
    """Text as a value of a Hydra override, whatever is in it."""
    return QuotedString(text, Quote.single).with_quotes()


def _parse(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _is_group(name: str) -> bool:
    """Whether an override of this name chooses a file of a folder in conf/, as model=wan does."""
    return (CONF / name).is_dir() or "@" in name or "/" in name


def override_issues(overrides: Sequence[str]) -> list[ConfigIssue]:
    """Overrides that cannot be parsed, and files that a folder of conf/ does not have.

    Not checked: Hydra's own groups, which depend on its plugins; and files where the user adds folders of their own.
    """
    own_folders = any("hydra.searchpath" in o or o.startswith(("--config-dir", "-cd")) for o in overrides)
    issues = []
    for override in overrides:
        name, equals, value = override.lstrip("+").partition("=")
        if override.startswith("-") or not equals:
            continue
        try:
            _parse(override)
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


def without_run_values(overrides: Sequence[str]) -> tuple[list[str], list[ConfigIssue]]:
    """The overrides other than run=VALUE, and an error for each of these.

    `run` is a section. Hydra names the run's folder by its keys, and fails without them.
    """
    wrong = [o for o in overrides if o.lstrip("+").startswith("run=") and not o.endswith("}")]
    message = f"must be {allowed(fields_of(TrainConfig)['run'])}"
    issues = [ConfigIssue("run", o.partition("=")[2], message, malformed=True) for o in wrong]
    return [o for o in overrides if o not in wrong], issues

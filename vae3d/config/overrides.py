"""Overrides of the command line as Hydra takes them, and the errors of those that it would refuse one at a time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vae3d.config.fields import allowed, fields_of
from vae3d.config.issues import NO_VALUE, ConfigIssue, nearest
from vae3d.config.schema import CONF, TrainConfig

FLAGS = (  # Hydra's
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
SWEPT = "VAE3D_SWEPT"  # environment variable: the keys that differ between the jobs of this sweep, for the jobs too


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


@cache
def _parse(override: str) -> Override:
    return _parser().parse_override(override)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _is_group(name: str) -> bool:
    """Whether an override of this name chooses a file of a folder in conf/, as model=wan does."""
    return (CONF / name).is_dir() or "@" in name or "/" in name


def override_issues(overrides: Sequence[str]) -> list[ConfigIssue]:
    """Overrides that cannot be parsed, and files that a folder of conf/ does not have.

    Not checked: Hydra's own groups, which depend on its plugins; and files where the user adds folders of their own.
    """
    own_folders = any("hydra.searchpath" in o or o.startswith(("--config-dir", "-cd")) for o in overrides)
    issues = []
    for before, override in zip(("", *overrides), overrides, strict=False):
        name, equals, value = override.lstrip("+").partition("=")
        if override.startswith("-"):
            if not any(flag.startswith(name) for flag in FLAGS):
                issues.append(ConfigIssue(override, NO_VALUE, "is no flag", "settings are KEY=VALUE"))
            continue
        if not equals:
            follows_flag = before.startswith("-") and before not in ("-m", "--multirun")  # as job follows --cfg
            if not override.startswith("~") and not follows_flag:
                issues.append(ConfigIssue(override, NO_VALUE, "is not KEY=VALUE", "write no spaces around ="))
            continue
        if not name:
            issues.append(ConfigIssue(override, NO_VALUE, "has no key", "write KEY=VALUE without spaces"))
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
            if choice not in ("", *files) and "(" not in choice:
                message = f"there is no such file in conf/{name}"
                issues.append(ConfigIssue(name, choice, message, nearest(choice, files)))
            elif choice in files and (wrong := _syntax_error(CONF / name / f"{choice}.yaml")):
                issues.append(ConfigIssue(name, choice, f"is not valid YAML: {wrong}"))
    return issues


def _syntax_error(file: Path) -> str | None:
    """What is wrong with a YAML file, and in which line; Hydra would end in a traceback."""
    try:
        with file.open(encoding="utf-8") as stream:
            for _ in yaml.parse(stream):
                pass
    except yaml.YAMLError as error:
        return " ".join(str(error).split())
    return None


def without_run_values(overrides: Sequence[str]) -> tuple[list[str], list[ConfigIssue]]:
    """The overrides other than run=VALUE, and an error for each of these.

    `run` is a section. Hydra names the run's folder by its keys, and fails without them.
    """
    wrong = [o for o in overrides if o.lstrip("+").startswith("run=") and not o.endswith("}")]
    message = f"must be {allowed(fields_of(TrainConfig)['run'])}"
    issues = [ConfigIssue("run", o.partition("=")[2], message, malformed=True) for o in wrong]
    return [o for o in overrides if o not in wrong], issues


def swept_keys(overrides: Iterable[str]) -> list[str]:
    """The keys that a sweep's overrides give several values, in order."""
    return [key_of(override) for override in overrides if _parse(override).is_sweep_override()]


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def job_label(overrides: Iterable[str]) -> str:
    """What a sweep changes in one of its jobs: lr=1e-05 kl.weight=1e-06."""
    return " ".join(f"{key}={value}" for key, value in _changes(overrides))


def job_folder(overrides: Sequence[str]) -> str:
    """The folder's name for a job of a sweep: job_label in letters that need no quotes, and a hash of all overrides.

    Values of paths are reduced to their last name. The same overrides give the same name in every sweep, so that a
    job resumes when a sweep is repeated with more values.
    """
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:6]
    words = []
    for key, value in _changes(overrides):
        short = re.sub(r"[^A-Za-z0-9.+]+", "-", value.rstrip("/'\"").rpartition("/")[2]).strip("-.")[:24]
        words.append(f"{key.replace('/', '.')}={short}")
    return f"{'_'.join(words)[:80].rstrip('-.') or 'job'}_{digest}"


def _changes(overrides: Iterable[str]) -> list[tuple[str, str]]:
    """(key, value) that differ between the jobs of this sweep. Keys are as short as they differ."""
    keys = list(filter(None, os.environ.get(SWEPT, "").split(",")))
    values = {key_of(override): override.partition("=")[2] for override in overrides}
    return [(_shortest(key, keys), values[key]) for key in keys if key in values]


def _shortest(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key has."""
    names = key.split(".")
    ends = [".".join(names[-count:]) for count in range(1, len(names))]
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)

"""What `--help` of a command prints that Hydra configures."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from string import Template
from typing import Any

import hydra
from omegaconf import OmegaConf, open_dict
from pydantic.fields import FieldInfo

from vae3d.config.fields import allowed, bare, fields_of, nested_schema
from vae3d.config.schema import CONF, SCHEMAS

WIDTH = 100


def help_text(config_name: str, overrides: Sequence[str]) -> str:
    """The template hydra.help.template of conf/, filled as Hydra fills it, in a tenth of its two seconds, with only the
    groups that the command has, and with the meaning of each key.

    Hydra reads and copies the defaults list again for each of 140 choices. Raises hydra.errors.HydraException for an
    unknown choice.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(config_name, list(overrides), return_hydra_config=True)
    template, groups = Template(cfg.hydra.help.template), cfg.hydra.runtime.choices.keys()
    with open_dict(cfg):
        del cfg["hydra"]
    lines = "".join(f"{group}: {', '.join(names)}\n" for group, names in sorted(choices().items()) if group in groups)
    settings = "\n".join(explained(OmegaConf.to_yaml(cfg).splitlines(), SCHEMAS[f"{config_name}_defaults"]))
    return template.substitute(APP_CONFIG_GROUPS=lines, CONFIG=f"{settings}\n")


def explained(lines: Sequence[str], schema: Any) -> Iterator[str]:
    """Lines of YAML, each key after a comment that says what it means, and in brackets what it may be. Entries of lists
    have no comments, and neither have arguments of classes."""
    sections = [schema]  # that a line is in, each with what explains its keys; None: nothing does
    for line in lines:
        indent, dash, key, value = re.fullmatch(r"( *)(- )?(?:([\w.-]+):(?= |$))?(.*)", line).groups()
        depth = len(indent) // 2
        if dash:
            sections[depth + 1 :] = [None]
        elif key and depth < len(sections):
            section, comment = sections[depth], ""
            if section is None:
                inner = None
            elif typing.get_origin(bare(section)) is dict:  # the keys are names, of sections of one kind
                inner = nested_schema(section)
            elif field := fields_of(section).get(key):
                inner, comment = _section(field.annotation), _meaning(field, shown_below=not value)
            else:
                inner, comment = None, "unknown key"
            yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
            sections[depth + 1 :] = [inner]
        yield line


def _meaning(field: FieldInfo, shown_below: bool) -> str:
    if field.description is None:
        return inspect.getdoc(nested_schema(field.annotation)).partition("\n\n")[0]
    kinds = allowed(field)
    obvious = re.match("text|true or false|see meaning", kinds) or (shown_below and kinds.startswith("a group"))
    return field.description if obvious else f"{field.description} [{kinds}]"


def _section(kind: Any) -> Any:
    """What explains the lines below a key of this type."""
    return kind if typing.get_origin(bare(kind)) is dict else nested_schema(kind)


def choices() -> dict[str, list[str]]:
    """The groups of conf/, without Hydra's own, and the names of their files."""
    found = {}
    for folder, _, files in os.walk(CONF):
        group = os.path.relpath(folder, CONF)
        names = sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml"))
        if names and group.split(os.sep)[0] not in (".", "hydra"):
            found[group.replace(os.sep, "/")] = names
    return found

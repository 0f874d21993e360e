"""docs/reference.md, from the schemas and the signatures of the classes that conf/ names:

python docs/make_reference.py > docs/reference.md
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from vae3d.config.diffusion import DiffusionConfig, SampleConfig
from vae3d.config.fields import allowed, fields_of, nested_schema
from vae3d.config.issues import MISSING
from vae3d.config.latents import EncodeConfig
from vae3d.config.schema import CONF, Clips, CompareConfig, InferConfig, MixedSource, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from site_hooks import as_list

COMMANDS = {
    "vae3d train": TrainConfig,
    "vae3d infer": InferConfig,
    "vae3d compare": CompareConfig,
    "vae3d encode": EncodeConfig,
    "vae3d train-diffusion": DiffusionConfig,
    "vae3d sample": SampleConfig,
}
# Nodes with a `_target_`: key -> the group of conf/ whose files name the classes.
GROUPS = {
    "model": "model",
    "loss.terms.NAME.term": "loss",
    "adversary": "adversary",
    "data.source": "data",
    "denoiser": "denoiser",
    "process": "process",
}
INTRO = """\
# All keys

[vae3d](../README.md) | [All pages](../README.md#where-to-go-next)

Generated from `vae3d/config/` by `python docs/make_reference.py > docs/reference.md`. Do not edit.

`KEY=VALUE` on the command line sets a key. A wrong key or value stops every command before it reads data, with all
errors in one list. **Required** keys have no default; the files of `conf/` set most of them.

Keys of {commands}, and arguments of the [classes](#classes) that the files of `conf/` name.
"""


def markdown() -> str:
    links = ", ".join(f"[{command}](#{command.replace(' ', '-')})" for command in COMMANDS)
    parts, documented = [INTRO.format(commands=links)], set()
    for command, schema in COMMANDS.items():
        parts.append(f"## `{command}`\n\n{inspect.getdoc(schema)}\n")
        parts += _tables(schema, "", documented)
    parts.append("## Classes\n\nArguments of the `_target_` nodes, which the files of `conf/` fill in.\n")
    for key, group in GROUPS.items():
        parts.append(f"### `{key}`\n")
        parts += [_class(target) for target in targets(CONF / group)]
    return "\n".join(parts).rstrip() + "\n"


def _tables(schema: Any, prefix: str, documented: set[tuple[str, Any]]) -> Iterator[str]:
    """A table of the schema's keys, then those of its sections that are not in `documented`."""
    rows, sections = [], []
    fields = dict(fields_of(schema))
    if schema is MixedSource:
        inherited = [name for name in fields if name in fields_of(Clips)]
        rows.append(f"| {', '.join(f'`{name}`' for name in inherited)} | those of `data` | | as `data.*` |")
        fields = {name: field for name, field in fields.items() if name not in inherited}
    if schema is CompareConfig:
        rows.append("| all keys of `vae3d infer` | | | as there |")
        fields = {name: field for name, field in fields.items() if name not in fields_of(InferConfig)}
    for name, field in fields.items():
        section = nested_schema(field.annotation)
        key = f"{prefix}{name}.NAME" if typing.get_origin(field.annotation) is dict else f"{prefix}{name}"
        key += "[N]" if "list[" in str(field.annotation) else ""
        if section is None:
            rows.append(_row(f"{prefix}{name}", field))
        elif (key, section) in documented:
            rows.append(f"| `{key}.*` | | | as in `vae3d train` |")
        else:
            sections.append((key, section))
            documented.add((key, section))
    if rows:
        yield "\n".join(["| key | default | allowed | meaning |", "|---|---|---|---|", *rows, ""])
    for key, section in sections:
        yield f"{'####' if prefix else '###'} `{key}.*`\n\n{inspect.getdoc(section)}\n"
        yield from _tables(section, f"{key}.", documented)


def _row(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    text = "**required**" if default == MISSING else f"`{_yaml(default)}`"
    return f"| `{key}` | {text} | {allowed(field)} | {field.description} |"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def targets(folder: Path) -> list[str]:
    """The classes of this package that the files of a folder name."""
    text = "".join(path.read_text() for path in sorted(folder.glob("*.yaml")))
    return sorted(set(re.findall(r"_target_: *(vae3d[\w.]+)", text)))


def _class(target: str) -> str:
    module, _, name = target.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    arguments, rows = inspect.signature(kind).parameters, []
    for argument in arguments.values():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):  # of a Protocol, until its first instance
            continue
        default = "**required**" if argument.default is argument.empty else f"`{argument.default!r}`"
        rows.append(f"| `{argument.name}` | {default} | {_type(argument.annotation)} |")
    table = ["| argument | default | type |", "|---|---|---|", *rows, ""] if rows else []
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    text = "\n\n".join(as_list(paragraph, set(arguments)) for paragraph in paragraphs)
    return "\n".join([f"#### `{target}`", "", text, "", *table])


def _type(annotation: str) -> str:
    return f"`{annotation}`".replace("|", "\\|") if annotation is not inspect.Parameter.empty else ""


if __name__ == "__main__":
    print(markdown(), end="")

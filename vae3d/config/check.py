"""Every error of a configuration in one list, before data, weights or a GPU are touched. Imports no torch."""

from __future__ import annotations

import copy
import dataclasses
import glob
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from vae3d.checkpoints.location import cached_repository, exists, hub_hint
from vae3d.config.adapter import adapter_issues
from vae3d.config.fields import allowed, allowed_entry, bare, fields_of, nested_schema
from vae3d.config.issues import (
    MISSING,
    NO_VALUE,
    ConfigIssue,
    add_new,
    close_match,
    is_within,
    nearest,
    raise_if_any,
    walk,
)
from vae3d.config.sources import class_issues, expand_sources, of_source, sources_of, without_inherited
from vae3d.config.targets import target_issues

C = TypeVar("C")

EXAMPLES = {
    "data.source.path": "data.source.path=/path/to/videos.csv",
    "data.source.root": "data.source.root=/path/to/areas (ROOT/AREA/ROOM/output/panorama_0000.png)",
    "stage.init_from": "stage.init_from=CHECKPOINT (a run folder, an export, published weights)",
    "stage.init_from.prune": "stage.init_from.prune=CHECKPOINT of a larger model",
    "stage.init_from.spatial_vae": "stage.init_from.spatial_vae=/path/to/2D-VAE (diffusers folder, LDM file or export)",
    "model.variant": "model.variant=taew2_1 (or taehv, taecvx, taew2_2, ...; see conf/model/taehv.yaml)",
    "teacher.path": "teacher.path=PATH (a run folder, an export, published weights, diffusers' folder)",
    "checkpoint": "checkpoint=PATH (a run folder, an export, published weights)",
    "source": "source=PATH (a CSV, parquet or JSON file, a folder, or one video)",
    "cache": "cache=FOLDER of the latents (the same command resumes)",
    "out": "out=FOLDER of the samples (the same command resumes)",
    "vae.path": "vae.path=PATH (a run folder, an export, published weights)",
    "save_dir": "save_dir=PREFIX of the folders PREFIX_ori, PREFIX_rec, PREFIX_spatial",
}
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
CHECKPOINT_KEYS = ("checkpoint", "teacher.path", "vae", "vae.path", "stage.init_from")


class Rule(NamedTuple):
    """A condition on several values.

    key: the one to change. broken: whether a configuration breaks the rule. message, hint: format strings of the
    configuration `c`.
    """

    key: str
    broken: Callable[[Any], bool]
    message: str
    hint: str


class _WrongValue(Exception):
    """A rule read a value that is wrong itself."""


class _Readable:
    """A configuration whose wrong values raise _WrongValue when they are read."""

    def __init__(self, node: Any, wrong: Sequence[str], key: str = "") -> None:
        self._node, self._wrong, self._key = node, wrong, key

    def __getattr__(self, name: str) -> Any:
        key = f"{self._key}.{name}" if self._key else name
        value = getattr(self._node, name)
        if dataclasses.is_dataclass(value):
            return _Readable(value, self._wrong, key)
        if any(is_within(wrong, key) or is_within(key, wrong) for wrong in self._wrong):
            raise _WrongValue
        return value


Rules = Sequence[Rule | Callable[[Any], Iterable[ConfigIssue]]]


def check(
    cfg: DictConfig,
    issues: Sequence[ConfigIssue] = (),
    *,
    schema: type[C],
    rules: Rules,
    paths: Callable[[C], Mapping[str, Any]],
) -> C:
    """The configuration as typed objects. Raises ConfigError with every error.

    issues: those of the command line. paths: key -> path that must exist.
    """
    config, found = check_all(cfg, schema=schema, rules=rules, paths=paths)
    raise_if_any([*issues, *found])
    return config


def check_all(
    cfg: DictConfig, *, schema: type[C], rules: Rules, paths: Callable[[C], Mapping[str, Any]]
) -> tuple[C, list[ConfigIssue]]:
    """As `check`, with the errors instead of an exception. Wrong and missing values have their defaults."""
    config, issues = read(cfg, schema)
    found = [*check_rules(config, rules, issues), *path_issues(paths(config))]
    return config, add_new(issues, found)


def read(cfg: DictConfig, schema: type[C]) -> tuple[C, list[ConfigIssue]]:
    """The configuration as typed objects, with defaults where values are wrong or missing; and the errors of single
    keys and values."""
    issues: list[ConfigIssue] = []
    tree = _resolve(cfg, OmegaConf.to_container(cfg, resolve=False), "", issues)
    issues += adapter_issues(tree)
    tree, given, beside = expand_sources(tree)
    issues += [*beside, *class_issues(tree)]
    config, wrong = _typed(tree, schema)
    for found in (target_issues(tree), _number_issues(tree), _name_issues(config), wrong, _missing(tree, config)):
        issues = add_new(issues, found)
    return config, without_inherited(issues, given)


def check_rules(config: Any, rules: Rules, issues: Sequence[ConfigIssue] = ()) -> list[ConfigIssue]:
    """Errors of rules. A rule that reads a value with an issue is skipped. Rules on keys that each source of a mixture
    has are checked on every source."""
    wrong = [issue.key for issue in issues]
    c, found = _Readable(config, wrong), []
    sources = _by_source(config, wrong)
    for rule in rules:
        if isinstance(rule, Rule) and sources and of_source("NAME", rule.key) != rule.key:
            broken = [(of_source(name, rule.key), own) for name, own in sources.items()]
        else:
            broken = [(rule.key if isinstance(rule, Rule) else "", c)]
        for key, of in broken:
            with suppress(_WrongValue):
                if not isinstance(rule, Rule):
                    found += rule(of)
                elif rule.broken(of):
                    value = of
                    for name in rule.key.split("."):
                        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
                    found.append(ConfigIssue(key, value, rule.message.format(c=of), rule.hint.format(c=of)))
    return found


def _by_source(config: Any, wrong: Sequence[str]) -> dict[str, _Readable]:
    """Source of a mixture -> the configuration as if it were the only one; nothing without a mixture."""
    data, found = getattr(config, "data", None), {}
    for name, own in (sources_of(data) if getattr(data, "sources", None) else {}).items():
        alone = copy.copy(config)
        alone.data = own
        found[name] = _Readable(alone, [key.replace(f"data.sources.{name}.", "data.") for key in wrong])
    return found


def _resolve(cfg: DictConfig, node: Any, key: str, issues: list[ConfigIssue]) -> Any:
    """The tree with interpolations resolved. What cannot be resolved is MISSING."""
    if isinstance(node, dict):
        return {name: _resolve(cfg, value, f"{key}.{name}" if key else name, issues) for name, value in node.items()}
    if isinstance(node, list):
        return [_resolve(cfg, value, f"{key}[{index}]", issues) for index, value in enumerate(node)]
    if isinstance(node, str) and "${" in node:
        try:
            value = OmegaConf.select(cfg, key)
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            issues.append(ConfigIssue(key, node, f"cannot be resolved: {reason}"))
            return MISSING
    return node


def _number_issues(tree: Any) -> Iterator[ConfigIssue]:
    """Of numbers at any depth, in `_target_` nodes too: finite, at most 64 bits, and a seed at least 0."""
    for key, value in walk(tree):
        if isinstance(value, float) and not math.isfinite(value):
            yield ConfigIssue(key, value, "must be a finite number")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield ConfigIssue(key, value, "must fit into 64 bits")
        elif isinstance(value, int) and value < 0 and key.split(".")[-1] == "seed":
            yield ConfigIssue(key, value, "must be at least 0")


def _name_issues(config: Any) -> Iterator[ConfigIssue]:
    """Of names of a dict in a `_target_` node that are not text: no checkpoint or export could be read again."""
    for key, value in walk(dataclasses.asdict(config)):
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                yield ConfigIssue(key, NO_VALUE, f"has the name {name}, which is not text", "put it in quotes")


def _typed(tree: Any, schema: type[C]) -> tuple[C, list[ConfigIssue]]:
    """pydantic's objects and errors. The defaults of missing and wrong values stand in for them."""
    adapter, present = _adapter(schema), copy.deepcopy(tree)
    try:
        return adapter.validate_python(present), []
    except ValidationError as error:
        issues, errors = [], error.errors(include_url=False)
        unknown = [_dotted(e["loc"]) for e in errors if e["type"] == "unexpected_keyword_argument"]
        keys = [key for key, _ in walk(tree) if not any(is_within(key, other) for other in unknown)]
        for item in errors:
            issue, path = _issue(schema, item, keys)
            if issue.value != MISSING:
                issues.append(issue)
            parent = present
            for depth, part in enumerate(path):
                name = part if part in parent else part.partition("[")[0]  # a section of a list goes with the list
                if depth == len(path) - 1 or not isinstance(parent.get(name), dict):
                    parent.pop(name, None)
                    break
                parent = parent[name]
        return adapter.validate_python(present), issues


@cache
def _adapter(schema: type[C]) -> TypeAdapter[C]:
    """Building it takes several times as long as using it."""
    return TypeAdapter(schema)


def _issue(schema: Any, error: Mapping[str, Any], keys: Sequence[str]) -> tuple[ConfigIssue, list[str]]:
    """A pydantic error as an issue, and the path of the field or dict entry that is wrong.

    keys: those of the configuration, without the unknown ones.
    """
    loc, path, given = [*map(str, error["loc"])], [], error["input"]
    while schema and loc:
        fields, name = fields_of(schema), loc.pop(0)
        prefix = "".join(f"{part}." for part in path)
        path.append(name)
        if name == "teacher" and name not in fields:  # of a command without one
            value = given.get("path", given) if isinstance(given, dict) else given
            hint = "to compare with a teacher, run vae3d compare teacher=PATH ..."
            return ConfigIssue("teacher", value, "unknown key", hint, malformed=True), path
        if name not in fields:
            elsewhere = "" if isinstance(given, dict) else _elsewhere(name, prefix, keys)
            hint = elsewhere or nearest(name, fields, prefix)
            return ConfigIssue(f"{prefix}{name}", NO_VALUE, "unknown key", hint, malformed=True), path
        field = fields[name]
        schema, container = nested_schema(field.annotation), typing.get_origin(bare(field.annotation))
        is_entry = container in (dict, list) and bool(loc)
        if container is dict and loc:
            path.append(loc.pop(0))
            if schema and loc == ["[key]"]:  # as pydantic calls a wrong name
                schema, loc = None, []
        elif schema and loc and loc[0].isdigit():
            path[-1] += f"[{loc.pop(0)}]"
    message, hint = f"must be {allowed_entry(field) if is_entry else allowed(field)}", ""
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    if error["type"] == "literal_error" and isinstance(given, str):
        close = close_match(given, re.findall(r"'(\w+)'", error["ctx"]["expected"]))
        hint = f"did you mean {close}?" if close else ""
    key = ".".join(path) + "".join(f"[{index}]" for index in loc)
    return ConfigIssue(key, given, message, hint, malformed=error["type"].endswith(("_type", "_parsing"))), path


def _dotted(loc: Sequence[str | int]) -> str:
    """A place in a tree as `walk` calls it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _elsewhere(name: str, prefix: str, keys: Sequence[str]) -> str:
    """A hint at the keys of this name below `prefix`, else in any section; nothing if there are none, or over three."""
    found = [key for key in keys if key.endswith(f".{name}")]
    found = [key for key in found if prefix and key.startswith(prefix)] or found
    return f"did you mean {' or '.join(found)}?" if 0 < len(found) <= 3 else ""


def _missing(tree: Any, config: Any) -> Iterator[ConfigIssue]:
    """Values that are required: MISSING in the tree, or in the objects because the tree lacks them."""
    entries = [*walk(dataclasses.asdict(config)), *walk(tree)]
    for key in dict.fromkeys(key for key, value in entries if value == MISSING):
        example = EXAMPLES.get(key, f"{key}=VALUE")
        if key.startswith("data.sources.") and key.endswith((".source.path", ".source.root")):
            example = f"{key}=PATH"
        if key == "data.source.path" and hasattr(config, "cache"):  # a training on latents
            example += " or cache=FOLDER of vae3d encode"
        if key == "stage.init_from" and "all" in config.stage.train:  # no part would stay random
            example += " or random"
        if key == "teacher.path" and hasattr(config, "stage"):  # a training, which needs none
            example += " or teacher=none"
        yield ConfigIssue(key, NO_VALUE, "required", f"set {example}")


def path_issues(paths: Mapping[str, Any]) -> Iterator[ConfigIssue]:
    """Files and folders, by their keys, that do not exist. Values that are not paths are ignored."""
    for key, path in paths.items():
        if path == "":  # as from an unset variable of the shell; pathlib would take the working directory
            yield ConfigIssue(key, path, "is empty", "give a path")
            continue
        cached = any(is_within(key, checkpoint) for checkpoint in CHECKPOINT_KEYS) and cached_repository(path)
        missing = isinstance(path, str) and path != MISSING and not _exists(path) and not cached
        if missing and not _is_stored(key, path):
            yield ConfigIssue(key, path, "no such file or folder", _download_hint(key, path))


def _is_stored(key: str, path: str) -> bool:
    """Whether it is a path of data in a store or in a tar, which are opened when the data are read."""
    from vae3d.data.storage.paths import is_stored

    return (is_within(key, "data") or key in ("source", "root")) and is_stored(path)


def _exists(path: str) -> bool:
    """`*` stands for any characters, of numbered images; {000..999} for each of these numbers; `::` separates a
    checkpoint from its part."""
    if "{" in path and not exists(path):
        from braceexpand import UnbalancedBracesError, braceexpand

        if (ends := RANGE.sub(_ends, path)) != path and not _exists(ends):  # a range may have very many names
            return False
        try:
            names = list(braceexpand(path))
        except UnbalancedBracesError:
            return False
        if names != [path]:
            return all(map(_exists, names))
    return exists(path) or ("*" in path and any(glob.iglob(glob.escape(path).replace("[*]", "*"))))


def _ends(match: re.Match[str]) -> str:
    """{08,10} for {08..10}, padded with zeros as braceexpand does."""
    ends = match.groups()
    padded = any(len(end) > 1 and end.startswith("0") for end in ends)
    return f"{{{','.join(end.zfill(max(map(len, ends)) if padded else 0) for end in ends)}}}"


def _download_hint(key: str, path: str) -> str:
    """How to download a path that may be a name of the Hugging Face hub."""
    if any(is_within(key, checkpoint) for checkpoint in CHECKPOINT_KEYS):
        return hub_hint(path).removeprefix("; ")
    if key.startswith("data.") and key.endswith("source.path"):
        from vae3d.data.sources.dataset_rows import how_to_download  # imports pandas

        return how_to_download(path).removeprefix("; ")
    return ""


def resume_issues(config: Any) -> Iterator[ConfigIssue]:
    """Of a path in run.resume_from. Names of checkpoints are looked up later, in the run's folder."""
    path = config.run.resume_from
    if path in (None, "latest") or re.fullmatch(r"step-\d+", Path(path).name) or Path(path).is_file():
        return
    if not Path(path).is_dir():
        yield ConfigIssue("run.resume_from", path, "no such file or folder")
    elif not (Path(path, "run.json").is_file() or Path(path, "checkpoints").is_dir()):
        hint = "use RUN/checkpoints/step-..., a run or a training state's .pt"
        yield ConfigIssue("run.resume_from", path, "is not a checkpoint", hint)

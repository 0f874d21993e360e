"""data.sources: several sources, each with settings of its own over those of `data`. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vae3d.arguments import flatten
from vae3d.config.fields import fields_of
from vae3d.config.issues import MISSING, ConfigIssue, close_match, is_within, walk

if TYPE_CHECKING:
    from vae3d.config.schema import Data

PREFIX = "data.sources."


def expand_sources(tree: Any) -> tuple[Any, dict[str, list[str]], list[ConfigIssue]]:
    """The tree with the keys of `data` in every source that does not give them; the keys that each source gives; and an
    issue if there is also data.source.

    data.source does not count as given where a value of it is missing: it is the one of a preset.
    """
    data = tree.get("data") if isinstance(tree, dict) else None
    sources = data.get("sources") if isinstance(data, dict) else None
    if not sources or not isinstance(sources, dict):
        return tree, {}, []
    from vae3d.config.schema import MixedSource

    issues, source = [], data.get("source")
    if source is not None and all(value != MISSING for _, value in walk(source)):
        hint = f"leave it out (data=mixture has none), or make it one of data.sources ({', '.join(map(str, sources))})"
        issues.append(ConfigIssue("data.source", source, "is given beside data.sources", hint))
    inherited = {key: data[key] for key in fields_of(MixedSource) if key in data and key != "source"}
    own = {name: node for name, node in sources.items() if isinstance(node, dict)}
    expanded = {name: _merged(inherited, own[name]) if name in own else node for name, node in sources.items()}
    given = {str(name): ["source", *flatten(node)] for name, node in own.items()}
    return {**tree, "data": {**data, "source": None, "sources": expanded}}, given, issues


def class_issues(tree: Any) -> Iterator[ConfigIssue]:
    """Sources without a class, such as one whose name in data.sources is misspelt."""
    data = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(data, dict):
        return
    sources = data.get("sources") or {}
    sources = sources if isinstance(sources, dict) else {}
    nodes = {name: node.get("source") for name, node in sources.items() if isinstance(node, dict)}
    for name, source in nodes.items() if sources else [("", data.get("source"))]:
        if source in (None, MISSING) or (isinstance(source, dict) and "_target_" in source):
            continue
        example = "{_target_: vae3d.data.sources.table.Table, path: videos.csv}"
        hint = f"set data.source.path, or all of it: 'data.source={example}'"
        if name:
            close = close_match(str(name), [str(other) for other in nodes if other != name])
            hint = f"did you mean {PREFIX}{close}? " if close else ""
            hint += f"add a source by '{PREFIX}{name}={{source: {example}}}'"
        key = f"{PREFIX}{name}.source" if name else "data.source"
        yield ConfigIssue(key, source, "has no `_target_`, the class of the source", hint)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **changes}
    for key, value in changes.items():
        if key != "source" and isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merged(base[key], value)
    return copy.deepcopy(merged)


def without_inherited(issues: Sequence[ConfigIssue], given: Mapping[str, Sequence[str]]) -> list[ConfigIssue]:
    """The issues without those of values that a source has from `data`, which are reported there."""
    return [issue for issue in issues if not _inherited(issue.key, given)]


def _inherited(key: str, given: Mapping[str, Sequence[str]]) -> bool:
    name, _, rest = key.removeprefix(PREFIX).partition(".")
    if not key.startswith(PREFIX) or name not in given or not rest:
        return False
    return not any(is_within(rest, own) or is_within(own, rest) for own in given[name])


def of_source(name: str, key: str) -> str:
    """data.height -> data.sources.NAME.height, if the source has a setting of its own; `name` empty: the key."""
    from vae3d.config.schema import MixedSource

    first = key.removeprefix("data.").partition(".")[0].partition("[")[0]
    if not name or not key.startswith("data.") or first not in fields_of(MixedSource):
        return key
    return f"{PREFIX}{name}.{key.removeprefix('data.')}"


def sources_of(data: Data) -> dict[str, Data]:
    """Name of each source -> `data` with its settings. One source without a name if there is no mixture."""
    if not data.sources:
        return {"": data}
    from vae3d.config.schema import Clips

    found = {}
    for name, source in data.sources.items():
        own = copy.copy(data)
        own.sources = {}
        for key in fields_of(Clips):
            setattr(own, key, getattr(source, key))
        found[name] = own
    return found

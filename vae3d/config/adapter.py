"""`model.path` of model=diffusers: the configuration of a published autoencoder. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae3d.checkpoints.location import cached_repository, hub_hint
from vae3d.config.issues import MISSING, NO_VALUE, ConfigIssue
from vae3d.io import FileError, read_json

ADAPTER = "vae3d.models.diffusers_vae.DiffusersVAE"


def adapter_issues(tree: Any) -> Iterator[ConfigIssue]:
    """Replace the `path` of every DiffusersVAE node of a configuration, at any depth and in place, by the class and the
    content of its config.json; yield an issue for each path that has none.

    Exports hold the result, and so do not depend on the path.
    """
    yield from _replace(tree, "")


def _replace(node: Any, key: str) -> Iterator[ConfigIssue]:
    if isinstance(node, dict):
        if node.get("_target_") == ADAPTER and "path" in node:
            yield from _replace_path(node, f"{key}path")
        for name, value in node.items():
            yield from _replace(value, f"{key}{name}.")


def _replace_path(node: dict[str, Any], key: str) -> Iterator[ConfigIssue]:
    path = node.pop("path")
    if path is None:  # then there is a kind
        return
    node.setdefault("kind", "")
    if path == MISSING:
        hint = f"set {key}=FOLDER, of diffusers' layout, or owner/name in the hub's cache"
        yield ConfigIssue(key, NO_VALUE, "required", hint)
        return
    try:
        config_json = read_json(find_config_json(path))
        if not isinstance(config_json, dict) or not isinstance(config_json.get("_class_name"), str):
            raise FileError(f"{find_config_json(path)}: names no class of diffusers (_class_name)")
    except FileError as error:
        yield ConfigIssue(key, path, str(error))
        return
    node["kind"] = config_json["_class_name"]
    node["config"] = {name: value for name, value in config_json.items() if not name.startswith("_")}


def find_config_json(path: str) -> Path:
    """The config.json of an autoencoder: beside a weight file, in a folder or its vae/, or of the hub's cache.

    Raises FileError if there is none.
    """
    root = cached_repository(path) or Path(path)
    folders = [root / "vae", root] if (root / "model_index.json").is_file() else [root, root / "vae", root.parent]
    for folder in folders if root.is_dir() else folders[-1:]:
        if (folder / "config.json").is_file() and root.exists():
            return folder / "config.json"
    if not root.exists():
        raise FileError(f"no such file or folder{hub_hint(path)}")
    raise FileError("has no config.json of an autoencoder of diffusers")

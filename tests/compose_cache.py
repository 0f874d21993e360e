"""hydra.compose that reads and merges the files of conf/ once per process and choice of files.

That takes 60 to 150 ms, and the tests compose a few thousand times. Hydra applies values (`key=value`) after it has
merged the files, and so they are applied to a copy of the merged files here, by Hydra's own function.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cache

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from vae3d.config.schema import CONF

compose_files = hydra.compose


def compose(config_name: str, overrides: Sequence[str] = (), return_hydra_config: bool = False) -> DictConfig:
    """As hydra.compose."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if return_hydra_config or any(o.is_sweep_override() or o.key_or_group.startswith("hydra") for o in parsed):
        return compose_files(config_name, list(overrides), return_hydra_config)
    search_path = str(GlobalHydra.instance().config_loader().get_search_path())
    choices = tuple(o.input_line for o in parsed if not _is_value(o))
    config = pickle.loads(_merged_files(search_path, config_name, choices))
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if _is_value(o)], config)
    return config


def _is_value(override: Override) -> bool:
    """Whether it changes a value instead of choosing a file."""
    key = override.key_or_group
    return override.package is None and "/" not in key and not (CONF / key).is_dir()


@cache
def _merged_files(search_path: str, config_name: str, choices: tuple[str, ...]) -> bytes:
    return pickle.dumps(compose_files(config_name, list(choices)))

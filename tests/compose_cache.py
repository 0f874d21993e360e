"""hydra.compose that reads each file of conf/ once per process, and merges each choice of files once.

Hydra takes 60 to 150 ms, and the tests compose a few thousand times. Hydra applies values (`key=value`) after it has
merged the files, and so they are applied to a copy of the merged files here, by Hydra's own function. The files of
Hydra's own settings, which hydra.compose merges only to delete the result, are left out.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cache

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from vae3d.config.schema import CONF

compose_files = hydra.compose


def compose(config_name: str, overrides: Sequence[str] = (), return_hydra_config: bool = False) -> DictConfig:
    """As hydra.compose."""
    parsed = [_parsed(override) for override in overrides]
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
def _parsed(override: str) -> Override:
    [parsed] = _parser().parse_overrides([override])
    return parsed


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


@cache
def _merged_files(search_path: str, config_name: str, choices: tuple[str, ...]) -> bytes:
    repository = _Files(search_path)
    parsed = _parser().parse_overrides(list(choices))
    defaults = create_defaults_list(repository, config_name, parsed, prepend_hydra=False, skip_missing=False)
    config = _loader()._compose_config_from_defaults_list(defaults.defaults, repository)
    OmegaConf.set_struct(config, True)
    with open_dict(config):
        config.pop("hydra", None)
    return pickle.dumps(config)


class _Files(CachingConfigRepository):
    """Files as Hydra reads them: once per process instead of once per composition, which changes what it reads."""

    def __init__(self, search_path: str) -> None:
        self.delegate, self.cache, self.search_path = _loader().repository, {}, search_path

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.cache:
            self.cache[config_path] = pickle.loads(_file(self.search_path, config_path))
        return self.cache[config_path]


@cache
def _file(search_path: str, config_path: str) -> bytes:
    return pickle.dumps(_loader().repository.load_config(config_path))


def _loader() -> ConfigLoaderImpl:
    return GlobalHydra.instance().config_loader()

"""Published weights before their conversion: the tensors of one VAE, and the config.json beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from vae3d.arguments import Count, Deviation, Mean, Width, check_fields
from vae3d.io import read_json

State = dict[str, Tensor]
# Key layout to key layout: [old, new] parts of keys, for rename_keys.
RENAMES = json.loads(Path(__file__).with_name("renames.json").read_text())


class ConfigJson(TypedDict, total=False):
    """The keys of a config.json whose values are used; check_config_json compares the others."""

    _class_name: str
    scaling_factor: Deviation | None
    shift_factor: Mean | None
    latents_mean: Sequence[Mean] | None
    latents_std: Sequence[Deviation] | None
    norm_num_groups: Width
    micro_frame_size: Count | None


@dataclass
class PublishedWeights:
    """The tensors of one VAE under the keys of its layout, in fp32.

    config_json: {} if there is none, or if it describes another part of a pipeline. other_keys: the file's other
    tensors. variant: given by the user, for a TAEHV. notes: readers append what they assume; to `assumed`, the settings
    that only the published model's own configuration gives.
    """

    path: Path
    state: State
    config_json: dict[str, Any] = field(default_factory=dict)
    other_keys: Sequence[str] = ()
    variant: str | None = None
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def read_config_json(file: Path) -> dict[str, Any]:
    """{} if the file does not exist. Raises FileError or ArgumentError for one that cannot be used."""
    config_json = read_json(file) if os.path.lexists(file) else {}
    check_fields(config_json, ConfigJson, str(file))
    return config_json


def check_config_json(config_json: Mapping[str, Any], expected: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Compare a config.json with the one that this project would write for the same weights.

    ignored: keys that do not change the network. Raises ValueError naming every key that differs or is not supported.
    """
    errors = []
    for key, value in config_json.items():
        if key.startswith("_") or key in ignored or value is None:
            continue
        if key not in expected:
            errors.append(f"{key}={value} is not supported")
        elif value != expected[key]:
            errors.append(f"{key} is {value}, and must be {expected[key]}")
    if errors:
        raise ValueError(f"config.json does not fit the weights: {'; '.join(errors)}")


def count_layers(state: State, pattern: str) -> int:
    """How many numbers the first group of `pattern` matches in the keys. Raises ValueError unless they are 0, 1, ..."""
    numbers = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"its layers {pattern} are numbered {sorted(numbers)[:6]}")
    return len(numbers)


def rename_keys(state: State, names: Sequence[Sequence[str]], *, inverse: bool = False) -> State:
    """Replace parts of every key, (old, new) one after the other. ^ stands for the start of a key.

    inverse: undo it.
    """
    names = [(new, old) for old, new in reversed(names)] if inverse else names
    renamed = {}
    for key, tensor in state.items():
        name = f"^{key}"
        for old, new in names:
            name = name.replace(old, new)
        renamed[name.removeprefix("^")] = tensor
    return renamed

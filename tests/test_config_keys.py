"""Every setting is read by the code: a published trainer read 45 of the 85 keys of its configuration."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from tests import tiny
from vae3d.config.schema import diffusion, latents, schema

# These declare, check and list settings; reading one here does nothing.
DECLARING = (
    "config.py",
    "limits.py",
    "check.py",
    "model_check.py",
    "summary.py",
    "latent_config.py",
    "diffusion_config.py",
)
READERS = [path for path in (tiny.ROOT / "vae3d").rglob("*.py") if path.name not in DECLARING]
READERS += [tiny.ROOT / "train.py", tiny.ROOT / "infer.py", tiny.ROOT / "conf/hydra/run.yaml"]
CODE = "\n".join(path.read_text() for path in READERS)


def keys(kind: type, prefix: str = "") -> list[str]:
    found = []
    for name, inner in typing.get_type_hints(kind).items():
        found += keys(inner, f"{prefix}{name}.") if dataclasses.is_dataclass(inner) else [prefix + name]
    return found


@pytest.mark.parametrize(
    "key",
    sorted(
        {
            *(*keys(schema.TrainConfig), *keys(schema.InferConfig), *keys(latents.EncodeConfig)),
            *(*keys(diffusion.DiffusionConfig), *keys(diffusion.SampleConfig)),
        }
    ),
)
def test_a_setting_is_read_somewhere(key):
    name = key.rpartition(".")[2]
    # as an attribute, or, where a node is handed over whole, as the parameter of what takes it
    assert re.search(rf"\.{name}\b|[(, \n]{name}: |\"{name}\"", CODE), key

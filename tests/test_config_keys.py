"""Every setting is read by the code, and docs/reference.md has them all."""

from __future__ import annotations

import dataclasses
import re

from docs import make_reference as reference
from tests import tiny
from vae3d.config import diffusion, latents, schema
from vae3d.config.fields import fields_of

# These declare, check and list settings; reading one here does nothing.
DECLARING = [
    tiny.ROOT / "vae3d/config",
    *(tiny.ROOT / f"vae3d/commands/{name}.py" for name in ("check", "meta_check", "summary")),
]
READERS = [
    path for path in (tiny.ROOT / "vae3d").rglob("*.py") if not any(path.is_relative_to(part) for part in DECLARING)
]
READERS += [tiny.ROOT / "train.py", tiny.ROOT / "infer.py", tiny.ROOT / "conf/hydra/run.yaml"]
CODE = "\n".join(path.read_text() for path in READERS)


def keys(kind: type, prefix: str = "") -> list[str]:
    found = []
    for name, field in fields_of(kind).items():
        inner = field.annotation
        found += keys(inner, f"{prefix}{name}.") if dataclasses.is_dataclass(inner) else [prefix + name]
    return found


def test_every_setting_is_read_somewhere():
    """A published trainer read 45 of the 85 keys of its configuration."""
    configs = (schema.TrainConfig, schema.InferConfig, latents.EncodeConfig)
    configs += (diffusion.DiffusionConfig, diffusion.SampleConfig)
    unread = []
    for key in sorted({key for config in configs for key in keys(config)}):
        name = key.rpartition(".")[2]
        # as an attribute, or, where a node is handed over whole, as the parameter of what takes it
        if not re.search(rf"\.{name}\b|[(, \n]{name}: |\"{name}\"", CODE):
            unread.append(key)
    assert unread == []


def test_the_reference_is_up_to_date():
    assert (tiny.ROOT / "docs/reference.md").read_text() == reference.markdown(), (
        "run: python docs/make_reference.py > docs/reference.md"
    )


def test_every_setting_has_a_description():
    def undescribed(kind, prefix=""):
        for name, field in fields_of(kind).items():
            inner = reference.nested_schema(field.annotation)
            if inner:
                yield from undescribed(inner, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    for config in reference.COMMANDS.values():
        assert [*undescribed(config)] == []

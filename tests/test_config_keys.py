"""Every setting is read by the code, and docs/reference.md has them all."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

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
READERS += [tiny.ROOT / "train.py", tiny.ROOT / "infer.py"]
CONFIGS = (
    schema.TrainConfig,
    schema.InferConfig,
    latents.EncodeConfig,
    diffusion.DiffusionConfig,
    diffusion.SampleConfig,
)
# Section -> the files that read its settings as arguments, fields or a protocol of its own.
HANDED_OVER = {
    "data": "vae3d/data/batches/clips.py", "data.depth": "vae3d/data/decoding/depth.py", "optim": "vae3d/schedules.py vae3d/optim.py",
    "trainer.ema": "vae3d/training/ema.py", "trainer.spike": "vae3d/training/failures.py", "run": "conf/hydra/run.yaml",
    "": "vae3d/diffusion/base.py vae3d/latents/clips.py",
}  # fmt: skip


def sections(kind: type, name: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, schema) of a configuration and its sections."""
    yield name, kind
    for inner, field in fields_of(kind).items():
        if dataclasses.is_dataclass(field.annotation):
            yield from sections(field.annotation, f"{name}.{inner}" if name else inner)


def names_of(node: ast.AST) -> list[str]:
    """x of x; b of a.b; those of each entry of a tuple."""
    if isinstance(node, ast.Tuple):
        return [name for item in node.elts for name in names_of(item)]
    return [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []


def attributes_read(code: str, named: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """(b, c) of every a.b.c. b is also what a name stands for: in `b = config.section`, and in `b: Schema`.

    named: schema -> the last names of its sections.
    """
    nodes, stands_for = list(ast.walk(ast.parse(code))), defaultdict(set)
    for node in nodes:
        if isinstance(node, ast.Assign):
            for name in names_of(node.targets[0]):
                stands_for[name].update(names_of(node.value))
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else "".join(names_of(node.target))
            for word in re.findall(r"\w+", ast.unparse(node.annotation)):
                stands_for[name].update(named.get(word, ()))
    return {
        (owner, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute)
        for name in names_of(node.value)
        for owner in (name, *stands_for[name])
    }


def unread(readers: Iterable[Path]) -> list[str]:
    """Settings that no file reads from their section, whose name alone another section may have."""
    found = [item for config in CONFIGS for item in sections(config)]
    named = defaultdict(set)
    for section, kind in found:
        for base in kind.__mro__[:-1]:
            named[base.__name__].add(section.rpartition(".")[2] or "config")
    pairs = set().union(*(attributes_read(path.read_text(), named) for path in readers))
    handed = {
        section: "".join((tiny.ROOT / file).read_text() for file in files.split())
        for section, files in HANDED_OVER.items()
    }
    return sorted(
        {
            f"{section}.{name}".removeprefix(".")
            for section, kind in found
            for name, field in fields_of(kind).items()
            if not dataclasses.is_dataclass(field.annotation)
            and (section.rpartition(".")[2] or "config", name) not in pairs
            and not re.search(rf"\b{name}\b", handed.get(section, ""))
        }
    )


def test_every_setting_is_read_from_its_section():
    """A published trainer read 45 of the 85 keys of its configuration."""
    assert unread(READERS) == []


def test_a_setting_that_is_read_from_another_section_only_is_found(tmp_path):
    """`name` and `every` are in several; a name that only a comment has is not read."""
    code = (
        "def f(config, settings: schema.WandB):\n    ema = config.trainer.ema\n    ema.decay, settings.name  # notes\n"
    )
    (tmp_path / "reader.py").write_text(code)
    missing = unread([tmp_path / "reader.py"])
    assert {"logger.wandb.name", "trainer.ema.decay"}.isdisjoint(missing)
    assert {"logger.mlflow.name", "logger.wandb.notes", "validation.every"} <= {*missing}


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

"""Imports go downwards only; see docs/architecture.md."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

PACKAGE = tiny.ROOT / "vae3d"
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRIES = [tiny.ROOT / "train.py", tiny.ROOT / "infer.py", *sorted((tiny.ROOT / "eval").glob("*.py"))]
SCRIPTS = sorted((tiny.ROOT / "scripts").rglob("*.py"))

# Bottom to top. The first line stands for all modules directly in vae3d/ but loading.py, hub.py and api.py: they
# import only each other. "data" stands for the modules directly in vae3d/data that have no line.
LAYERS = [
    "leaves",
    "pretrained",
    "models",
    "pruning",
    "losses",
    "metrics",
    "adversarial",
    "data",
    "data.storage",
    "data.decoding",
    "data.table",
    "data.tars",
    "data.sources",
    "data.batches",
    "data.prepared",
    "data.read_speed",
    "data.loader",
    "checkpoints",
    "config",
    "report",
    "evaluation",
    "inference",
    "latents",
    "diffusion",
    "loading",
    "hub",
    "api",
    "training",
    "commands",
    "app",
]

HYDRA = {"config", "loading", "commands"}
ACCELERATE = {"training", "commands", "distributed"}
BROAD_EXCEPT = {
    "vae3d.data.storage.stores",  # backends of fsspec raise errors of their classes; what is no error of a store is raised again
    "vae3d.training.loggers",  # trackers raise errors of their private classes, and must not stop a training
    "scripts.benchmarks.gpu",  # a case that fails is written down, and must not lose the others
    "scripts.benchmarks.bench_networks",  # likewise a line
}


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions and under `if TYPE_CHECKING`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def layer(module: str) -> str:
    """The layer of a dotted name in vae3d."""
    parts = module.split(".")
    if parts[1] == "__main__":
        return "commands"
    return next((part for part in (".".join(parts[1:3]), parts[1]) if part in LAYERS), "leaves")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(tiny.ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in FILES}


def module_of(name: str) -> str:
    """The module that a dotted name is of: itself, or what it is defined in."""
    return name if name in modules() else name.rpartition(".")[0]


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of vae3d that it imports. The package itself, which imports on demand, is left out."""
    found = {}
    for name, path in modules().items():
        if name != "vae3d":
            own = {module_of(item) for item in imports(path) if item.startswith("vae3d.")}
            found[name] = own - {"vae3d", name}
    return found


# One test for all files: each test more costs the suite 10 ms.
@pytest.mark.smoke
def test_imports_go_downwards():
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if LAYERS.index(layer(other)) > LAYERS.index(layer(name))
    ]
    assert wrong == []


@pytest.mark.smoke
def test_no_circle_of_imports():
    remaining = {name: set(others) for name, others in graph().items()}
    while free := [name for name, others in remaining.items() if not others & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert sorted(remaining) == []


def test_hydra_and_accelerate_stay_at_the_edge():
    for path in FILES:
        roots = {name.split(".")[0] for name in imports(path)}
        here = name_of(path).split(".")[1] if path.parent != PACKAGE or path.stem != "__init__" else ""
        assert not roots & {"hydra", "omegaconf"} or here in HYDRA, path
        assert "accelerate" not in roots or here in ACCELERATE, path


def test_one_function_instantiates():
    callers = [name_of(path) for path in FILES if "hydra.utils.instantiate(" in path.read_text()]
    assert callers == ["vae3d.loading"]


def found(kind: type[ast.AST], text: str) -> list[tuple[Path, Any]]:
    """Nodes of a kind in the package and the scripts, in files with a text."""
    nodes = []
    for path in [*FILES, *ENTRIES, *SCRIPTS]:
        if text in (code := path.read_text()):
            nodes += [(path, node) for node in ast.walk(ast.parse(code)) if isinstance(node, kind)]
    assert nodes
    return nodes


def test_no_broad_except():
    for path, node in found(ast.ExceptHandler, "except"):
        assert node.type is not None, (path, node.lineno)
        kind = ast.unparse(node.type)
        assert kind != "BaseException", (path, node.lineno)
        assert kind != "Exception" or name_of(path) in BROAD_EXCEPT, (path, node.lineno)


def test_no_unsafe_load():
    for path, node in found(ast.Call, "torch.load("):
        if ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, (path, node.lineno)


def test_images_are_opened_with_a_list_of_formats():
    """Without one Pillow hands a PostScript file to Ghostscript, whatever the file is called."""
    for path, node in found(ast.Call, "Image.open("):
        if ast.unparse(node.func) == "Image.open":
            assert "formats" in [keyword.arg for keyword in node.keywords], (path, node.lineno)

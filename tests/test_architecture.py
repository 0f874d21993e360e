"""Imports run one way; see README "Architecture"."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import tiny

PACKAGE = tiny.ROOT / "vae3d"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
ENTRIES = [tiny.ROOT / "train.py", tiny.ROOT / "infer.py", *sorted((tiny.ROOT / "eval").glob("*.py"))]

BASE = {
    "argparse_types",
    "arguments",
    "errors",
    "io",
    "panorama",
    "pixels",
    "precision",
    "ranks",
    "restore",
    "schedules",
    "seeding",
    "types",
    "weights",
    "weight_files",
    "features",
}
PARTS = {"models", "losses", "adversarial", "data", "metrics"}
PROCESSES = {"checkpoints", "diffusion", "inference", "evaluation", "engine", "latents"}
WIRING = {"config", "check", "model_check", "factory", "launch", "limits", "summary", "latent_config", "latent_factory"}
WIRING |= {"interrupts", "diffusion_config", "diffusion_factory", "sampling_factory"}

HYDRA = {"config", "check", "model_check", "factory", "launch", "latent_config", "diffusion_config"}
ACCELERATE = {"engine", "factory", "launch"}


def imports(path: Path, type_checking: bool = False) -> set[str]:
    """Dotted names of everything a file imports, also inside functions; not under `if TYPE_CHECKING`."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not type_checking:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("vae3d.")} - {"__version__"}


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} - {"__init__"} == BASE | PARTS | PROCESSES | WIRING


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = part(path)
    allowed = {"__init__": {"factory"}}.get(here)
    if allowed is None:
        allowed = set(BASE)
        allowed |= {here} if here in PARTS else set()
        allowed |= PARTS | PROCESSES if here in PROCESSES else set()
        allowed |= BASE | PARTS | PROCESSES | WIRING if here in WIRING else set()
    assert own_imports(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_and_accelerate_stay_at_the_edge(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert "hydra" not in roots or part(path) in HYDRA
    assert "omegaconf" not in roots or part(path) in HYDRA
    assert "accelerate" not in roots or part(path) in ACCELERATE


def test_one_function_instantiates():
    callers = [path for path in FILES if "hydra.utils.instantiate" in path.read_text() and part(path) != "factory"]
    assert not callers
    assert (PACKAGE / "factory.py").read_text().count("hydra.utils.instantiate(") == 1


@pytest.mark.parametrize(
    "path", [*FILES, *ENTRIES, *sorted((tiny.ROOT / "scripts").glob("*.py"))], ids=lambda path: path.name
)
def test_no_broad_except_and_no_unsafe_load(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert ast.unparse(node.type) not in ("Exception", "BaseException")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize(
    "path", [*FILES, *ENTRIES, *sorted((tiny.ROOT / "scripts").glob("*.py"))], ids=lambda path: path.name
)
def test_images_are_opened_with_a_list_of_formats(path):
    """Without one Pillow hands a PostScript file to Ghostscript, whatever the file is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
            assert "formats" in [keyword.arg for keyword in node.keywords]

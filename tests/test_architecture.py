"""The house has floors: a file imports only from floors below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "diffusion_tokred"
FLOORS = {
    "errors": 0, "version": 0, "extras": 0, "home": 0,
    "tokens": 1, "schedule": 1, "zoo": 1,
    "runtime": 2,
    "methods": 3, "backbones": 3, "measure": 3.5,  # measure counts what backbones describe
    # one floor, in the order they call each other
    "driver": 4, "defaults": 4, "auto": 4.05, "ruling": 4.1, "patching": 4.2,
    "drawing": 4.3, "explanation": 4.35, "explaining": 4.4, "coverage": 4.4,
    "processors": 4.6, "stepping": 4.7,
    "evaluation": 5, "testing": 5, "tuning": 5.5,  # it measures with the evaluation's means
    "cli": 6,
}  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports, also inside functions."""
    package = ("diffusion_tokred", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [(*base, *(node.module or "").split("."))]
            if not node.module:
                names = [(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "diffusion_tokred" and len(name) > 1 and name[1]}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = part(path)
    assert mine in FLOORS, f"on which floor does {mine} live?"
    for other in imported(path) - {mine}:
        if mine == "cli" and other not in FLOORS:
            continue  # the command line uses the public names
        assert FLOORS[other] < FLOORS[mine], f"{path.relative_to(ROOT)} imports {other}, which is not below it"


def test_methods_know_no_model_and_backbones_no_method() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        assert "diffusers" not in path.read_text().replace("no diffusers class", "").replace("No diffusers class", "")
        assert "backbones" not in imported(path)
    for path in (ROOT / "backbones").glob("*.py"):
        assert "methods" not in imported(path)


def test_the_import_is_light() -> None:
    code = (
        "import sys, diffusion_tokred; "
        "print([m for m in ('gradio', 'torchmetrics', 'xformers', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"


def test_every_package_is_in_the_wheel() -> None:
    listed = (ROOT.parent / "pyproject.toml").read_text()
    for folder in {path.parent for path in ROOT.rglob("*.py")} - {ROOT}:
        name = ".".join(("diffusion_tokred", *folder.relative_to(ROOT).parts))
        assert f'"{name}"' in listed, f"{name} is not listed under [tool.setuptools] packages"


def test_the_zoo_is_at_hand() -> None:
    code = "import diffusion_tokred as tokred; print(tokred.zoo.path('toy-sd').name, callable(tokred.methods))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.split() == ["toy-sd", "True"]


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest takes two files of one name, in folders that are no packages, for the same module, and stops."""
    names = [
        path.stem for path in Path(__file__).parent.rglob("test_*.py") if not (path.parent / "__init__.py").exists()
    ]
    assert sorted(names) == sorted(set(names))

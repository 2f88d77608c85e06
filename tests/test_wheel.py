"""The wheel is complete: built, installed elsewhere, it compares in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy: what an earlier build left in the checkout must not come in
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("diffusion_tokred", "app"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "diffusion_tokred").rglob("*.py")}
    assert sources <= names
    assert {"diffusion_tokred/py.typed", "diffusion_tokred/app/__init__.py", "diffusion_tokred/app/page.py"} <= names
    for model in ("toy-sd", "toy-dit"):
        assert f"diffusion_tokred/zoo/{model}/model_index.json" in names
    assert {"diffusion_tokred/zoo/toy-clip/model.safetensors", "diffusion_tokred/defaults.json"} <= names
    assert not any(name.startswith(("tests/", "scripts/", "app/")) for name in names)
    assert wheel.stat().st_size < 45e6


def test_it_compares_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import diffusion_tokred.app, diffusion_tokred; print(diffusion_tokred.__file__)"]
    if subprocess.run([sys.executable, "-c", "import gradio"], capture_output=True).returncode:
        where[2] = "import diffusion_tokred; print(diffusion_tokred.__file__)"
    found = subprocess.run(where, capture_output=True, text=True, env=env, cwd=empty, check=True).stdout.strip()
    assert Path(found).is_relative_to(site)  # the wheel's code, not the checkout's

    options = ["--steps", "2", "--size", "64", "--repeat", "1", "--json", "result.json"]
    command = [sys.executable, "-m", "diffusion_tokred.cli", "compare", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=empty)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((empty / "result.json").read_text())["schema"] == "tokred.result/1"
    assert list(empty.rglob("*.png"))

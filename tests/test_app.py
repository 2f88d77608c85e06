"""The A/B page: what its one endpoint returns, and what a person gets who asks for too much."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

gradio = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def run() -> Any:
    """The function behind the button, on toy-sd."""
    try:
        from diffusion_tokred import app
    except ImportError:  # a checkout that is not installed: the wheel carries app/ as diffusion_tokred.app
        folder = Path(__file__).parent.parent / "app"
        spec = importlib.util.spec_from_file_location(
            "diffusion_tokred.app", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        app = sys.modules["diffusion_tokred.app"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
    page = app.build("toy-sd")
    return next(fn.fn for fn in page.fns.values() if fn.api_name == "compare")


def test_both_sides(run: Any) -> None:
    (before, after), heat, tokens, rows = run("a red star on a plain gray background", "tome", 0.5, 2, 0, 2, 64, 1)
    assert before.size == after.size == (64, 64)
    assert before.tobytes() != after.tobytes()
    assert heat is not None and tokens is not None
    assert any("speed-up" in row[0] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", "tome", 0.5, 2, 0, 2, 64, 1), "empty prompt"),
        (("a star", "tome", 0.9, 2, 0, 2, 64, 1), "0.75"),
        (("a star", "tome", 0.5, 2, 0, 2, 100000, 1), "1024"),
        (("a star", "tome", 0.5, 2, 0, -3, 64, 1), "steps"),
        (("a star", "todo", 0.5, 99, 0, 2, 64, 1), "factor"),
    ],
)
def test_bad_input_is_a_message(run: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(gradio.Error, match=message):
        run(*arguments)

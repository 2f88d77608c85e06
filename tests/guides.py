"""Pages of `docs` whose Python is a file of the package and examples: what they show, and running it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Guide:
    """A page. Each of its ```python blocks is marked `<!-- file -->` or `<!-- run -->`.

    Args:
        page: its name in `docs`.
        file: the file of the package that its file blocks are, one after the other.
    """

    def __init__(self, page: str, file: str) -> None:
        self.text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        self.path = ROOT / "diffusion_tokred" / file
        self.blocks = re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", self.text, re.S)

    def assert_is_the_file(self, most: int) -> None:
        """The file, line by line but for blank ones, has at most `most` lines; no block is neither shown nor run."""
        file = self.path.read_text(encoding="utf-8")
        assert _lines(self.file) == _lines(file) and len(file.splitlines()) <= most
        assert self.text.count("```python") == len(self.blocks), "every block is part of the file or run"

    @property
    def file(self) -> str:
        return "\n".join(block for kind, block in self.blocks if kind == "file")

    def follow(self, monkeypatch: Any, rename: tuple[str, str] = ("", ""), **given: Any) -> dict[str, Any]:
        """Do what a reader does: the file as one of his own, outside of the package, then the examples.

        Args:
            monkeypatch: pytest's.
            rename: a name on the page, and the one to use instead.
            given: variables that the page takes as given.

        Returns:
            All variables.
        """
        package = self.path.parent.name
        mine = re.sub(r"from \.(\w)", rf"from ..{package}.\1", self.file)
        mine = re.sub(r"from \.\.(\w+)", r"from diffusion_tokred.\1", mine)
        space = {"__name__": "mine"} | given
        monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
        for name, code in [("mine.py", mine), *(("guide.py", block) for kind, block in self.blocks if kind == "run")]:
            exec(compile(code.replace(*rename) if rename[0] else code, name, "exec"), space)
        return space


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]

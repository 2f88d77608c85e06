import json
import os
from pathlib import Path

import pytest

from diffusion_tokred.evaluation.results import environment, plain, to_json, write_text


def test_numbers_that_json_has_not_become_null_with_a_reason() -> None:
    data = plain({"a": float("inf"), "b": [float("nan"), 1.0], "c": {"d": float("nan")}, "why_null": {"a": "equal"}})
    assert data["a"] is None and data["b"] == [None, 1.0] and data["why_null"] == {"a": "equal"}
    assert data["c"]["d"] is None and "nan" in data["c"]["why_null"]["d"]
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": float("nan")})


def test_files_are_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "result.json"
    write_text(path, "old")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_environment_is_json() -> None:
    assert json.loads(to_json(environment()))["device"].startswith("cpu: ")

"""Policies from files on the command line, and the plot of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusion_tokred import ConfigError, Policy, ToMeConfig
from diffusion_tokred.cli import app
from diffusion_tokred.evaluation.compare import compare
from diffusion_tokred.evaluation.variants import parse_variant
from diffusion_tokred.testing import tiny


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def explain(folder: Path, *words: Any, code: int = 0) -> Any:
    base = ("explain", "--model", folder, "--device", "cpu", "--size", "32")
    result = CliRunner().invoke(app, [str(word) for word in (*base, *words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_a_file_brings_its_method(folder: Path) -> None:
    config = ToMeConfig(levels=(0, 1), merge_ff=True)
    Policy(points=[(0.8, 0.25)], method=config.to_dict()).save("policy.json")
    base = ("--policy", "policy.json", "--steps", 4, "--json", "-")
    found = json.loads(explain(folder, *base).stdout)
    assert found["config"] == config.to_dict() and {step["ratio"] for step in found["steps"]} == {0, 0.25}
    assert json.loads(explain(folder, *base, "--levels", "0").stdout)["config"]["levels"] == [0]
    assert found["asked"] == [[[1.0, 0.0, "full"], [0.8, 0.25, "reduce"]]]
    line = explain(folder, *base, "--method", "random-keep", code=2).stderr
    assert line.count("\n") == 1 and "the policy was made for tome, and this is random-keep" in line
    assert parse_variant("tome:merge_ff=false,policy=policy.json").config == ToMeConfig(levels=(0, 1))


def test_files_that_are_refused(folder: Path) -> None:
    Policy(points=[(0.8, 0.25)]).for_pipe(tiny.sd3()).save("other.json")
    Path("broken.json").write_text("{")
    for file, says in [
        ("other.json", "made for SD3Transformer2DModel"),
        ("broken.json", "broken.json is not JSON"),
        ("missing.json", "cannot read the policy missing.json"),
    ]:
        line = explain(folder, "--policy", file, code=2).stderr
        assert line.count("\n") == 1 and says in line


def test_compare_takes_the_policys_method() -> None:
    pipe = tiny.sd()
    with pytest.raises(ConfigError, match=r"todo: ratio 0\.3"):
        compare(pipe, policy=Policy.constant(0.3), method="todo")
    with pytest.raises(ConfigError, match="made for tome, and this is todo"):
        compare(pipe, policy=Policy(points=[(1.0, 0.75)], method="tome"), method="todo")


def test_plot(folder: Path, tmp_path: Path) -> None:
    explain(folder, "--steps", 4, "--plot", "plan.png")
    with Image.open("plan.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
    for words, says in [
        (("--plot", "plan.png"), "give --steps too"),
        (("--plot", "plan.txt", "--steps", 4), "ends in .png, .svg or .pdf, found 'plan.txt'"),
        (("--plot", "no/plan.png", "--steps", 4), "name a file in a folder that is there"),
    ]:
        line = explain(folder, *words, code=2).stderr
        assert line.count("\n") == 1 and says in line

"""Defaults chosen by measuring: each is what a result file in `benchmarks` says, and holds where it should."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import diffusion_tokred as tokred
from diffusion_tokred.backbones import BACKBONES
from diffusion_tokred.defaults import measured_default, measured_families
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.testing import tiny

ROOT = Path(__file__).parent.parent
SHIPPED = [(info.name, family) for info in tokred.methods() for family in info.measured]


def test_which_there_are() -> None:
    assert SHIPPED and {family for _, family in SHIPPED} <= set(BACKBONES)
    stored = json.loads((ROOT / "diffusion_tokred" / "defaults.json").read_text())
    assert sorted(SHIPPED) == sorted((method, family) for family, methods in stored.items() for method in methods)
    assert measured_default("tome", "pixart") is None and measured_families("deepcache") == ("unet",)


@pytest.mark.parametrize("method, family", SHIPPED)
def test_each_names_its_measurement(method: str, family: str) -> None:
    """The setting, the speed and the distance are those of a finished evaluation of a model of that family."""
    policy = measured_default(method, family)
    assert policy is not None
    said = policy.measured
    result = json.loads((ROOT / said["report"] / "result.json").read_text())
    (variant,) = [v for v in result["variants"] if v["name"] == said["variant"]]
    assert result["status"] == "complete" and said["why"]
    assert policy.method == variant["reduction"]["config"] and variant["reduction"]["policy"] is None
    assert type(tokred.MethodConfig.from_dict(policy.method)).name == method
    assert result["pipeline"]["denoiser"] in BACKBONES[family].models
    assert (said["model"], said["steps"], said["prompts"]) == (
        result["pipeline"]["model"], variant["steps"], result["prompts"]["n"],
    )  # fmt: skip
    for name, found, middle in (
        ("speedup", variant["cost"]["speedup"], "median"),
        ("psnr", variant["paired"]["psnr"], "mean"),
    ):
        assert said[name] == pytest.approx([found[middle], found["low"], found["high"]], rel=1e-3)


@pytest.mark.parametrize("method, family", SHIPPED)
def test_the_points_are_the_configs_own(method: str, family: str) -> None:
    policy = measured_default(method, family)
    assert policy is not None
    config = tokred.MethodConfig.from_dict(policy.method)
    assert policy.points == tokred.Policy.constant(config.share, config.asks).points


def test_where_it_holds() -> None:
    """A method named alone; an option, a policy or a config, and it is what was said."""
    pipe = tiny.sd3()
    chosen = measured_default("taylorseer", "sd3")
    assert chosen is not None
    config = tokred.MethodConfig.from_dict(chosen.method)  # which may have got options since it was measured
    assert config != tokred.TaylorSeerConfig()
    found = tokred.explain(pipe, method="taylorseer", num_inference_steps=12)
    assert found.config == config.to_dict() and [s.mode for s in found.steps] == 6 * ["full", "forecast"]
    assert "benchmarks/caching-toy-dit-2x, taylorseer-interval-2-warmup-1" in found.table()
    with tokred.patched(pipe, method="taylorseer"):
        tiny.run(pipe, steps=12)
    assert [s.mode for s in tokred.report(pipe).steps] == [s.mode for s in found.steps]
    for said in (dict(method="taylorseer", order=1), dict(config=tokred.TaylorSeerConfig())):
        other = tokred.explain(pipe, **said)
        assert other.config == tokred.TaylorSeerConfig().to_dict() and "Settings:" not in other.table()
    elsewhere = tokred.explain(tiny.pixart(), method="taylorseer")
    assert elsewhere.config == tokred.TaylorSeerConfig().to_dict()
    assert "Settings: no measured default for taylorseer on pixart: the method's own" in elsewhere.table()


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("choose_default", ROOT / "scripts" / "choose_default.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method, family", SHIPPED)
def test_the_script_that_chooses_makes_the_entry(method: str, family: str, script: Any) -> None:
    stored = json.loads((ROOT / "diffusion_tokred" / "defaults.json").read_text())[family][method]
    said = stored["measured"]
    assert script.entry(ROOT / said["report"], said["variant"], said["why"]) == (family, method, stored)


def test_what_cannot_be_chosen(script: Any, tmp_path: Path) -> None:
    report = ROOT / "benchmarks" / "caching-toy-sd-2x"
    for folder, name, words in (
        (tmp_path, "deepcache", "is not in the repository"),
        (ROOT / "docs", "deepcache", "cannot read .*result.json: No such file"),
        (report, "deepcash", "has unpatched, .*found no 'deepcash'"),
        (report, "steps-10", "'steps-10' of .* is no timed setting of a method"),
        (report, "peer-deepcache", "unknown method .peer-deepcache."),
    ):
        with pytest.raises(ConfigError, match=words):
            script.entry(folder, name, "why")

"""A whole evaluation: once and again, claims before and after, and what is written."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import diffusion_tokred as tokred
from diffusion_tokred.evaluation import cost
from diffusion_tokred.evaluation import evaluate as evaluate_module
from diffusion_tokred.evaluation.evaluate import evaluate, made_before
from diffusion_tokred.evaluation.generation import generate
from diffusion_tokred.evaluation.judges import Judges
from diffusion_tokred.evaluation.measuring import Claim
from diffusion_tokred.evaluation.prompts import PromptSet
from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.methods import make_config

PROMPTS = PromptSet("two", ("a red star", "a blue ring"))
VARIANTS = (Variant("unpatched"), Variant("tome", make_config("tome", ratio=0.5)))


def no_calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a call of the pipeline is a failure."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        pytest.fail("the pipeline was called")

    fail.__signature__ = inspect.signature(type(pipe).__call__)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", fail)


def go(pipe: Any, out: Path, variants: Any = VARIANTS, **options: Any) -> dict[str, Any]:
    return evaluate(pipe, PROMPTS, variants, out, steps=3, rounds=1, judges=Judges(), **options)


def test_everything_is_there_and_nothing_is_done_twice(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = {"rows": [{"name": n, "speedup": {"median": s}, "seconds_raw": []} for n, s in (("tome", 1.5),)]}
    real, timed = cost.measure_cost, []

    def spy(pipe: Any, variants: Any, *args: Any, rounds: int, **options: Any) -> Any:
        timed.append(([v.name for v in variants], rounds))
        return real(pipe, variants, *args, rounds=rounds, **options)

    monkeypatch.setattr(cost, "measure_cost", spy)
    monkeypatch.setattr(cost, "same_time", lambda timing, variants, steps, f=cost.same_time: f(faster, variants, steps))
    told: list[str] = []
    data = go(pipe, tmp_path / "run", progress=lambda what, share, words: told.append(what))
    assert timed == [(["unpatched", "tome"], 3), (["unpatched", "tome", "steps-2"], 1)]
    assert [v["name"] for v in data["variants"]] == ["unpatched", "tome", "steps-2"]
    assert all(v["cost"]["seconds"]["n"] == 1 for v in data["variants"])
    names = ("result.json", "items.jsonl", "timing.json", "report.md", "report.html", "plot.png", "run.json")
    for name in names:
        assert (tmp_path / "run" / name).stat().st_size > 100, name
    assert "tome" in (tmp_path / "run" / "report.md").read_text()
    order = ["pilot", "timing", "drawing tome", "judging tome", "report"]
    assert [what for what in dict.fromkeys(told) if what in order] == order

    no_calls(pipe, monkeypatch)
    again = go(pipe, tmp_path / "run")
    assert timed[2:] == []
    assert again | {"created": data["created"]} == data


def test_a_variant_can_be_added(pipe: Any, tmp_path: Path) -> None:
    go(pipe, tmp_path / "run", match_time=False)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "images").rglob("*.png")}
    more = (*VARIANTS, Variant("todo", make_config("todo")))
    data = go(pipe, tmp_path / "run", more, match_time=False)
    assert [v["name"] for v in data["variants"]] == ["unpatched", "tome", "todo"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_variants_that_are_there_stay_with_what_is_asked_for(pipe: Any, tmp_path: Path) -> None:
    """Costs and figures are measured together, so a second call with another variant takes the first ones along."""
    assert evaluate_module._with_those_there(tmp_path / "run", VARIANTS) == list(VARIANTS)
    fewer = Variant("steps-2", call={"num_inference_steps": 2}, anchor="steps")
    generate(pipe, PROMPTS, (*VARIANTS, fewer), tmp_path / "run", call={"num_inference_steps": 3})
    todo = Variant("todo", make_config("todo"))
    found = evaluate_module._with_those_there(tmp_path / "run", (VARIANTS[0], todo, VARIANTS[1]))
    assert found == [*VARIANTS, fewer, todo]


def test_judges_run_where_the_pipeline_does_and_are_told_of_the_protocol(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = evaluate_module.measure, {}
    monkeypatch.setattr(evaluate_module, "measure", lambda out, **options: told.update(options) or real(out, **options))
    said = ("limit 2 instead of 64",)
    data = go(pipe, tmp_path / "run", match_time=False, protocol="scenes", departures=said, judge_batch=1)
    assert told["device"] == pipe._execution_device and told["batch"] == 1
    assert data["departures"] == list(said) and "Not as in scenes: limit 2 instead of 64" in data["notes"]
    assert any(note.startswith("Timed on cpu") for note in data["notes"])
    assert made_before(tmp_path / "run")[2] == {"protocol": "scenes", "departures": list(said)}


def test_a_claim_is_early_or_late(pipe: Any, tmp_path: Path) -> None:
    variants = (*VARIANTS, Variant("steps-2", call={"num_inference_steps": 2}, anchor="steps"))
    claim = Claim("steps-2", {"psnr": 0.0})
    data = go(pipe, tmp_path / "early", variants, claim=claim)
    assert data["claim"]["stated"] == "before the pictures were drawn"
    assert json.loads((tmp_path / "early" / "result.json").read_text()) == data
    assert go(pipe, tmp_path / "early", variants, claim=claim)["claim"]["stated"] == data["claim"]["stated"]
    other = go(pipe, tmp_path / "early", variants, claim=Claim("steps-2", {"psnr": 9.0}))
    assert other["claim"]["stated"] == "after pictures were drawn"


def test_without_times(pipe: Any, tmp_path: Path) -> None:
    data = evaluate(pipe, PROMPTS, VARIANTS, tmp_path / "run", steps=2, rounds=0, judges=Judges())
    assert all(v["cost"] is None for v in data["variants"]) and not (tmp_path / "run" / "timing.json").exists()


def test_nothing_is_spent_on_what_cannot_end(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_calls(pipe, monkeypatch)
    with pytest.raises(tokred.ConfigError, match="there is no"):
        go(pipe, tmp_path / "run", reference=tmp_path / "nothing.npz")
    with pytest.raises(tokred.ConfigError, match="first variant"):
        go(pipe, tmp_path / "run", VARIANTS[1:])
    with pytest.raises(tokred.ConfigError, match="held against 'steps-9', the run has unpatched, tome"):
        go(pipe, tmp_path / "run", claim=Claim("steps-9"))
    more = Variant("steps-3", call={"num_inference_steps": 3}, anchor="steps")
    with pytest.raises(tokred.ConfigError, match="steps-3: 3 steps are not fewer than the run's 3"):
        go(pipe, tmp_path / "run", (*VARIANTS, more))
    cut = tmp_path / "pt_inception.pth"
    cut.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(tokred.ConfigError, match="pt_inception"):
        evaluate(pipe, PROMPTS, VARIANTS, tmp_path / "run", steps=3, judges=Judges.find({"inception": cut}))
    assert not (tmp_path / "run" / "images").exists()

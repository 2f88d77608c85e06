"""The caching comparison: settings of equal speed, and the table made of them. No real time is looked at."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diffusion_tokred import patched, report
from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.evaluation import caching_comparison as comparison
from diffusion_tokred.evaluation.caching_comparison import compare_caching, contenders
from diffusion_tokred.evaluation.equal_speed import Contender, Notebook, Stopwatch, search
from diffusion_tokred.evaluation.judges import Judges
from diffusion_tokred.evaluation.launch import Processes
from diffusion_tokred.evaluation.prompts import PromptSet
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant, parse_variant
from diffusion_tokred.measure.timing import Interval, Timing
from diffusion_tokred.testing import tiny
from tests.evaluation import runs

PROMPTS = PromptSet("three", ("a red star", "a blue ring", "a red ring"))
CALL = {"height": 32, "width": 32, "guidance_scale": 3.0}


class Speeds:
    """Known speeds instead of measured ones, and what was asked for."""

    def __init__(self, known: dict[str, float]) -> None:
        self.known, self.asked = known, list[tuple[str, int]]()

    def __call__(self, text: str, rounds: int) -> Interval:
        self.asked.append((text, rounds))
        if text not in self.known:
            raise UnsupportedError(f"{text} does not run: no")
        return Interval(self.known[text], self.known[text], self.known[text], rounds)


def row(name: str, speeds: Sequence[float]) -> dict[str, float]:
    return {f"{name}{place}": speed for place, speed in enumerate(speeds)}


def test_a_setting_is_bisected() -> None:
    known = row("a", [1 + i / 50 for i in range(100)])
    speed = Speeds(known)
    found = search(Contender("a", (tuple(known),)), speed, 2.0, (3, 10))
    assert found.state == "equal" and found.speed is not None and abs(found.speed.median - 2) <= 0.08
    assert found.text is not None and speed.asked[-1] == (found.text, 10)  # made sure of
    assert len(speed.asked) < 12


def test_a_speed_that_is_jumped_over_or_not_reached() -> None:
    jumps, slow = row("j", [1.2, 1.8, 2.3, 3.0]), row("s", [1.1, 1.2, 1.5])
    near = search(Contender("j", (tuple(jumps),)), Speeds(jumps), 2.0, (3, 10))
    assert (near.state, near.text) == ("near", "j1") and near.usable
    never = search(Contender("s", (tuple(slow),)), Speeds(slow), 2.0, (3, 10))
    assert (never.state, never.why) == ("unreachable", "at most 1.50x, with s2") and not never.usable
    both = search(Contender("b", (tuple(slow), tuple(jumps))), Speeds(slow | jumps), 2.0, (3, 10))
    assert both.text == "j1"
    other = row("o", [1.0, 1.99])
    rows = (("x0", "x1"), tuple(slow), tuple(jumps), tuple(other))
    assert search(Contender("c", rows), Speeds(slow | jumps | other), 2.0, (3, 10)).text == "o1"
    gone = search(Contender("x", (("x0", "x1"), ("y0",))), Speeds({}), 2.0, (3, 10))
    assert (gone.state, gone.text, gone.why) == ("does not run", None, "x1 does not run: no")


def test_a_noisy_measurement_is_made_sure_of() -> None:
    """Three rounds say 2.0 of a setting that is at 2.2."""

    class Noisy(Speeds):
        def __call__(self, text: str, rounds: int) -> Interval:
            found = super().__call__(text, rounds)
            return Interval(2.0, 2.0, 2.0, rounds) if (text, rounds) == ("a4", 3) else found

    known = row("a", [1.2, 1.5, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2])
    found = search(Contender("a", (tuple(known),)), Noisy(known), 2.0, (3, 10))
    assert (found.state, found.text) == ("equal", "a3")


def test_another_one_is_nearer_after_all() -> None:
    """Three rounds say 2.09 of a setting that is at 2.13; the one before it is at 1.89."""

    class Noisy(Speeds):
        def __call__(self, text: str, rounds: int) -> Interval:
            found = super().__call__(text, rounds)
            return Interval(2.09, 2.09, 2.09, rounds) if (text, rounds) == ("a2", 3) else found

    known = row("a", [1.5, 1.89, 2.13, 2.6, 3.0])
    found = search(Contender("a", (tuple(known),)), Noisy(known), 2.0, (3, 10))
    assert (found.state, found.text) == ("near", "a1")


@pytest.mark.parametrize("steps", [20, 28])
def test_all_settings_can_be_typed(steps: int) -> None:
    known = contenders(steps)
    texts = [text for contender in known.values() for row in contender.rows for text in row]
    assert len(texts) == len(set(texts))
    for text in texts:
        parse_variant(text, steps)
    assert {name for one in known.values() for name in one.like} <= {one.name for one in known.values() if one.peer}
    for name, full in (("fora", comparison.full_steps), ("diffusers-taylorseer", comparison.full_steps_of_diffusers)):
        variants = [parse_variant(text) for text in known[name].rows[0]]
        configs: list[Any] = [variant.config or variant.peer for variant in variants]
        counts = [full(steps, config.interval, config.warmup) for config in configs]
        assert counts == sorted(set(counts), reverse=True)
        assert set(range(4, 16)) <= set(counts)


@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (3, 2), (4, 5)])
def test_full_steps_are_those_of_the_methods(interval: int, warmup: int) -> None:
    pipe = tiny.sd3()
    with patched(pipe, method="fora", interval=interval, warmup=warmup):
        tiny.run(pipe, steps=12)
        found = report(pipe)
    assert found is not None
    assert sum(step.mode == "full" for step in found.steps) == comparison.full_steps(12, interval, warmup)
    calls: list[int] = []
    text = f"diffusers-taylorseer:interval={interval},warmup={warmup}"
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    with parse_variant(text).applied(pipe):
        tiny.run(pipe, steps=12)
    assert len(calls) == comparison.full_steps_of_diffusers(12, interval, warmup)


def test_each_round_has_its_prompt(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    def spy(self: Any, **call: Any) -> None:
        seen.append((call["prompt"], call["generator"].initial_seed(), call["num_inference_steps"]))

    monkeypatch.setattr(type(pipe), "__call__", spy)
    variants = (Variant(UNPATCHED), parse_variant("steps:1"))
    timing = Stopwatch(pipe, ("x", "y"), {"num_inference_steps": 3})(variants, 3)
    assert seen[:2] == [("x", 0, 3), ("x", 0, 1)]  # to warm up
    assert seen[2:5] == [("x", 0, 3), ("x", 0, 1), ("x", 0, 3)]
    assert seen[5:8] == [("y", 1, 3), ("y", 1, 1), ("y", 1, 3)]
    assert [prompt for prompt, _, _ in seen[8:]] == ["x"] * 3
    assert list(timing.seconds) == ["unpatched", "steps-1"] and len(timing.again) == 3


class Clock:
    """A timer that tells known speeds, and finds out what does not run."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.calls = pipe, list[list[str]]()

    def __call__(self, variants: Sequence[Variant], rounds: int) -> Timing:
        self.calls.append([variant.name for variant in variants])
        seconds = {}
        for variant in variants:
            with variant.applied(self.pipe):
                seconds[variant.name] = (12 / self.speed(variant),) * rounds
        return Timing(seconds, (12.0,) * rounds)

    def speed(self, variant: Variant) -> float:
        if variant.anchor == "steps":
            return 3 / variant.call["num_inference_steps"]
        options: Any = variant.config or variant.peer
        if options is None or options.name == "todo":
            return 1.0 if options is None else 1.3
        return 1 + options.ratio * (1.5 if variant.peer else 1.0)


def few() -> list[Contender]:
    ratios = [f"{i / 20:g}" for i in range(1, 15)]
    return [
        Contender("tome", (tuple(f"tome:ratio={r}" for r in ratios),), like=("tomesd",)),
        Contender("tomesd", (tuple(f"tomesd:ratio={r}" for r in ratios),), peer=True),
        Contender("todo", (("todo:factor=2",),)),
        Contender("cache-dit", (("cache-dit:threshold=0.1", "cache-dit:threshold=0.5"),), peer=True),
        Contender("steps", (("steps:2", "steps:1"),)),
    ]


def test_the_whole_comparison_and_again(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tomesd")
    clock, told = Clock(pipe), list[str]()
    options: dict[str, Any] = dict(steps=3, speed=1.5, call=CALL, rounds=(2, 4), judges=Judges(), model="tiny")

    def go(clock: Any) -> dict[str, Any]:
        tell = lambda what, share, words: told.append(what)  # noqa: E731
        return compare_caching(pipe, PROMPTS, tmp_path / "out", few(), timer=clock, progress=tell, **options)

    data = go(clock)
    assert {row["method"] for row in data["rows"]} == {"tome", "tomesd", "steps"}
    assert [row["state"] for row in data["others"]] == ["unreachable", "does not run"]
    psnrs = [row["paired"]["psnr"]["mean"] for row in data["rows"]]
    assert psnrs == sorted(psnrs, reverse=True) and all(map(math.isfinite, psnrs))
    assert all(row["equal"] and row["speed"]["n"] == 4 for row in data["rows"])
    by_name = {row["method"]: row for row in data["rows"]}
    assert data["best_peer"] == by_name["tomesd"]["variant"] and by_name["tomesd"]["ahead"] is None
    gap = by_name["tome"]["paired"]["psnr"]["mean"] - by_name["tomesd"]["paired"]["psnr"]["mean"]
    assert by_name["tome"]["ahead"]["mean"] == pytest.approx(gap)
    assert list(dict.fromkeys(told))[:2] == ["searching", "timing"]

    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| todo | — | at most 1.30x, with todo:factor=2 |" in page
    assert "* cache-dit: cache-dit " in page  # in its own words, or how to install it
    assert "tome (tomesd)" in page and "PSNR − tomesd" in page
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == data
    for name in ("result.json", "items.jsonl", "timing.json", "report.md", "report.html", "plot.png"):
        assert (tmp_path / "out" / "run" / name).stat().st_size > 100, name

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        pytest.fail("the pipeline was called")

    fail.__signature__ = inspect.signature(type(pipe).__call__)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", fail)
    monkeypatch.setattr(comparison, "write_report", lambda out, result: None)
    again = Clock(pipe)
    assert go(again) | {"created": data["created"]} == data
    assert again.calls == []


def test_a_killed_search_goes_on(pipe: Any, tmp_path: Path) -> None:
    class Killed(Clock):
        def __call__(self, variants: Sequence[Variant], rounds: int) -> Timing:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(variants, rounds)

    contender, asked = few()[0], {"model": "tiny"}
    whole = Clock(pipe)
    found = search(contender, Notebook(tmp_path / "a.json", asked).speed(whole, 3), 1.62, (2, 4))
    with pytest.raises(KeyboardInterrupt):
        search(contender, Notebook(tmp_path / "b.json", asked).speed(Killed(pipe), 3), 1.62, (2, 4))
    rest = Clock(pipe)
    assert search(contender, Notebook(tmp_path / "b.json", asked).speed(rest, 3), 1.62, (2, 4)) == found
    assert rest.calls == whole.calls[3:]
    other = Clock(pipe)
    search(contender, Notebook(tmp_path / "b.json", {"model": "other"}).speed(other, 3), 1.62, (2, 4))
    assert other.calls == whole.calls
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ConfigError, match=r"b\.json is damaged: .*; delete it"):
        Notebook(tmp_path / "b.json", asked)


def test_two_processes_draw(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "write_report", lambda out, result: None)

    def work(processes: Processes) -> Any:
        clock = Clock(pipe)
        data = compare_caching(
            pipe, PROMPTS, tmp_path / "out", few()[:1], steps=3, speed=1.5, call=CALL, rounds=(2, 4), judges=Judges(),
            timer=clock, processes=processes,
        )  # fmt: skip
        return [data, len(clock.calls)]

    (first, timed), (second, idle) = runs.in_two_processes(tmp_path, work)
    assert first == second and [row["method"] for row in first["rows"]] == ["tome"]
    assert timed > 0 and idle == 0
    assert len(list((tmp_path / "out" / "run" / "images").glob("*/manifest-1.jsonl"))) > 0


def test_nothing_to_compare(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare: 0 contenders"):
        compare_caching(pipe, PROMPTS, tmp_path, [], steps=3)
    with pytest.raises(ConfigError, match=r"no contender gets to 1\.5x"):
        compare_caching(pipe, PROMPTS, tmp_path, few()[2:3], steps=3, speed=1.5, timer=Clock(pipe), judges=Judges())

"""The parts of a tuning: steps and levels, costs, settings, targets."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from diffusion_tokred import ConfigError, Policy, UnsupportedError
from diffusion_tokred.evaluation.judges import Judges
from diffusion_tokred.methods import CONFIGS, make_config
from diffusion_tokred.schedule.intervals import fixed_full_steps
from diffusion_tokred.testing import tiny
from diffusion_tokred.tuning import constants
from diffusion_tokred.tuning.costs import measured, probed
from diffusion_tokred.tuning.forms import Candidate, Form, able, known
from diffusion_tokred.tuning.goal import Budget, Goal, budget_of, goal_of
from diffusion_tokred.tuning.progress import left, telling
from diffusion_tokred.tuning.result import cliff, front
from diffusion_tokred.tuning.steps import FULL, Steps, place, planned
from diffusion_tokred.tuning.tuner import split

US = tuple(1 - i / 20 for i in range(20))
TAYLOR = Form("taylorseer", "taylorseer", levers={"damping": (0.5, 0.85, 1.0)})


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_schedule_is_what_the_method_does() -> None:
    steps = Steps(US)
    full = (0, 3, 4, 11, 18)
    candidate = Candidate(TAYLOR, full, options=(("damping", 1.0),))
    rules = planned(candidate.config(20), candidate.policy(steps), steps, {"stack"})
    assert [i for i, rule in enumerate(rules) if rule == FULL] == list(full)
    assert {rule for rule in rules if rule != FULL} == {("forecast", 1.0)}


def test_a_pipeline_does_what_was_planned() -> None:
    from diffusion_tokred import patched, report

    pipe = tiny.sd3()
    with patched(pipe, method="taylorseer", interval=1):
        tiny.run(pipe, steps=8)
        levels = {step.index: step.u for step in report(pipe).steps}
    steps = Steps(tuple(levels[i] for i in sorted(levels)))
    forms, _ = able(pipe.transformer, known({"stack"}, (0,)), 8)
    assert {form.method for form in forms} >= {"taylorseer", "fora", "toca", "duca", "ras", "cat", "firstblock", "tome"}
    for form in forms:
        ratio = form.ratios[-1] if form.ratios else 1.0
        candidate = Candidate(form, (0, 1, 4, 6), ratio)
        wanted = planned(candidate.config(8), candidate.policy(steps), steps, {"stack"})
        with patched(pipe, candidate.config(8), policy=candidate.policy(steps)):
            tiny.run(pipe, steps=8)
            did = [FULL if s.mode == "full" else (s.mode, s.ratio) for s in report(pipe).steps]
        assert did == wanted, form.name
        assert [i for i, rule in enumerate(did) if rule == FULL] == [0, 1, 4, 6], form.name


def test_a_policy_carries_over_to_other_numbers_of_steps() -> None:
    candidate = Candidate(TAYLOR, (0, 1, 8, 15, 19))
    policy = candidate.policy(Steps(US))
    for count in (20, 40, 80):
        levels = [1 - (i + 0.5) / count + 0.5 / 20 for i in range(count)]  # the same range of noise
        share = np.mean([policy.at(min(u, 1.0))[0] == "full" for u in levels])
        assert share == pytest.approx(5 / 20, abs=1.5 / count + 0.02)


def test_steps_of_one_level_are_one_unit() -> None:
    steps = Steps((0.9, 0.9, 0.7, 0.7, 0.5, 0.5, 0.2, 0.2))
    assert steps.units == (0.9, 0.7, 0.5, 0.2) and steps.unit_of == (0, 0, 1, 1, 2, 2, 3, 3)
    assert steps.points([FULL, ("reuse", 1.0), ("reuse", 1.0), FULL]) == (
        (1.0, 0.0, "full"), (0.8, 1.0, "reuse"), (0.35, 0.0, "full"),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"noise levels .* are not known"):
        Steps((0.9, math.nan, 0.5, 0.2))
    with pytest.raises(ConfigError, match="a run of 2 noise levels has nothing to tune"):
        Steps((0.9, 0.5))


@pytest.mark.parametrize("interval", [2, 4, 5])
def test_equal_weights_give_equal_gaps(interval: int) -> None:
    full = fixed_full_steps(20, interval)
    found = place(20, len(full), np.ones(20), phase=0.9)
    assert found[0] == 0 and len(found) == len(full)
    inner = np.diff(found)
    assert inner.max() - inner.min() <= 1


def test_full_steps_go_where_the_weights_are() -> None:
    weights = np.where(np.arange(20) >= 10, 9.0, 1.0)
    found = place(20, 6, weights)
    assert sum(unit >= 10 for unit in found) >= 4 and len(set(found)) == 6
    assert place(20, 20, weights) == tuple(range(20)) and place(20, 1, weights) == (0,)
    assert place(20, 5, weights, first=3)[:3] == (0, 1, 2)


# --- costs ------------------------------------------------------------------------------------------------------------


def made_round(slower: float) -> dict[str, Any]:
    """A call of 10 seconds: 1 beside the steps, ten steps of 0.9. A reused step takes 0.1, and 0.05 before it."""
    full, reused = ["full", 0.0, 0.95 * slower], ["reuse", 1.0, 0.1 * slower]
    return {
        "unpatched": {"seconds": 10 * slower, "steps": 9 * slower},
        "dense": {"seconds": 10 * slower, "steps": [["full", 0.0, 0.9 * slower]] * 10},
        "forms": {"fora": {"seconds": (1 + 5 * 0.95 + 5 * 0.15) * slower, "steps": [full, reused] * 5}},
    }


def test_costs_are_shares_of_the_unpatched_call() -> None:
    costs = measured([made_round(1.0), made_round(3.0), made_round(1.5)])  # a machine that slows down
    assert costs.dense == pytest.approx(0.09) and costs.rest == pytest.approx(0.1)
    assert costs.forms["fora"].full == pytest.approx(0.095)
    assert costs.forms["fora"].between == {("reuse", 1.0): pytest.approx(0.015)}
    rules = [FULL, *[("reuse", 1.0)] * 6, FULL, FULL, FULL]
    assert costs.speed("fora", rules) == pytest.approx(10 / (1 + 4 * 0.95 + 6 * 0.15))
    assert costs.fewer(5) == pytest.approx(10 / (1 + 5 * 0.9)) and costs.fewer(10) == pytest.approx(1.0)


def test_what_a_patch_takes_for_itself_counts_at_each_step() -> None:
    """Ten steps of 0.9 and 1 beside them; patched, 0.02 more before each step, and 0.05 before a reused one."""
    full, reused = ["full", 0.0, 0.9], ["reuse", 1.0, 0.1]
    probe = {"seconds": 1 + 5 * (0.9 + 0.02) + 5 * (0.1 + 0.02 + 0.05), "steps": [full, reused] * 5}
    dense = {"seconds": 1 + 10 * (0.9 + 0.02), "steps": [full] * 10}
    costs = measured([{"unpatched": {"seconds": 10.0, "steps": 9.0}, "dense": dense, "forms": {"fora": probe}}])
    assert costs.dense == pytest.approx(0.09) and costs.rest == pytest.approx(0.1)
    assert costs.forms["fora"].full == pytest.approx(0.092)
    assert costs.forms["fora"].between == {("reuse", 1.0): pytest.approx(0.017)}


def test_costs_between_ratios_are_interpolated() -> None:
    line = lambda ratio: ["reduce", ratio, 1 - ratio]  # noqa: E731
    lines = [["full", 0.0, 1.0], line(0.5), line(0.9), line(0.5), line(0.9), ["full", 0, 1.0]]
    probe = {"seconds": 4.0 + sum(step[2] for step in lines), "steps": lines}
    dense = {"seconds": 10.0, "steps": [["full", 0.0, 1.0]] * 6}
    costs = measured([{"unpatched": {"seconds": 10.0, "steps": 6.0}, "dense": dense, "forms": {"x": probe}}]).forms["x"]
    assert costs.of(("reduce", 0.5)) == pytest.approx(0.05) and costs.of(("reduce", 0.7)) == pytest.approx(0.03)
    assert costs.of(("reduce", 0.99)) == pytest.approx(0.01) and costs.of(FULL) == pytest.approx(0.1)


@pytest.mark.parametrize("rules", [1, 2, 3])
def test_a_probe_has_all_kinds_of_steps(rules: int) -> None:
    asked = [("reduce", 0.1 * (i + 1)) for i in range(rules)]
    found = probed(20, asked, 2)
    assert found[:2] == [FULL, FULL] and set(found[2:]) == {FULL, *asked}
    assert all(found.count(rule) >= 4 for rule in asked)
    ratios = [("reduce", ratio) for ratio in (0.25, 0.5, 0.75)]
    for units, first in itertools.product(range(4, 12), range(3)):
        found = probed(units, ratios, first)
        assert len(found) == units and found[:first] == [FULL] * first
        least = set(ratios) if units - first > 2 else {ratios[0], ratios[-1]}  # what no other can be interpolated from
        assert set(found) - {FULL} == least


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", known({"stack", "deep"}, (0, 1)), ids=lambda form: form.name)
def test_levers_and_options_are_the_methods_own(form: Form) -> None:
    names = {f.name for f in fields(CONFIGS[form.method])}
    assert set(form.fixed) <= names and set(form.levers) <= names
    for name, values in form.levers.items():
        assert len(set(values)) == len(values) > 1
        for value in values:
            assert getattr(form.config({name: value}, 20), name) == value
    for row in constants.rows(form, 20):
        for candidate in row:
            candidate.config(20)


def test_constant_settings_are_what_a_user_types() -> None:
    rows = constants.rows(TAYLOR, 20)
    counts = [len(fixed_full_steps(20, dict(c.options)["interval"], dict(c.options)["warmup"])) for c in rows[0]]
    assert counts == sorted(set(counts), reverse=True) and {1, 2, 5, 10, 19} <= set(counts)
    half = next(
        c for c in rows[1] if counts[rows[0].index(rows[0][0])] and c.options == (("interval", 2), ("warmup", 1))
    )
    assert half.config(20) == make_config("taylorseer", interval=2, warmup=1)
    assert half.policy(Steps(US)) == Policy.constant(1.0, "forecast")


def test_a_row_is_bisected() -> None:
    row = [Candidate(TAYLOR, (0, i)) for i in range(1, 12)]
    asked: list[int] = []

    def at(limit: int, more: bool) -> Any:
        def good(candidate: Candidate) -> bool:
            asked.append(candidate.full[1])  # type: ignore[index]
            return (candidate.full[1] >= limit) is more  # type: ignore[index]

        return good

    assert constants.slowest(row, at(4, True)) == row[3] and len(asked) <= 4
    assert constants.fastest(row, at(4, False)) == row[2]
    assert constants.slowest(row, at(99, True)) is None and constants.fastest(row, at(0, False)) is None


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets() -> None:
    nobody = Judges()
    assert goal_of(None, None, None, nobody) == Goal("psnr", speed=2.0)
    assert goal_of(None, None, 35, nobody) == Goal("psnr", score=35.0)
    with pytest.raises(ConfigError, match=r"max_lpips needs the weights of a network.*min_psnr"):
        goal_of(None, 0.1, None, nobody)
    with pytest.raises(ConfigError, match="one target at a time, found target_speedup and min_psnr"):
        goal_of(2.0, None, 35.0, nobody)
    for wrong in (1.0, 0.5, math.inf, math.nan, "2"):
        with pytest.raises(ConfigError, match="target_speedup is a number above 1"):
            goal_of(wrong, None, None, nobody)  # type: ignore[arg-type]
    speed, quality = Goal("psnr", speed=2.0), Goal("lpips_alex", score=-0.1)
    assert speed.value(2.0, 30) > speed.value(1.9, 60) and speed.value(2.5, 31) > speed.value(2.0, 30)
    assert quality.value(1.2, -0.05) > quality.value(9.0, -0.11) and quality.value(2, -0.1) > quality.value(1.5, 0)
    assert quality.scores([{"lpips_alex": 0.2}]) == [-0.2] and quality.words == "lpips_alex <= 0.1"
    assert speed.scores([{"psnr": None, "size": [8, 8]}, {"psnr": 30.0, "size": [8, 8]}]) == [
        pytest.approx(20 * math.log10(255) + 10 * math.log10(192)), 30.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (None, Budget(7)),
        (3, Budget(3)),
        ("40", Budget(40)),
        ("90s", Budget(seconds=90)),
        ("1.5h", Budget(seconds=5400)),
    ],
)
def test_budgets(text: Any, budget: Budget) -> None:
    assert budget_of(text, 7) == budget


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "ten", "5 days", "0s"])
def test_no_budgets(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="budget"):
        budget_of(wrong, 7)


def test_prompts_are_split() -> None:
    texts = ["a", "b", "c", "d", "e", "f"]
    assert split(texts, None) == (("a", "b"), ("c", "d", "e", "f"))
    assert split(texts, 1) == (("a", "b", "c", "d", "e"), ("f",))
    assert split(["a"], ["x", "y"]) == (("a",), ("x", "y"))
    for wrong in (6, 0, -1):
        with pytest.raises(ConfigError, match="one prompt must be left to decide"):
            split(texts, wrong)
    with pytest.raises(ConfigError, match="'b' is in both"):
        split(["a", "b"], ["b"])
    with pytest.raises(ConfigError, match="a list of texts, found one text"):
        split("a red star", 1)


def test_front_and_cliff() -> None:
    points = [(1.0, 60.0), (1.5, 50.0), (1.4, 40.0), (2.0, 48.0), (2.5, 30.0), (3.0, 29.0), (2.0, 47.0)]
    assert [points[i] for i in front(points)] == [(1.0, 60.0), (1.5, 50.0), (2.0, 48.0), (2.5, 30.0), (3.0, 29.0)]
    assert cliff([points[i] for i in front(points)]) == {"before": 2.0, "after": 2.5, "lost": 18.0}
    assert cliff([(1.0, 60.0), (1.01, 20.0)]) is None


def test_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert left(30, 0.25) == "1:30" and left(5, 0.0) == "-:--" and left(60, 1.0) == "0:00"
    heard: list[tuple[str, float]] = []
    with telling(lambda what, share: heard.append((what, share))) as tell:
        tell("x", 0.5)
    with telling(False) as tell:
        tell("x", 0.5)
    with telling(True) as tell:  # no terminal: a line now and then
        tell("x", 0.5)
    assert heard == [("x", 0.5)] and capsys.readouterr().err == ""

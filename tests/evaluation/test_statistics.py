"""Statistics against their definitions (tests/reference/statistics.py) and against scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import statistics
from diffusion_tokred.evaluation.statistics import (
    Mean,
    capped_psnr,
    change,
    holm,
    mean,
    paired,
    paired_psnr,
    score,
    sign_flip,
    verdict,
    win_rate,
    worst,
)
from tests.reference import statistics as reference


def skewed(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).lognormal(size=n).tolist()


def test_the_interval_is_the_textbooks() -> None:
    data = skewed(23)
    drawn = np.random.default_rng(9).integers(0, 23, (499, 23))
    low, high = statistics.bca(np.array(data), np.array(data)[drawn].mean(1))
    assert (low, high) == pytest.approx(reference.bca(data, drawn.tolist()), rel=1e-12)
    mirrored = statistics.bca(-np.array(data), -np.array(data)[drawn].mean(1))
    assert mirrored == pytest.approx((-high, -low), rel=1e-9)


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_the_interval_is_scipys(level: float) -> None:
    from scipy.stats import bootstrap

    data = skewed(60, 3)
    rng = np.random.default_rng(0)  # it draws the resamples as ours does, so the two agree to rounding
    theirs = bootstrap((data,), np.mean, confidence_level=level, n_resamples=10_000, method="BCa", rng=rng)
    ours = mean(data, level=level)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)
    plain = np.quantile(statistics._resampled(np.array(data)), ((1 - level) / 2, (1 + level) / 2))
    assert ours.high > 1.02 * plain[1]  # so the plain bootstrap would have been told apart


def test_pictures_of_a_prompt_stay_together() -> None:
    values, prompts = [1.5, 2.0, 4.0, 8.0, 3.0, -1.0], ["a", "b", "a", "c", "b", "a"]
    found = mean(values, prompts)
    assert found.mean == pytest.approx(float(reference.mean_over_prompts(values, prompts)))
    assert (found.n, found.prompts) == (6, 3)
    once = skewed(40, 1)
    thrice = mean([v for v in once for _ in range(3)], [i for i in range(40) for _ in range(3)])
    alone = mean(once)
    assert (thrice.low, thrice.high) == pytest.approx((alone.low, alone.high))  # repeats are no new evidence
    assert mean(once * 3).high - mean(once * 3).low < 0.7 * (alone.high - alone.low)  # taken as new they would be
    assert sign_flip([v for v in once for _ in range(2)], [i for i in range(40) for _ in range(2)]) == sign_flip(once)


def test_figures_repeat_and_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = skewed(30)
    state = np.random.get_state()[1].tolist()
    first, p = mean(data), sign_flip(np.subtract(data, 1.4).tolist())
    monkeypatch.setattr(statistics, "_DRAWS", 30 * 700)
    assert mean(data) == first and sign_flip(np.subtract(data, 1.4).tolist()) == p
    assert np.random.get_state()[1].tolist() == state


def test_what_a_bootstrap_cannot_know_is_said() -> None:
    one, none, same, few = mean([2.0]), mean([None, None]), mean([0.1] * 30), mean([1.0, 2.0, 4.0])
    assert one.mean == 2 and math.isnan(one.low) and one.note == "one prompt: no interval"
    assert one.to_dict()["why_null"] == {"low": one.note, "high": one.note}
    assert math.isnan(none.mean) and none.n == 0 and none.missing == 2
    assert set(none.to_dict()["why_null"]) == {"mean", "low", "high"}
    assert same.low == same.mean == same.high == pytest.approx(0.1) and "all 30 prompts" in str(same.note)
    assert few.low < few.mean < few.high and "too narrow" in str(few.note)
    assert mean([2.0, 3.0], ["a", "a"]).note == "one prompt: no interval"
    assert mean(skewed(30)).note is None and "why_null" not in mean(skewed(30)).to_dict()


def test_missing_figures_are_left_out_with_their_prompt() -> None:
    found = mean([1.0, None, 3.0, None], ["a", "a", "b", "c"])
    assert found == Mean(2.0, found.low, found.high, 2, 2, 2, found.note)
    assert win_rate([1.0, None, -1.0, 2.0], "higher") == pytest.approx(2 / 3)
    assert worst([None, 2.0, 1.0], "higher") == 1.0


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_sign_flip_is_the_enumeration(n: int) -> None:
    gaps = np.round(np.random.default_rng(n).normal(0.4, 1, n), 2).tolist()
    assert sign_flip(gaps) == reference.sign_flip(gaps)


def test_sign_flip_of_ties_and_zeros() -> None:
    assert sign_flip([0.0] * 5) == sign_flip([0.0] * 40) == 1
    assert sign_flip([0.1, 0.2, -0.3]) == 1  # their sum is rounding alone
    assert sign_flip([0.3, 0.1, 0.1, 0.1]) == reference.sign_flip([0.3, 0.1, 0.1, 0.1]) == 2 / 16
    assert sign_flip([0.1] * 16) == 2 / 2**16
    assert math.isnan(sign_flip([]))


def test_sampled_flips_agree_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = np.random.default_rng(2).normal(0.45, 1, 11).tolist()
    exact = reference.sign_flip(gaps)
    assert 0.02 < exact < 0.5
    monkeypatch.setattr(statistics, "EXACT", 0)
    assert sign_flip(gaps) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert sign_flip([1.0 + i for i in range(40)]) == 1 / 10_001  # never 0: the pattern seen counts


def test_win_rate_and_worst_follow_the_direction() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 5.0, 3.0]
    gaps = statistics.differences(a, b)
    for better in ("higher", "lower"):
        assert win_rate(gaps, better) == reference.win_rate(a, b, better)
    assert win_rate(gaps, "higher") == 0.625
    assert win_rate([1.0, 1.0, -1.0], "higher", ["a", "a", "b"]) == 0.5  # each prompt weighs the same
    for n in (1, 7, 20, 21, 40, 140, 300):
        for better in ("higher", "lower"):
            assert worst(skewed(n), better) == pytest.approx(reference.worst(skewed(n), better))
    assert worst([30.0, math.inf], "higher") == 30


def test_holm_is_the_definition() -> None:
    ps = np.random.default_rng(0).uniform(0, 0.1, 12).round(2).tolist()
    assert list(holm(dict(enumerate(ps))).values()) == pytest.approx(reference.holm(ps))
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.03, "b": None, "c": math.nan}) == {"a": 0.03}


def test_identical_pictures_are_counted_and_capped() -> None:
    size = 3 * 16 * 16
    one_step = 10 * math.log10(255**2 / (1 / size))  # mean squared error: one value of all is off by one
    assert capped_psnr([math.inf, 30.0, None], size) == [pytest.approx(one_step), 30.0, None]
    entry = paired_psnr([30.0, 40.0, math.inf, None], size)
    assert entry["mean"] == pytest.approx((70 + one_step) / 3)
    assert (entry["identical"], entry["n"], entry["missing"], entry["worst5"]) == (1, 3, 1, 30)
    every = paired_psnr([math.inf, math.inf], size)
    assert math.isnan(every["mean"]) and math.isnan(every["worst5"]) and every["identical"] == 2
    assert set(every["why_null"].values()) == {"all pictures are equal"}
    none = paired_psnr([None], size)
    assert none["identical"] == 0 and set(none["why_null"].values()) == {"no picture has this figure"}


def test_entries_of_a_result_file() -> None:
    values, base = [0.9, 0.8, 0.7], [1.0, 0.8, 0.5]
    assert set(paired(values, "higher")) >= {"mean", "low", "high", "worst5", "n", "better"}
    assert set(score(values, "higher")) >= {"mean", "low", "high", "n", "better"}
    entry = change(values, base, "higher")
    assert entry["mean"] == pytest.approx(0.1 / 3) and entry["win_rate"] == 0.5
    assert entry["p"] == pytest.approx(reference.sign_flip([-0.1, 0.0, 0.2])) and entry["n"] == 3
    assert change(values, base, "lower")["win_rate"] == 0.5
    assert change([0.9, 0.8, 0.9], base, "lower")["win_rate"] == 0.5 != change([2.0] * 3, base, "lower")["win_rate"]


def verdicts(gap: float, margin: float, better: str = "higher", n: int = 40, **options: Any) -> dict[str, Any]:
    control = np.random.default_rng(1).normal(30, 4, n)
    values = control + gap + np.random.default_rng(2).normal(0, 0.6, n)  # mean gap is within 0.2 or so of `gap`
    return verdict(values.tolist(), control.tolist(), margin=margin, better=better, against="steps-22", **options)


def test_a_verdict_needs_the_whole_interval_on_the_right_side() -> None:
    assert verdicts(1.0, 0)["passed"] and not verdicts(-1.0, 0)["passed"]
    assert not verdicts(0.0, 0)["passed"] and verdicts(0.0, 0.5)["passed"]
    assert verdicts(-1.0, 0, "lower")["passed"] and not verdicts(1.0, 0, "lower")["passed"]
    assert verdicts(0.3, 0.8, "lower")["passed"] and not verdicts(0.7, 0.8, "lower")["passed"]
    found = verdicts(-0.2, 0.5)
    gap = found["difference"]
    assert found["passed"] == (gap["low"] > -0.5)
    # The limit itself: a margin at the end of the interval is not excluded, one beyond it is.
    assert not verdicts(-0.2, -gap["low"])["passed"] and verdicts(-0.2, -gap["low"] + 1e-9)["passed"]
    assert found["margin"] == 0.5 and found["against"] == "steps-22" and "steps-22" in found["statement"]


def test_many_verdicts_need_more() -> None:
    one, many = verdicts(0.0, 0.3)["difference"], verdicts(0.0, 0.3, family=10)["difference"]
    assert verdicts(0.0, 0.3, family=10)["level"] == pytest.approx(0.995)
    assert many["low"] < one["low"] and many["high"] > one["high"] and many["mean"] == one["mean"]


def test_narrow_tails_are_drawn_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 resamples or more beyond each end, so that no end hangs on a few of them."""
    real, counts = statistics._resampled, []
    monkeypatch.setattr(statistics, "_resampled", lambda data, count: counts.append(count) or real(data, count))
    for level in (0.95, 1 - 0.05 / 20):
        mean(skewed(30), level=level)
    assert counts == [10_000, 40_000]


def test_no_verdict_from_few_prompts_or_about_nothing() -> None:
    few = verdicts(5.0, 0, n=19)
    assert not few["passed"] and "19 prompts are too few" in few["statement"]
    repeated = verdict(
        [2.0] * 40, [1.0] * 40, margin=0, better="higher", against="x", prompts=[i % 10 for i in range(40)]
    )
    assert not repeated["passed"] and "10 prompts" in repeated["statement"]
    same = verdict([1.0] * 30, [1.0] * 30, margin=0, better="higher", against="x")
    assert not same["passed"] and verdict([1.0] * 30, [1.0] * 30, margin=0.1, better="higher", against="x")["passed"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean([math.inf, 1.0]), "finite"),
        (lambda: mean([1.0], ["a", "b"]), "1 values and 2 prompts"),
        (lambda: statistics.differences([1.0], []), "found 1 and 0"),
        (lambda: worst([1.0], "up"), "better is one of higher, lower"),
        (lambda: verdicts(0, -0.1), "number >= 0"),
        (lambda: verdicts(0, math.nan), "number >= 0"),
        (lambda: verdicts(0, 0, family=0), "at least one"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least"), [(20, 0.88), (100, 0.915)])
def test_intervals_hold_what_they_promise(n: int, least: float) -> None:
    """Of 95 % intervals about 95 % contain the truth: somewhat fewer for few, skewed values. Also by cluster."""
    rng, runs, hits = np.random.default_rng(4), 600, {"normal": 0, "exponential": 0, "clusters": 0, "ignoring them": 0}
    for _ in range(runs):
        for name, data, truth in (("normal", rng.normal(size=n), 0), ("exponential", rng.exponential(size=n), 1)):
            found = mean(data.tolist())
            hits[name] += found.low <= truth <= found.high
        values = (rng.normal(size=(n, 1)) + 0.5 * rng.normal(size=(n, 4))).ravel().tolist()
        together, apart = mean(values, [i // 4 for i in range(4 * n)]), mean(values)
        hits["clusters"] += together.low <= 0 <= together.high
        hits["ignoring them"] += apart.low <= 0 <= apart.high
    shares = {name: count / runs for name, count in hits.items()}
    for name in ("normal", "exponential", "clusters"):
        assert least <= shares[name] <= 0.975, shares
    assert shares["ignoring them"] < 0.8, shares

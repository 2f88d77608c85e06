"""Smooth shapes as step functions: the nearest there is, by trying all others; and the constructors of policies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.schedule import Policy

GRID = (np.arange(1200) + 0.5) / 1200  # noise levels, none of them at a change
SHAPES = {
    "linear": (Policy.linear(0.6, 0.1), lambda u: 0.1 + 0.5 * u),
    "rising": (Policy.linear(0.0, 0.75), lambda u: 0.75 * (1 - u)),
    "cosine": (Policy.cosine(0.7, 0.1), lambda u: 0.4 - 0.3 * math.cos(math.pi * u)),
    "square": (Policy.shaped(lambda u: 0.1 + 0.8 * u * u), lambda u: 0.1 + 0.8 * u * u),
}


def error(policy, shape):
    return float(np.mean([(policy.at(u)[1] - shape(u)) ** 2 for u in GRID]))


def means(shape, cuts):
    """The best step function with changes at these noise levels: the shape's mean in each stretch."""
    values = np.array([shape(u) for u in GRID])
    stretches = np.digitize(GRID, sorted(cuts))
    return sum(((values[stretches == i] - values[stretches == i].mean()) ** 2).sum() for i in range(len(cuts) + 1))


@pytest.mark.parametrize("name", SHAPES)
def test_nearest_of_all_step_functions(name):
    """Of all with three ratios that change at multiples of 0.025: none is nearer, and the mean is the shape's."""
    policy, shape = SHAPES[name]
    assert len({ratio for _, ratio, _ in policy.points}) == 3
    best = min(means(shape, cuts) for cuts in itertools.combinations(np.arange(1, 40) / 40, 2)) / len(GRID)
    assert error(policy, shape) <= best * 1.001
    assert np.mean([policy.at(u)[1] for u in GRID]) == pytest.approx(np.mean([shape(u) for u in GRID]), abs=5e-4)


def test_linear_by_hand():
    assert Policy.linear(0.6).points == ((1, 0.5, "reduce"), (0.6667, 0.3, "reduce"), (0.3333, 0.1, "reduce"))
    assert Policy.linear(0.6, counts=1) == Policy.constant(0.3)
    assert Policy.linear(0.4, 0.4, mode="reuse") == Policy.constant(0.4, "reuse")
    assert len(Policy.linear(0.6, counts=6).points) == 6


def test_a_shape_that_comes_back():
    """Three ratios, not three stretches; where it is 0, everything is computed."""
    policy = Policy.piecewise([(0.8, 0.0), (0.6, 0.6), (0.4, 0.6), (0.2, 0.0)])
    ratios = [ratio for _, ratio, _ in policy.points]
    assert len({*ratios} - {0}) == 3 and ratios == ratios[::-1]
    assert {policy.at(u) for u in (1.0, 0.9, 0.81, 0.19, 0.0)} == {("full", 0.0)}
    assert max(ratios) == policy.at(0.5)[1] == pytest.approx(0.6, abs=0.03)
    for u in (0.55, 0.65, 0.72, 0.78):  # even
        assert policy.at(u) == policy.at(1 - u)


def test_few_ratios_stay_as_they_are():
    policy = Policy.shaped(lambda u: 0.5 if u > 0.7 else 0.25 if u > 0.4 else 0.0)
    assert policy.points == ((1, 0.5, "reduce"), (0.7, 0.25, "reduce"), (0.4, 0, "full"))
    assert Policy.piecewise([(0.5, 0.3)]) == Policy.constant(0.3)


def test_short_stretches_go_with_the_next():
    policy = Policy.shaped(lambda u: 0.6 if 0.5 < u < 0.505 else 0.3)
    assert policy == Policy.constant(0.3)


def test_stepwise():
    policy = Policy.stepwise([0.6, 0.3, 0], at=[0.7, 0.2])
    assert [policy.at(u) for u in (1, 0.71, 0.7, 0.21, 0.2, 0)] == [
        ("reduce", 0.6), ("reduce", 0.6), ("reduce", 0.3), ("reduce", 0.3), ("full", 0.0), ("full", 0.0),
    ]  # fmt: skip
    assert Policy.stepwise([0.6, 0.3, 0, 0.1]).points == (
        (1, 0.6, "reduce"), (0.75, 0.3, "reduce"), (0.5, 0, "full"), (0.25, 0.1, "reduce"),
    )  # fmt: skip
    assert Policy.stepwise([1.0], mode="reuse") == Policy.constant(1, "reuse")


def test_shapes_are_saved(tmp_path):
    for policy, _ in SHAPES.values():
        policy.save(tmp_path / "policy.json")
        assert Policy.load(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Policy.linear(1.2), r"\[0, 1\) for mode .reduce., found 1.199"),
        (lambda: Policy.linear(0.5, -0.1), "share of tokens not computed"),
        (lambda: Policy.linear(0.5, counts=0), "counts is a number of ratios, 1 or more, found 0"),
        (lambda: Policy.cosine(0.5, counts=True), "counts is a number"),
        (lambda: Policy.cosine(0.5, mode="half"), "full, reduce, reuse, forecast, skip, found 'half'"),
        (lambda: Policy.piecewise([]), r"through points \(u, ratio\) by descending u"),
        (lambda: Policy.piecewise([(0.2, 0.1), (0.8, 0.3)]), "descending u"),
        (lambda: Policy.piecewise([0.2]), "a point is"),
        (lambda: Policy.stepwise([]), "list of ratios"),
        (lambda: Policy.stepwise([0.5, 0.2], at=[]), "2 ratios change at 1 noise levels"),
        (lambda: Policy.stepwise([0.5, 0.2, 0], at=[0.2, 0.6]), "descending u"),
        (lambda: Policy.shaped(lambda u: math.nan), "finite"),
        (lambda: Policy.shaped(lambda u: (0.5, "reduce")), "finite number"),
    ],
)
def test_shapes_that_cannot_be_right(make, says):
    with pytest.raises(ConfigError, match=says):
        make()

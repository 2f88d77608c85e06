"""Rules: which of them a site goes by, and their files."""

from __future__ import annotations

import json
import math

import pytest

from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.schedule import Policy, Rule

RULES = [
    {"level": 1, "kind": "feed_forward", "points": [(1.0, 0.1)]},
    {"blocks": [2, 4], "points": [(1.0, 0.2), (0.5, 0.0)]},
    {"level": 1, "points": [(1.0, 0.3)]},
    {"kind": "cross_attention", "points": [(0.9, 0.4)]},
]
POLICY = Policy(points=[(1.0, 0.5), (0.5, 0.6)], rules=RULES)


@pytest.mark.parametrize(
    ("site", "at"),
    [
        ((1, "feed_forward", 0), {1: 0.1, 0.5: 0.1}),
        ((1, "feed_forward", 3), {1: 0.1, 0.5: 0.1}),  # the first that matches wins
        ((1, "attention", 3), {1: 0.2, 0.51: 0.2, 0.5: 0.0}),
        ((0, "attention", 2), {1: 0.2, 0.5: 0.0}),
        ((0, "attention", 4), {1: 0.2, 0.5: 0.0}),
        ((0, "attention", 5), {1: 0.5, 0.5: 0.6}),
        ((1, "attention", 5), {1: 0.3}),
        ((0, "cross_attention", 1), {1: 0.0, 0.9: 0.4}),
        ((1, "cross_attention", 1), {1: 0.3}),
        ((0, "feed_forward", 1), {1: 0.5, 0.51: 0.5, 0.5: 0.6}),
    ],
)
def test_the_first_that_matches_wins(site, at):
    for u, ratio in at.items():
        assert POLICY.at(u, *site) == (("reduce", ratio) if ratio else ("full", 0.0))


def test_constant_and_dense_mean_all_sites():
    constant = Policy.constant(0.5)
    assert not Policy(points=constant.points, rules=[{"level": 1, "points": [(0.5, 0.5)]}]).is_constant
    assert Policy(points=constant.points, rules=[{"level": 1, "points": [(1.0, 0.2)]}]).is_constant
    assert not Policy(rules=[{"level": 1, "points": [(0.5, 0.5)]}]).is_dense
    assert Policy(rules=[{"level": 1, "points": []}]).is_dense
    mixed = Policy(points=constant.points, rules=[{"level": 1, "points": [(0.5, 0.5)]}])
    assert mixed.at(math.nan, level=0) == ("reduce", 0.5)
    with pytest.raises(UnsupportedError, match="noise level, which is unknown"):
        mixed.at(math.nan, level=1)


def test_a_function_beside_rules():
    policy = Policy(function=lambda u: u / 2, rules=[{"level": 1, "points": [(1.0, 0.2)]}])
    assert policy.at(0.8) == ("reduce", 0.4) and policy.at(0.8, level=1) == ("reduce", 0.2)
    assert not policy.is_constant
    with pytest.raises(ConfigError, match=r"Policy.shaped\(function\)"):
        policy.to_dict()


def test_files(tmp_path):
    path = tmp_path / "policy.json"
    POLICY.save(path)
    data = json.loads(path.read_text())
    assert data["_version"] == 2
    assert data["rules"][1] == {"blocks": [2, 4], "points": [[1.0, 0.2, "reduce"], [0.5, 0.0, "full"]]}
    assert Policy.load(path) == POLICY and hash(Policy.load(path)) == hash(POLICY)
    assert isinstance(POLICY.rules[0], Rule)
    path.write_text('{"_type": "Policy", "_version": 1, "points": [[1.0, 0.5, "reduce"]], "method": "tome"}')
    assert Policy.load(path) == Policy(points=[(1.0, 0.5)], method="tome")
    path.write_text(json.dumps(data | {"_version": 1}))
    with pytest.raises(ConfigError, match="unknown keys in a policy: rules"):
        Policy.load(path)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"level": 1, "points": []}, "rules must be a list"),
        ("level", "rules must be a list"),
        ([[1, 2]], "a rule has points, and level, kind or blocks"),
        ([{"level": 1}], "a rule has points"),
        ([{"level": 1, "points": [], "step": 3}], "a rule has points"),
        ([{"points": [(1.0, 0.5)]}], "a rule is for a level, a kind or blocks"),
        ([{"level": -1, "points": []}], "level of a rule is a whole number from 0 on, found -1"),
        ([{"level": True, "points": []}], "level of a rule"),
        ([{"kind": "attn", "points": []}], "kind of a rule is one of attention, .*, found 'attn'"),
        ([{"blocks": 3, "points": []}], r"first and the last block, such as \[0, 7\], found 3"),
        ([{"blocks": [3, 1], "points": []}], r"found \[3, 1\]"),
        ([{"blocks": [0, 1.5], "points": []}], "first and the last"),
        ([{"level": 0, "points": [(0.5, 2)]}], "found 2"),
        ([{"level": 0, "points": "none"}], "points must be a list"),
    ],
)
def test_rules_that_cannot_be_right(rules, says):
    with pytest.raises(ConfigError, match=says):
        Policy(points=[(1.0, 0.5)], rules=rules)
    with pytest.raises(ConfigError, match=says):
        Policy.from_dict({"_type": "Policy", "_version": 2, "points": [], "rules": rules})

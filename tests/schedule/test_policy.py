"""Policies: the rule between points, what is refused, and the files."""

from __future__ import annotations

import json
import math
import os

import pytest

from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.schedule import MODES, Policy, as_policy

POINTS = [(0.9, 0.5, "reduce"), (0.6, 0.75, "reuse"), (0.3, 0.0, "full")]


def test_a_point_holds_from_its_u_down_to_the_next():
    policy = Policy(points=POINTS)
    rule = {
        1.0: ("full", 0.0),
        0.9001: ("full", 0.0),
        0.9: ("reduce", 0.5),
        0.61: ("reduce", 0.5),
        0.6: ("reuse", 0.75),
    }
    rule |= {0.31: ("reuse", 0.75), 0.3: ("full", 0.0), 0.0: ("full", 0.0)}
    assert {u: policy.at(u) for u in rule} == rule
    assert policy.at(0.7, level=1, kind="feed_forward", block=3) == ("reduce", 0.5)


def test_constant():
    policy = Policy.constant(0.4)
    assert {policy.at(u) for u in (1.0, 0.5, 0.0, math.nan)} == {("reduce", 0.4)}
    assert Policy.constant(0.4, "forecast").at(0.2) == ("forecast", 0.4)
    assert Policy().at(0.5) == Policy.constant(0).at(0.5) == Policy().at(math.nan) == ("full", 0.0)
    assert Policy.constant(0.4).is_constant and Policy().is_constant
    assert not Policy(points=[(0.5, 0.4)]).is_constant and not Policy(points=POINTS).is_constant


def test_unknown_noise_is_refused_where_it_matters():
    for policy in (Policy(points=POINTS), as_policy(lambda u: 0.5)):
        with pytest.raises(UnsupportedError, match="noise level, which is unknown"):
            policy.at(math.nan)


def test_ratio_zero_and_full_are_one():
    policy = Policy(points=[(1, 0, "reuse"), (0.5, 0.25), (0.2, 0)])
    assert policy.points == ((1.0, 0.0, "full"), (0.5, 0.25, "reduce"), (0.2, 0.0, "full"))
    assert Policy(points=[(1, 1, "skip")]).at(0.5) == ("skip", 1.0), "a whole step may be left out"


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([(0.5, 1.0)], r"\[0, 1\) for mode 'reduce', found 1"),
        ([(0.5, -0.1)], "found -0.1"),
        ([(0.5, 1.5, "skip")], r"\[0, 1\] for mode 'skip', found 1.5"),
        ([(0.5, math.nan)], "ratio must be a finite number, found nan"),
        ([(math.nan, 0.5)], "u must be a finite number"),
        ([(1.2, 0.5)], r"\[0, 1\] \(1 = noise\), found 1.2"),
        ([(0.3, 0.5), (0.6, 0.5)], "descending u, without repeats: found 0.6 after 0.3"),
        ([(0.3, 0.5), (0.3, 0.6)], "without repeats"),
        ([(0.5, 0.5, "half")], "full, reduce, reuse, forecast, skip, found 'half'"),
        ([(0.5, 0.5, ["reduce"])], "mode is one of"),
        ([(0.5, 0.5, "full")], "'full' computes all tokens"),
        ([(0.5,)], r"a point is \(u, ratio, mode\)"),
        ([0.5], r"a point is \(u, ratio, mode\)"),
        ([("0.5", 0.5)], "u must be a finite number"),
        ([(0.5, True)], "ratio must be a finite number"),
        ("0.5", "must be a list"),
        ({"0.5": 0.5}, "must be a list"),
        (0.5, "must be a list"),
    ],
)
def test_points_that_cannot_be_right(points, says):
    with pytest.raises(ConfigError, match=says):
        Policy(points=points)


def test_as_policy():
    policy = Policy(points=POINTS)
    assert as_policy(None) is None and as_policy(policy) is policy
    assert as_policy(0.5) == Policy.constant(0.5) and as_policy(0) == Policy.constant(0)
    assert as_policy(POINTS) == as_policy(tuple(POINTS)) == policy
    assert as_policy([(1, 0.3), (0.5, 0)]).at(0.7) == ("reduce", 0.3)
    assert as_policy(lambda u: u / 2).at(0.8) == ("reduce", 0.4)
    assert as_policy(lambda u: (1.0, "skip") if u > 0.5 else 0).at(0.8) == ("skip", 1.0)
    for bad in ("sdxl.json", object(), True, {"points": []}):
        with pytest.raises(ConfigError):
            as_policy(bad)
    with pytest.raises(ConfigError, match=r"Policy.load\(path\)"):
        as_policy("sdxl.json")
    with pytest.raises(ConfigError, match="found 2"):
        as_policy(lambda u: 2.0).at(0.5)


def test_frozen_equal_and_hashable():
    policy = Policy(points=POINTS, measured={"seconds": 1})
    assert policy == Policy(points=tuple(POINTS), measured={"seconds": 1}) and len({policy, policy}) == 1
    with pytest.raises(AttributeError):
        policy.points = ()


def test_files(tmp_path):
    policy = Policy(points=POINTS, method="tome", model="toy-sd", scheduler="DDIM", measured={"seconds": [1.5, 1.0]})
    path = tmp_path / "policy.json"
    policy.save(path)
    assert Policy.load(path) == Policy.load(str(path)) == policy
    data = json.loads(path.read_text())
    assert (data["_type"], data["_version"], data["points"]) == ("Policy", 1, [list(p) for p in POINTS])
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert "method" not in Policy(points=POINTS).to_dict()
    assert set(MODES) >= {p[2] for p in POINTS}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    Policy.constant(0.5).save(path)
    before = path.read_text()
    for bad in (Policy(points=POINTS, measured=object()), Policy(points=POINTS, measured=math.nan), as_policy(abs)):
        with pytest.raises(ConfigError, match="cannot be"):
            bad.save(path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Policy.constant(0.6).save(path)
    assert path.read_text() == before and os.listdir(tmp_path) == ["policy.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_type": "Config"}, "_type is 'Config', must be 'Policy'"),
        ({"_type": None}, "must be 'Policy'"),
        ({"_version": 3}, "version 3, this release reads up to 2: update"),
        ({"_version": "1"}, "whole number from 1 on, found '1'"),
        ({"_version": 0}, "whole number"),
        ({"poinst": []}, "unknown keys in a policy: poinst; allowed are points"),
        ({"points": [[0.5, 2, "reduce"]]}, "found 2"),
        ({"points": "none"}, "must be a list"),
    ],
)
def test_files_that_cannot_be_right(change, says, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(Policy(points=POINTS).to_dict() | change))
    with pytest.raises(ConfigError, match=f"policy.json.*{says}"):
        Policy.load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "JSON object, found list"),
        ('{"_type": "Policy", "_version": 1}', "no points"),
    ],
)
def test_files_that_are_no_policy(text, says, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"broken.json.*{says}"):
        Policy.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        Policy.load(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        Policy.load(tmp_path / "binary.json")


def test_infinite_numbers_in_a_file(tmp_path):
    """Python's JSON reads NaN and Infinity; a policy must not."""
    path = tmp_path / "policy.json"
    path.write_text('{"_type": "Policy", "_version": 1, "points": [[NaN, 0.5, "reduce"]]}')
    with pytest.raises(ConfigError, match="finite"):
        Policy.load(path)

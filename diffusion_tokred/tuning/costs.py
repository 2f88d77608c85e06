"""What steps cost, and how fast a schedule is: composed from the costs of its steps.

Each form runs once a round a schedule that has all kinds of its steps, with `record="time"`; the unpatched pipeline
runs in the same round, and all is counted in shares of its time, so that a machine that slows down slows down both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .steps import FULL, Does

Probe = Mapping[str, Any]  # "seconds" of the call; "steps": [mode, ratio, seconds] of each


@dataclass(frozen=True)
class FormCost:
    """Shares of the unpatched call's time: of a full step, and of the others by what they do."""

    full: float
    between: Mapping[Does, float]

    def of(self, rule: Does) -> float:
        """Of a step. Between ratios that were measured it is interpolated, beyond them the nearest is taken.

        A mode that was not measured costs what the others do: reusing and forecasting are hardly different.
        """
        mode, ratio = rule
        if mode == "full":
            return self.full
        every = sorted((r, cost, m) for (m, r), cost in self.between.items())
        known = [(r, cost) for r, cost, m in every if m == mode] or [(r, cost) for r, cost, _ in every]
        return float(np.interp(ratio, [r for r, _ in known], [cost for _, cost in known]))


@dataclass(frozen=True)
class Costs:
    """Shares of the unpatched call's time.

    Attributes:
        steps: of the run.
        seconds: of the unpatched call, median.
        dense: of an unpatched step.
        rest: of all that is no step: text encoders, decoder, scheduler.
        forms: by name.
        rounds: of measuring.
    """

    steps: int
    seconds: float
    dense: float
    rest: float
    forms: Mapping[str, FormCost]
    rounds: int

    def speed(self, form: str, rules: Sequence[Does]) -> float:
        """How many times as fast as unpatched a run of these steps is."""
        return 1 / (self.rest + sum(map(self.forms[form].of, rules)))

    def ceiling(self, form: str, rules: Sequence[Does]) -> float:
        """The speed if all steps that are not full cost what the cheapest of the form does."""
        cost = self.forms[form]
        least = min(cost.between.values())
        return 1 / (self.rest + sum(cost.full if rule == FULL else least for rule in rules))

    def fewer(self, steps: int) -> float:
        """How many times as fast the unpatched pipeline is with fewer steps."""
        return 1 / (self.rest + steps * self.dense)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        forms = {
            name: {"full": cost.full, "between": [[mode, ratio, c] for (mode, ratio), c in cost.between.items()]}
            for name, cost in self.forms.items()
        }
        return {"steps": self.steps, "seconds": self.seconds, "dense": self.dense, "rest": self.rest,
                "rounds": self.rounds, "forms": forms}  # fmt: skip


def measured(rounds: Sequence[Mapping[str, Any]]) -> Costs:
    """Costs from rounds: medians over the rounds of medians over the steps of a kind.

    Args:
        rounds: each `{"unpatched": {"seconds", "steps"}, "dense": Probe, "forms": {name: Probe}}`: seconds of the
            unpatched call, and of all its steps; "dense" is a run with a patch that leaves all steps full.

    What a patch does before and after a step lies outside of the step's own seconds. What the dense call took more
    than the unpatched one beside its steps is the patch's own, at each step. What a call took more than the dense
    one, such as for choosing tokens, is divided among the steps that are not full.
    """
    steps = len(rounds[0]["dense"]["steps"])
    dense = np.median([one["unpatched"]["steps"] / steps / one["unpatched"]["seconds"] for one in rounds])
    own = max(float(np.median([_own(one) for one in rounds])) / steps, 0.0)
    forms = {}
    for name in rounds[0]["forms"]:
        shares: dict[Does, list[float]] = {}
        for one in rounds:
            probe, whole = one["forms"][name], one["unpatched"]["seconds"]
            kinds = _kinds(probe)
            between = sum(mode != "full" for mode, _, _ in probe["steps"])
            more = (_beside(probe) - _beside(one["dense"])) / max(between, 1)
            for rule, seconds in kinds.items():
                shares.setdefault(rule, []).append((seconds + more * (rule != FULL)) / whole)
        costs = {rule: own + max(float(np.median(some)), 0.0) for rule, some in shares.items()}
        full = costs.pop(FULL, own + float(dense))
        if costs:
            forms[name] = FormCost(full, costs)
    return Costs(
        steps=steps,
        seconds=float(np.median([one["unpatched"]["seconds"] for one in rounds])),
        dense=float(dense),
        rest=max(1 - steps * float(dense), 0.0),
        forms=forms,
        rounds=len(rounds),
    )


def probed(units: int, rules: Sequence[Does], first: int = 1) -> list[Does]:
    """A schedule that has all kinds of steps: by turns a full one and two of a rule, the rules one after the other.

    Two, as some methods take two kinds of steps by turns. A run that is too short for that has one of each, the
    outermost rules first: what lies between them can be interpolated.
    """
    if units - first < 3 * len(rules) - 1:
        turns = [rules[0], *rules[:0:-1], FULL]
    else:
        turns = [step for rule in rules for step in (rule, rule, FULL)]
    return [FULL] * first + [turns[i % len(turns)] for i in range(units - first)]


def _kinds(probe: Probe) -> dict[Does, float]:
    """Median seconds of the steps of each kind."""
    groups: dict[Does, list[float]] = {}
    for mode, ratio, seconds in probe["steps"]:
        groups.setdefault(FULL if mode == "full" else (mode, ratio), []).append(seconds)
    return {rule: float(np.median(some)) for rule, some in groups.items()}


def _own(one: Mapping[str, Any]) -> float:
    """What the dense call took beside its steps more than the unpatched one, as a share of that one."""
    whole, inside = one["unpatched"]["seconds"], one["unpatched"]["steps"]
    return float((_beside(one["dense"]) - (whole - inside)) / whole)


def _beside(probe: Probe) -> float:
    """Seconds of the call that are no step's."""
    return float(probe["seconds"] - sum(seconds for _, _, seconds in probe["steps"]))

"""The steps of a run as a policy sees them: by noise level. Which of them are computed in full, and what the others do.

A *unit* is a noise level that a run comes to. Second-order solvers come to each twice, so a run may have more steps
than units; a policy cannot tell steps of one unit apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ConfigError, UnsupportedError
from ..methods import MethodConfig, make_method
from ..runtime.store import Clock
from ..schedule.policy import Point, Policy

LEAST = 4  # units below which there is nothing to search

Does = tuple[str, float]  # mode and ratio of a step
FULL: Does = ("full", 0.0)


@dataclass(frozen=True)
class Steps:
    """Noise level of each step of a run.

    Raises:
        UnsupportedError: the levels are not known.
        ConfigError: they are too few.
    """

    us: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(math.isnan(u) for u in self.us):
            raise UnsupportedError(
                "the noise levels of this pipeline's steps are not known: a policy, a function of them, cannot be tuned"
            )
        if len(self.units) < LEAST:
            raise ConfigError(
                f"a run of {len(self.units)} noise levels has nothing to tune: {LEAST} are the least. Ask for more "
                "steps, as call={'num_inference_steps': 20}"
            )

    @cached_property
    def units(self) -> tuple[float, ...]:
        """The different levels, from noise to picture."""
        found: list[float] = []
        for u in sorted(self.us, reverse=True):
            if not found or found[-1] - u > 1e-6:
                found.append(u)
        return tuple(found)

    @cached_property
    def unit_of(self) -> tuple[int, ...]:
        """Of each step, the number of its unit."""
        units = np.array(self.units)
        return tuple(int(np.abs(units - u).argmin()) for u in self.us)

    def points(self, rules: Sequence[Does]) -> tuple[Point, ...]:
        """Points of the policy that has these rules, one a unit.

        A rule holds from half way to the unit before down to half way to the next, so that a run of another number of
        steps, whose levels lie between, spends the same share of its steps in full.
        """
        found: list[Point] = []
        for place, (mode, ratio) in enumerate(rules):
            u = 1.0 if place == 0 else round((self.units[place - 1] + self.units[place]) / 2, 6)
            if not found or found[-1][1:] != (ratio, mode):
                found.append((u, ratio, mode))
        return tuple(found)

    def schedule(self, full: Collection[int], rule: Does) -> tuple[Point, ...]:
        """Points of the policy that computes some units in full, and does the others by `rule`."""
        return self.points([FULL if unit in full else rule for unit in range(len(self.units))])


def planned(config: MethodConfig, policy: Policy, steps: Steps, kinds: Collection[str]) -> list[Does]:
    """What each step of a run will do, as far as no data decide: the method's own choice from what the policy asks.

    `kinds`: of the sites that the model has, see `Method.on`.
    """
    method = make_method(config).on(kinds)
    clock, total, found = Clock(), len(steps.us), list[Does]()
    for index, u in enumerate(steps.us):
        clock.arrive(index, u)
        mode, ratio = method.step(clock, index, total, *policy.at(u))
        clock.turn(index, mode)
        found.append(FULL if mode == "full" else (mode, ratio))
    return found


def place(
    units: int, count: int, weights: Sequence[float] | np.ndarray, first: int = 1, phase: float = 0.5
) -> tuple[int, ...]:
    """Which `count` of the units are computed in full: more of them where the weights are large.

    The first ones are; the others lie where equal parts of the summed weights begin, so that equal weights give equal
    gaps, as a fixed interval does.

    Args:
        units: how many there are.
        weights: positive, one a unit.
        first: units at the beginning that are full, as far as `count` goes.
        phase: where in its part a full unit lies, from 0 to 1.
    """
    full = list(range(min(first, count, units)))
    start, rest = len(full), min(count, units) - len(full)
    if rest <= 0:
        return tuple(full)
    sums = np.cumsum(np.asarray(weights[start:], dtype=np.float64))
    wanted = np.searchsorted(sums / sums[-1], (np.arange(rest) + min(max(phase, 0.0), 1.0)) / rest)
    taken: set[int] = set()
    for place in wanted.clip(0, units - start - 1).tolist():
        free = [unit for unit in range(units - start) if unit not in taken]
        taken.add(min(free, key=lambda unit: (abs(unit - place), unit)))
    return (*full, *(start + unit for unit in sorted(taken)))

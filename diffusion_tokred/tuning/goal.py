"""What is asked for: a speed, with the best pictures that it allows; or a quality, as fast as it can be had."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..evaluation.judges import Judges
from ..evaluation.statistics import capped_psnr

SLACK = 0.01  # share by which a composed speed may stay below the one asked for
MARGINS = {"psnr": 2.0}  # how far behind a candidate is given up, in the metric's unit; others: `_MARGIN` of the figure
_MARGIN = 0.25


@dataclass(frozen=True)
class Goal:
    """What candidates are judged by. Scores are higher for better pictures: PSNR, or minus LPIPS.

    Attributes:
        metric: "psnr", "lpips_alex" or "lpips_vgg".
        speed: that is asked for; or
        score: that pictures must have, in the mean.
        composed: the composed speed with which `speed` is thought to be reached; the same unless a timing has shown
            another.
    """

    metric: str
    speed: float | None = None
    score: float | None = None
    composed: float | None = None

    @property
    def least(self) -> float | None:
        """The composed speed to be reached; None if a quality is asked for."""
        speed = self.speed if self.composed is None else self.composed
        return None if speed is None else speed * (1 - SLACK)

    def fast(self, speed: float) -> bool:
        """Whether a composed speed is enough."""
        return self.least is None or speed >= self.least

    def met(self, speed: float, score: float) -> bool:
        """Whether a candidate is what was asked for."""
        return self.fast(speed) and (self.score is None or score >= self.score)

    def value(self, speed: float, score: float) -> float:
        """What is to be made as large as possible."""
        if self.least is not None:
            return score if self.fast(speed) else score - 1000 * (2 - speed / self.least)  # below all that is fast
        assert self.score is not None
        # Below 1, the speed of the unpatched pipeline, for what is not good enough.
        return speed if score >= self.score else 1 - (self.score - score) / max(abs(self.score), 1e-9)

    def aimed(self, composed: float) -> Goal:
        """With another composed speed."""
        return replace(self, composed=composed)

    def scores(self, figures: Sequence[Mapping[str, Any]]) -> list[float]:
        """Of pictures, from what `Bench.draw` returns."""
        if self.metric != "psnr":
            return [-one[self.metric] for one in figures]
        found = [math.inf if one["psnr"] is None else one["psnr"] for one in figures]
        values = 3 * figures[0]["size"][0] * figures[0]["size"][1] if figures else 1
        return [float(score) for score in capped_psnr(found, values) if score is not None]

    def figure(self, score: float) -> float:
        """The metric's own figure."""
        return score if self.metric == "psnr" else -score

    def behind(self, scores: Sequence[float], others: Sequence[float]) -> bool:
        """Whether the first pictures are so much worse than others' that the rest need not be drawn."""
        mine, theirs = (sum(some[: len(scores)]) / len(scores) for some in (scores, others))
        return mine < theirs - MARGINS.get(self.metric, _MARGIN * max(abs(theirs), 1e-3))

    @property
    def words(self) -> str:
        """In a few words."""
        if self.speed is not None:
            return f"{self.speed:g}x"
        assert self.score is not None
        sign = ">=" if self.metric == "psnr" else "<="
        return f"{self.metric} {sign} {self.figure(self.score):g}"


def goal_of(target_speedup: float | None, max_lpips: float | None, min_psnr: float | None, judges: Judges) -> Goal:
    """From the arguments of `tune`; a speed of 2 if there is none.

    Raises:
        ConfigError: more than one, one out of range, or LPIPS without the weights of its network.
    """
    given = {"target_speedup": target_speedup, "max_lpips": max_lpips, "min_psnr": min_psnr}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) > 1:
        raise ConfigError(f"one target at a time, found {' and '.join(asked)}")
    for name, value in asked.items():
        least = 1.0 if name == "target_speedup" else 0.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < math.inf:
            raise ConfigError(f"{name} is a number above {least:g}, found {value!r}")
    networks = judges.lpips
    if max_lpips is not None:
        if not networks:
            raise ConfigError(
                "max_lpips needs the weights of a network, which are not on this machine (`tokred doctor` says how to "
                "get them): ask for min_psnr instead, which needs none"
            )
        return Goal(networks[0].name, score=-float(max_lpips))
    if min_psnr is not None:
        return Goal("psnr", score=float(min_psnr))
    metric = networks[0].name if networks else "psnr"
    return Goal(metric, speed=2.0 if target_speedup is None else float(target_speedup))


@dataclass(frozen=True)
class Budget:
    """How much may be spent: evaluations (a candidate's pictures of the training prompts), or seconds of everything."""

    evaluations: int | None = None
    seconds: float | None = None

    @property
    def words(self) -> str:
        if self.evaluations is not None:
            return f"{self.evaluations} evaluations"
        return f"{self.seconds:g} seconds"


def budget_of(budget: int | str | None, usual: int) -> Budget:
    """A number of evaluations, or a time such as "90s", "10min" or "1.5h".

    Raises:
        ConfigError: it is neither.
    """
    if budget is None:
        return Budget(usual)
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1:
        return Budget(budget)
    found = re.fullmatch(r"\s*(?:(\d+)|(\d+(?:\.\d+)?)\s*(s|min|h))\s*", budget) if isinstance(budget, str) else None
    if found is None:
        raise ConfigError(f'budget is a number of evaluations, or a time as "90s", "10min" or "1h", found {budget!r}')
    if found[1]:
        return budget_of(int(found[1]), usual)
    seconds = float(found[2]) * {"s": 1, "min": 60, "h": 3600}[found[3]]
    if not seconds:
        raise ConfigError("a budget of no time finds nothing")
    return Budget(seconds=seconds)

"""Held-out prompts and the clock decide among the finalists of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..evaluation import statistics
from ..evaluation.variants import UNPATCHED, Variant
from ..measure.timing import Timing
from .bench import TRAIN
from .forms import Candidate
from .goal import Goal
from .search import Search
from .trials import Outcome, Trials

FINALISTS = 3  # of the guided search; the best constant setting and the random search's best come to them

Tell = Callable[[str, float], None]  # what is done, and the share of it that is


@dataclass(frozen=True)
class Entry:
    """A setting with all that was measured of it.

    Attributes:
        name: "tuned", "constant", "random" or "steps", with a number where there are several.
        words: the setting in a line.
        variant: for drawing and timing.
        candidate: None of the run with fewer steps.
        composed: speed.
        train: score on the training prompts.
        scores: of the held-out prompts; empty if they were not drawn.
        figures: of the held-out pictures, all metrics.
        speed: measured, as an interval; None if it was not.
    """

    name: str
    words: str
    variant: Variant
    candidate: Candidate | None
    composed: float
    train: float
    scores: tuple[float, ...] = ()
    figures: tuple[dict[str, Any], ...] = ()
    speed: dict[str, Any] | None = None

    @property
    def held(self) -> float:
        """Mean score of the held-out prompts; of the training prompts if these were not drawn."""
        return float(np.mean(self.scores)) if self.scores else self.train

    def to_dict(self, goal: Goal) -> dict[str, Any]:
        """As plain data. `paired`: distances to the unpatched pictures of the held-out prompts."""
        data: dict[str, Any] = self.variant.to_dict() | {"setting": self.words, "composed": self.composed}
        data |= {"name": self.name, "speedup": self.speed, "train": goal.figure(self.train), "paired": {}}
        if not self.figures:
            return data
        size = 3 * self.figures[0]["size"][0] * self.figures[0]["size"][1]
        for metric in ("psnr", "ssim", "lpips_alex", "lpips_vgg"):
            values = [one.get(metric) for one in self.figures]
            if metric == "psnr":
                equal = [float("inf") if value is None else value for value in values]
                data["paired"][metric] = statistics.paired_psnr(equal, size)
            elif any(value is not None for value in values):
                better = "higher" if metric == "ssim" else "lower"
                data["paired"][metric] = statistics.paired(values, better)
        return data


def entry(trials: Trials, outcome: Outcome, name: str) -> Entry:
    """Of an outcome of the search."""
    units, candidate = len(trials.steps.units), outcome.candidate
    variant = trials.variant(candidate, name)
    return Entry(name, candidate.words(units), variant, candidate, outcome.speed, outcome.score)


def entries(search: Search) -> list[Entry]:
    """What goes on to the held-out prompts, the best on the training prompts first; then the run with fewer steps."""
    trials, goal = search.trials, search.trials.goal
    first = trials.best()
    if first is None:
        return []
    constant = search.best_constant
    some = [one for one in trials.found.values() if one.whole and goal.met(one.speed, one.score)] or [first]
    some = sorted((one for one in some if one is not constant), key=lambda one: -goal.value(one.speed, one.score))
    found = [entry(trials, one, f"tuned-{i}") for i, one in enumerate(some[:FINALISTS], 1)]
    if constant is not None:
        found.append(entry(trials, constant, "constant"))
    if (random := search.random.best()) is not None:
        found.append(entry(trials, random, "random"))
    count = fewer_steps(trials, goal.least if goal.least is not None else first.speed)
    return [*found, of_steps(trials, count)]


def fewer_steps(trials: Trials, speed: float) -> int:
    """With how many steps the unpatched pipeline is as fast."""
    counts = range(len(trials.steps.units), 0, -1)
    return next((count for count in counts if trials.costs.fewer(count) >= speed), 1)


def of_steps(trials: Trials, count: int) -> Entry:
    """The unpatched pipeline with fewer steps, on the training prompts."""
    variant = Variant(f"steps-{count}", call={"num_inference_steps": count}, anchor="steps")
    score = float(np.mean(trials.goal.scores(trials.fewer(count, TRAIN))))
    return Entry(f"steps-{count}", f"{count} steps, unpatched", variant, None, trials.costs.fewer(count), score)


def held_out(trials: Trials, some: Sequence[Entry], tell: Tell) -> list[Entry]:
    """With the figures of the held-out prompts. Equal settings are drawn once."""
    found = []
    for place, one in enumerate(some):
        tell(f"held-out prompts, {one.name}", place / len(some))
        if one.candidate is None:
            figures = trials.fewer(one.variant.call["num_inference_steps"], "held out")
        else:
            figures = trials.held_out(one.candidate)
        found.append(replace(one, figures=tuple(figures), scores=tuple(trials.goal.scores(figures))))
    return found


def winner(goal: Goal, some: Sequence[Entry]) -> Entry:
    """The best on the held-out prompts, of those that are fast enough."""
    able = [one for one in some if one.candidate is not None]
    fast = [one for one in able if goal.fast(one.composed)] or able
    return max(fast, key=lambda one: goal.value(one.composed, one.held))


def of_both(second: Sequence[Entry], first: Sequence[Entry], least: float) -> tuple[list[Entry], Entry]:
    """The entries of two searches that were timed in one race, and the winner of all. `least`: the measured speed from
    which on one is fast enough. Of the best constant settings one is left, and of the random ones."""
    found = list(second)
    for one in first:
        place = next((i for i, other in enumerate(found) if other.name == one.name), None)
        if one.name.startswith("tuned"):
            found.insert(0, replace(one, name="tuned-0"))
        elif place is None:
            found.append(one)
        elif best_timed([found[place], one], least) is one:
            found[place] = one
    return found, best_timed(found, least)


def best_timed(some: Sequence[Entry], least: float) -> Entry:
    """By measured speeds: the best on the held-out prompts of those fast enough, or the fastest if none is."""
    able = [(one.speed["median"], one) for one in some if one.candidate is not None and one.speed is not None]
    fast = [one for speed, one in able if speed >= least]
    return max(fast, key=lambda one: one.held) if fast else max(able, key=lambda pair: pair[0])[1]


def race(trials: Trials, some: Sequence[Entry], rounds: int) -> tuple[list[Entry], Timing]:
    """With measured speeds: all settings in alternating rounds with the unpatched pipeline."""
    different: dict[str, Variant] = {}
    for one in some:
        made = replace(one.variant, name=f"v-{len(different)}")
        if _of(one, different) is None:
            different[made.name] = made
    seconds = trials.journal.do(
        f"race {rounds} " + " ".join(sorted(_key(variant) for variant in different.values())),
        lambda: _timed(trials.bench.race((Variant(UNPATCHED), *different.values()), rounds)),
    )
    timing = Timing({name: tuple(times) for name, times in seconds["seconds"].items()}, tuple(seconds["again"]))
    return [replace(one, speed=vars(timing.speedup(str(_of(one, different))))) for one in some], timing


def against(goal: Goal, one: Entry, other: Entry) -> dict[str, Any]:
    """How much better an entry's held-out pictures are than another's, prompt by prompt, in the metric's unit: a mean
    with its interval, of differences that are positive where the entry is better."""
    gaps = statistics.differences(one.scores, other.scores)
    found = statistics.mean(gaps).to_dict()
    low, high = found["low"], found["high"]
    verdict = "the same" if all(gap == 0 for gap in gaps) else "not decided"
    if low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    return found | {"against": other.name, "metric": goal.metric, "verdict": verdict, "p": statistics.sign_flip(gaps)}


def _timed(timing: Timing) -> dict[str, Any]:
    return {"seconds": {name: list(times) for name, times in timing.seconds.items()}, "again": list(timing.again)}


def _key(variant: Variant) -> str:
    data = variant.to_dict()
    return repr((data["reduction"], data["call"]))


def _of(one: Entry, different: dict[str, Variant]) -> str | None:
    """The name under which an equal setting is timed."""
    return next((name for name, variant in different.items() if _key(variant) == _key(one.variant)), None)

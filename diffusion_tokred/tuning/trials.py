"""Candidates tried on the training prompts: their scores, and the speed composed from what their steps did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation.variants import Variant
from .bench import HELD, TRAIN
from .costs import Costs
from .forms import Candidate
from .goal import Goal
from .journal import Journal
from .steps import FULL, Does, Steps, planned

RACE = 2  # pictures after which a candidate that is far behind is given up


@dataclass(frozen=True)
class Outcome:
    """A candidate and what became of it.

    Attributes:
        speed: composed.
        scores: of the training pictures that were drawn.
        score: their mean; of one that was given up, what it would have been if it had stayed as far behind.
        whole: all were drawn.
        given_up: it was too far behind.
    """

    candidate: Candidate
    speed: float
    scores: tuple[float, ...]
    score: float
    whole: bool
    given_up: bool = False


@dataclass
class Trials:
    """Tries candidates, and remembers.

    Attributes:
        bench: what draws; see `Bench`.
        train, held: how many prompts there are for the search, and to decide.
        kinds: of the model's sites.
        found: outcomes by key, in the order of their trial.
        pictures: how many were drawn, and counted.
    """

    bench: Any
    journal: Journal
    steps: Steps
    costs: Costs
    goal: Goal
    train: int
    held: int
    kinds: frozenset[str]
    found: dict[str, Outcome] = field(default_factory=dict)
    pictures: int = 0
    _speeds: dict[str, float] = field(default_factory=dict)
    _keys: dict[Candidate, str] = field(default_factory=dict)

    def key(self, candidate: Candidate) -> str:
        """The same for the same pictures."""
        if candidate not in self._keys:
            self._keys[candidate] = candidate.key(self.steps)
        return self._keys[candidate]

    def rules(self, candidate: Candidate) -> list[Does]:
        """What its steps are planned to do."""
        config = candidate.config(len(self.steps.us))
        return planned(config, candidate.policy(self.steps), self.steps, self.kinds)

    def speed(self, candidate: Candidate) -> float:
        """Composed, as planned."""
        key = self.key(candidate)
        if key not in self._speeds:
            self._speeds[key] = self.costs.speed(candidate.form.name, self.rules(candidate))
        return self._speeds[key]

    def full(self, candidate: Candidate) -> tuple[int, ...]:
        """The units that it is planned to compute in full."""
        rules = self.rules(candidate)
        return tuple(sorted({self.steps.unit_of[i] for i, rule in enumerate(rules) if rule == FULL}))

    def variant(self, candidate: Candidate, name: str = "candidate") -> Variant:
        """For drawing and timing."""
        return Variant(name, candidate.config(len(self.steps.us)), candidate.policy(self.steps))

    def draw(self, candidate: Candidate, part: str, place: int) -> dict[str, Any]:
        """Figures of one picture."""
        if part == TRAIN:
            self.pictures += 1
        return self._drawn(f"draw {part} {place} {self.key(candidate)}", self.variant(candidate), part, place)

    def _drawn(self, key: str, variant: Variant, part: str, place: int) -> dict[str, Any]:
        # The unpatched picture counts once, when it is drawn first; not when a resumed search draws it again.
        self.journal.do(f"unpatched {part} {place}", lambda: self.bench.unpatched(part, place) is not None)
        if key not in self.journal.known:
            self.bench.unpatched(part, place)
        return self.journal.do(key, lambda: self.bench.draw(variant, part, place))

    def fewer(self, steps: int, part: str) -> list[dict[str, Any]]:
        """Figures of the unpatched pipeline's pictures with fewer steps."""
        variant = Variant(f"steps-{steps}", call={"num_inference_steps": steps}, anchor="steps")
        places = range(self.train if part == TRAIN else self.held)
        return [self._drawn(f"draw {part} {place} steps {steps}", variant, part, place) for place in places]

    def held_out(self, candidate: Candidate) -> list[dict[str, Any]]:
        """Figures of its held-out pictures."""
        return [self.draw(candidate, HELD, place) for place in range(self.held)]

    def judge(self, candidate: Candidate, bar: Sequence[float] | None = None, pictures: int | None = None) -> Outcome:
        """Draw its training pictures, and remember.

        Args:
            bar: scores of pictures of the same prompts: what is far behind is given up.
            pictures: only so many, for what is not asked to be whole.
        """
        count = self.train if pictures is None else min(pictures, self.train)
        figures: list[dict[str, Any]] = []
        given_up = False
        for place in range(count):
            figures.append(self.draw(candidate, TRAIN, place))
            if bar is not None and RACE <= place + 1 < count and self.goal.behind(self.goal.scores(figures), bar):
                given_up = True
                break
        scores = self.goal.scores(figures)
        score = float(np.mean(scores))
        whole = len(scores) == self.train
        if not whole and bar is not None:
            score += float(np.mean(bar)) - float(np.mean(bar[: len(scores)]))
        times = [1 / self.costs.speed(candidate.form.name, _rules(one["modes"])) for one in figures if one["modes"]]
        speed = 1 / float(np.mean(times)) if times else self.speed(candidate)
        outcome = Outcome(candidate, speed, tuple(scores), score, whole, given_up)
        key = self.key(candidate)
        if key not in self.found or whole >= self.found[key].whole:
            self.found[key] = outcome
        return outcome

    @property
    def bar(self) -> Sequence[float] | None:
        """What a picture of each prompt is to keep up with: the best's, or the quality that is asked for."""
        if self.goal.score is not None:
            return [self.goal.score] * self.train
        best = self.best()
        return best.scores if best is not None and self.goal.fast(best.speed) else None

    def best(self, which: Callable[[Outcome], bool] = lambda outcome: True) -> Outcome | None:
        """The whole outcome of highest value, of those that meet the goal if any does."""
        some = [one for one in self.found.values() if one.whole and which(one)]
        some = [one for one in some if self.goal.met(one.speed, one.score)] or some
        return max(some, key=lambda one: self.goal.value(one.speed, one.score), default=None)


def _rules(modes: Sequence[Sequence[Any]]) -> list[Does]:
    return [FULL if mode == "full" else (mode, ratio) for mode, ratio in modes]

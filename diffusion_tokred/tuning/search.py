"""The search: constant settings, then schedules by an optimiser and by moves from the best; and random ones beside.

A schedule is given to the optimiser (optuna's TPE) as a few numbers: how much more full steps there are where a step
alone does harm (`sensitivity`), and earlier or later; so it finds good regions from few evaluations. From the best
schedule so far single full steps are moved, which finds what few numbers cannot say. The two take turns.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from . import constants
from .forms import Candidate, Form, bare
from .optimiser import Optimiser
from .steps import place
from .trials import Outcome, Trials

LIMITS = (0.5, 0.65, 0.8, 1.0)  # of the budget: until when each part of the search may begin another evaluation
SURVIVORS = 4  # forms that are searched after the constant settings have been compared
GROUPS = 3  # of blocks: the first, the middle, the last
SENSED = 2  # forms whose steps' sensitivity is measured
QUICK = 3  # rows of constant settings of a form that are searched where a quality is asked for
TURNS = 3  # of so many evaluations one is the optimiser's, the others are moves
MISSES = 100  # moves in turn that lead to what is known: then there is nothing more to try
LONGER = 10  # after so many of them moves are made of one more part


class Spent(Exception):
    """A part of the search has had its share of the budget."""


@dataclass
class Search:
    """A guided search, and a random one that may draw as many pictures.

    Attributes:
        trials, random: what each has tried.
        forms: that may be used.
        seed: of all that is drawn by lot.
        spent: which share of the budget is, given the number of training pictures so far.
        tell: called before each evaluation with what it is.
        harm: by form, of each unit: the score lost when it alone is not full; nan where that cannot be.
        levels: by level of attention: the score when only this one is reduced.
        blocks: by group of blocks, first to last: the score when only these are reduced.
    """

    trials: Trials
    random: Trials
    forms: Sequence[Form]
    seed: int
    spent: Callable[[int], float]
    tell: Callable[[str], None] = lambda what: None
    harm: dict[str, list[float]] = field(default_factory=dict)
    levels: dict[int, float] = field(default_factory=dict)
    blocks: dict[tuple[int, int], float] = field(default_factory=dict)
    evaluations: int = 0
    random_evaluations: int = 0
    limit: float = 1.0

    def run(self) -> None:
        """All of it, until the budget is spent or there is nothing more to try."""
        for part, limit in zip((self.compare_constants, self.sense, self.descend, self.refine), LIMITS, strict=True):
            self.limit = limit
            with contextlib.suppress(Spent):
                part()

    def check(self) -> None:
        """Raise `Spent` if this part of the search has had its share of the budget."""
        if self.evaluations and self.spent(self.trials.pictures) >= self.limit:
            raise Spent

    # --- a single evaluation ------------------------------------------------------------------------------------------

    def evaluate(
        self, candidate: Candidate, bar: Sequence[float] | None = None, pictures: int | None = None
    ) -> Outcome:
        """Try a candidate, unless it was. Then let the random search catch up.

        Raises:
            Spent: the budget does not allow it. One evaluation it always does.
        """
        known = self.trials.found.get(self.trials.key(candidate))
        if known is not None and (known.whole or (known.given_up and bar is not None)):
            return known
        self.check()
        self.tell(candidate.source or candidate.form.name)
        outcome = self.trials.judge(candidate, bar, pictures)
        self.evaluations += 1
        self.catch_up()
        return outcome

    @property
    def bar(self) -> Sequence[float] | None:
        """Scores to keep up with."""
        return self.trials.bar

    # --- the guided search --------------------------------------------------------------------------------------------

    def compare_constants(self) -> None:
        """Constant settings of all forms: those that just reach the speed, or the fastest that are good enough."""
        goal, steps = self.trials.goal, len(self.trials.steps.us)
        groups: list[list[Candidate]] = []
        for form in self.forms:
            found: list[Candidate] = []
            for row in constants.rows(form, steps):
                if goal.least is None:
                    if len(found) == QUICK:  # each takes several evaluations
                        break
                    some = constants.fastest(row, self._good)
                elif form.method == "firstblock":  # how fast it is, its pictures decide
                    some = constants.slowest(row, lambda c: goal.fast(self.evaluate(c, pictures=1).speed))
                else:
                    some = constants.slowest(row, lambda c: goal.fast(self.trials.speed(c)))
                if some is not None:
                    found.append(some)
            groups.append(constants.few(found))
        for turn in itertools.zip_longest(*groups):  # of each form the first, then of each the second
            for candidate in turn:
                if candidate is not None:
                    known = self.best_constant  # a first one is drawn whole, however far behind other settings it is
                    self.evaluate(candidate, self.bar if known is not None and goal.fast(known.speed) else None)
        best = self.best_constant
        if best is None:
            return
        for name, values in best.candidate.form.levers.items():  # and the options of the best one
            best = self.best_constant or best
            for value in values:
                options = dict(best.candidate.options) | {name: value}
                self.evaluate(best.candidate.moved(options=tuple(options.items())), self.bar)

    @property
    def best_constant(self) -> Outcome | None:
        """The best constant setting tried."""
        return self.trials.best(lambda one: one.candidate.full is None)

    @property
    def survivors(self) -> list[Form]:
        """Forms worth searching, the best first."""
        goal, best = self.trials.goal, dict[str, float]()
        for one in self.trials.found.values():
            name, value = one.candidate.form.name, goal.value(one.speed, one.score)
            best[name] = max(best.get(name, value), value)
        order = sorted(self.forms, key=lambda form: -best.get(form.name, -np.inf))
        return order[:SURVIVORS]

    def sense(self) -> None:
        """How much each step matters: the score when it alone is not computed in full, on the first prompt."""
        units = len(self.trials.steps.units)
        for form in self.survivors[:SENSED]:
            ratio = form.ratios[len(form.ratios) // 2] if form.ratios else 1.0
            losses = [np.nan] * units
            for unit in range(1 if form.caches else 0, units):
                self.check()
                self.tell(f"sensitivity {form.name}")
                alone = tuple(i for i in range(units) if i != unit)
                figures = self.trials.draw(Candidate(form, alone, ratio), "train", 0)
                if figures["modes"] and all(mode == "full" for mode, _ in figures["modes"]):
                    continue  # the method computes it in full whatever the policy says
                losses[unit] = -self.trials.goal.scores([figures])[0]
            self.harm[form.name] = losses
        self._sense_levels()
        self._sense_blocks()
        self.catch_up()

    def _sense_levels(self) -> None:
        whole = [form for form in self.forms if len(form.fixed.get("levels", ())) > 1]
        if not whole:
            return
        form = max(whole, key=lambda form: len(form.fixed["levels"]))
        for level in form.fixed["levels"]:
            self.tell("sensitivity of levels")
            one = Candidate(form, (), form.ratios[0], (("levels", (level,)),))
            self.levels[level] = self.trials.goal.scores([self.trials.draw(one, "train", 0)])[0]

    def _sense_blocks(self) -> None:
        """Of a method without memory, if one is searched: the others know one clock for all blocks of a level."""
        form, count = next((form for form in reversed(self.forms) if not form.caches), None), self.trials.bench.blocks
        if form is None or count < GROUPS:
            return
        ends = [round(i * count / GROUPS) for i in range(GROUPS + 1)]
        for first, end in itertools.pairwise(ends):
            self.check()
            self.tell("sensitivity of blocks")
            one = Candidate(form, (), form.ratios[0], blocks=(first, end - 1))
            with contextlib.suppress(UnsupportedError):  # none of the form's levels is there
                self.blocks[first, end - 1] = self.trials.goal.scores([self.trials.draw(one, "train", 0)])[0]

    def descend(self) -> None:
        """The best form with fewer and fewer full steps: where quality falls fastest shows there."""
        best = self.trials.best()
        if best is None:
            return
        units, form = len(self.trials.steps.units), best.candidate.form
        options = tuple(pair for pair in best.candidate.options if pair[0] in form.levers)
        for share in (0.75, 0.6, 0.4, 0.3, 0.2, 0.1):
            full = place(units, max(round(share * units), int(form.caches)), self.weights(form, 1.0, 0.0, 0.0))
            self.evaluate(Candidate(form, full, best.candidate.ratio, options, source="ladder"))

    def weights(self, form: Form, harm: float, tilt: float, bend: float) -> np.ndarray:
        """Of each unit, for `place`: by its sensitivity to the power of `harm`, and by its place in the run."""
        units = len(self.trials.steps.units)
        known = self.harm.get(form.name) or next(iter(self.harm.values()), [np.nan] * units)
        losses = np.array(known)
        spread = np.nanstd(losses) if np.isfinite(losses).sum() > 1 else 0.0
        z = np.nan_to_num((losses - np.nanmean(losses)) / spread) if spread > 0 else np.zeros(units)
        x = np.linspace(-1, 1, units)
        return np.exp((harm * z + tilt * x + bend * x**2).clip(-6, 6))

    def refine(self) -> None:
        """The optimiser and moves from the best, by turns."""
        forms = [form for form in self.survivors if self._reaches(form)]
        if not forms:
            return
        optimiser = Optimiser(self, forms)
        rng, misses, turn = np.random.default_rng([self.seed, 1]), 0, 0
        while misses < MISSES:
            if turn % TURNS == 0:
                optimiser.step()
                turn += 1
            candidate = self.move(rng, 1 + misses // LONGER)
            if candidate is None or self.trials.key(candidate) in self.trials.found:
                misses += 1
                continue
            self.evaluate(candidate, self.bar)
            misses, turn = 0, turn + 1

    def move(self, rng: np.random.Generator, parts: int = 1) -> Candidate | None:
        """A neighbour of the best, or now and then of the second best: so many things are changed."""
        goal = self.trials.goal
        order = sorted(
            (one for one in self.trials.found.values() if one.whole and not _adaptive(one.candidate)),
            key=lambda one: -goal.value(one.speed, one.score),
        )
        if not order:
            return None
        start = order[1 if len(order) > 1 and rng.random() < 0.3 else 0].candidate
        full = self.trials.full(start) if start.full is None else start.full
        options = tuple(sorted((name, value) for name, value in start.options if name in start.form.levers))
        moved = Candidate(start.form, full, start.ratio, options, source="moved")
        for _ in range(parts):
            moved = self._changed(moved, rng)
        return self.repaired(moved, rng)

    def _changed(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """With one lever, the ratio, or the place of one full step changed, by lot."""
        form, kind = candidate.form, rng.random()
        if kind < 0.25 and form.levers:
            name, options = str(rng.choice(sorted(form.levers))), dict(candidate.options)
            values = form.levers[name]
            options[name] = _beside(values, values.index(options.get(name, form.usual(name))), rng)
            return candidate.moved(options=tuple(sorted(options.items())))
        if kind < 0.4 and len(form.ratios) > 1:
            near = int(np.abs(np.array(form.ratios) - candidate.ratio).argmin())
            return candidate.moved(ratio=_beside(form.ratios, near, rng))
        first, units, full = int(form.caches), len(self.trials.steps.units), set(candidate.full or ())
        movable, others = (
            [unit for unit in range(first, units) if (unit in full) is wanted] for wanted in (True, False)
        )
        if movable:
            gone = int(rng.choice(movable))
            full.discard(gone)
            if others and not (kind < 0.5 and self.trials.goal.score is not None):  # where quality counts, fewer may do
                close = [unit for unit in others if abs(unit - gone) <= 2]
                full.add(int(rng.choice(close if close and rng.random() < 0.75 else others)))
        return candidate.moved(full=tuple(sorted(full)))

    def repaired(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """With full steps taken away until it is fast enough, or added while it stays so. Which, is drawn by lot."""
        goal, units = self.trials.goal, len(self.trials.steps.units)
        if goal.least is None:
            return candidate
        first = int(candidate.form.caches)
        full = set(candidate.full or ()) | set(range(first))
        candidate = candidate.moved(full=tuple(sorted(full)))
        while not goal.fast(self.trials.speed(candidate)) and len(full) > first:
            full.discard(int(rng.choice(sorted(full - set(range(first))))))
            candidate = candidate.moved(full=tuple(sorted(full)))
        while len(full) < units:
            added = int(rng.choice([unit for unit in range(units) if unit not in full]))
            more = candidate.moved(full=tuple(sorted(full | {added})))
            if not goal.fast(self.trials.speed(more)):
                break
            full.add(added)
            candidate = more
        return candidate

    def filled(self, candidate: Candidate, arrange: Callable[[int], tuple[int, ...]]) -> Candidate | None:
        """With as many full steps as the speed allows, arranged by their number."""
        for count in range(len(self.trials.steps.units), int(candidate.form.caches) - 1, -1):
            tried = candidate.moved(full=arrange(count))
            if self.trials.goal.fast(self.trials.speed(tried)):
                return tried
        return None

    def _reaches(self, form: Form) -> bool:
        return self.trials.goal.fast(self.trials.speed(bare(form)))

    def _good(self, candidate: Candidate) -> bool:
        one = self.evaluate(candidate, self.bar)
        return self.trials.goal.met(one.speed, one.score)

    # --- the random search --------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Random candidates, until as many pictures have been drawn for them. They are the same ones in every run."""
        forms = [form for form in self.forms if self._reaches(form)]
        while forms and self.random.pictures < self.trials.pictures:
            self.random_evaluations += 1
            rng = np.random.default_rng([self.seed, 2, self.random_evaluations])
            form = forms[int(rng.integers(len(forms)))]
            options = tuple((name, values[int(rng.integers(len(values)))]) for name, values in form.levers.items())
            ratio = form.ratios[int(rng.integers(len(form.ratios)))] if form.ratios else 1.0
            first, units = int(form.caches), len(self.trials.steps.units)
            order = [*range(first), *(rng.permutation(np.arange(first, units)).tolist())]

            def arrange(count: int, order: list[int] = order) -> tuple[int, ...]:
                return tuple(sorted(order[:count]))

            blank = Candidate(form, (), ratio, options, source="random")
            if self.trials.goal.least is None:
                filled: Candidate | None = blank.moved(full=arrange(int(rng.integers(first, units))))
            else:
                filled = self.filled(blank, arrange)
            if filled is not None:
                self.random.judge(filled, self.random.bar)


def _beside(values: Sequence[Any], place: int, rng: np.random.Generator) -> Any:
    """A neighbour of one of the values, by lot."""
    return values[int(np.clip(place + rng.choice((-1, 1)), 0, len(values) - 1))]


def _adaptive(candidate: Candidate) -> bool:
    """Whether the data decide which of its steps are full."""
    return candidate.full is None and candidate.form.method == "firstblock"

"""A tuning from its first measurement to the last: costs, search, held-out prompts, timing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import ConfigError, UnsupportedError
from . import deciding
from .costs import Costs, measured
from .deciding import Entry
from .forms import Form, bare, chosen
from .goal import Budget, Goal
from .journal import Journal
from .optimiser import library
from .progress import Tell
from .search import Search
from .steps import Steps
from .trials import Trials

LEAST = 1.02  # times as fast: below that nothing is gained
OFF = 0.03  # share by which a measured speed may stay below its target before the search aims higher
# Shares of the whole, for the bar: up to the end of each part.
_PARTS = {"costs": 0.08, "search": 0.75, "held": 0.93, "race": 1.0}


class Found:
    """What a run has come to, whole or interrupted."""

    def __init__(self, search: Search, budget: Budget, refused: Mapping[str, str]) -> None:
        self.search, self.budget, self.refused = search, budget, dict(refused)
        self.entries: list[Entry] = []
        self.winner: Entry | None = None
        self.noise: dict[str, Any] | None = None
        self.status = "interrupted"
        self.ceiling = 0.0
        self.aimed: list[float] = []
        self.curve: list[tuple[int, float, float]] = []  # fewer steps: their number, composed speed and score
        self.seconds = 0.0


def run(
    bench: Any,
    journal: Journal,
    goal: Goal,
    budget: Budget,
    counts: tuple[int, int],
    seed: int,
    methods: Sequence[str] | None,
    rounds: tuple[int, int],
    tell: Tell,
) -> Found:
    """Measure costs, search, decide. `bench`: as `Bench`; counts: of training and held-out prompts.

    Raises:
        KeyboardInterrupt: before anything was found; later, it ends the search.
    """

    def part(name: str) -> Any:
        names = list(_PARTS)
        low = _PARTS[names[names.index(name) - 1]] if names.index(name) else 0.0
        return lambda what, share: tell(what, low + (_PARTS[name] - low) * min(share, 1.0))

    steps = Steps(tuple(journal.do("noise", bench.noise)))
    forms, refused = bench.forms(len(steps.us))
    forms = chosen(forms, methods)
    costs = costs_of(bench, journal, steps, forms, rounds[0], part("costs"), refused) if forms else None
    forms = [form for form in forms if costs is not None and form.name in costs.forms]
    if costs is None or not forms:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise UnsupportedError(f"no method of those works on this pipeline: {reasons}")
    trials = Trials(bench, journal, steps, costs, goal, *counts, bench.kinds)
    ceilings = {form.name: trials.speed(bare(form)) for form in forms}
    ceiling = max(ceilings.values())
    if ceiling < LEAST:
        raise UnsupportedError(
            f"nothing pays here: the fastest setting of all, all steps but the first left out, is {ceiling:.2f}x "
            f"({max(ceilings, key=lambda name: ceilings[name])})"
        )
    if goal.least is not None and ceiling < goal.least:
        trials.goal = goal.aimed(ceiling)
    searched = part("search")
    search = Search(trials, replace(trials, found={}, pictures=0, _speeds=trials._speeds), forms, seed, lambda n: 0.0)
    found = Found(search, budget, refused)
    found.ceiling = ceiling

    def share(pictures: int) -> float:
        if budget.evaluations is not None:
            return pictures / (budget.evaluations * counts[0])
        assert budget.seconds is not None
        last = _last(costs, counts[1], rounds[1], trials.goal)
        return journal.spent / max(budget.seconds - last, 0.3 * budget.seconds)

    search.spent = share
    search.tell = lambda what: searched(what, share(trials.pictures))
    with quietly():
        try:
            search.run()
            decide(found, rounds[1], part("held"), part("race"))
            _aim_higher(found, rounds[1], part("held"), part("race"))
            found.status = "complete"
        except KeyboardInterrupt:
            if trials.best() is None:
                raise
            if not found.entries:
                with contextlib.suppress(KeyboardInterrupt):
                    found.entries = deciding.entries(search)
            if found.winner is None:
                if not found.entries:
                    best = trials.best()
                    assert best is not None
                    found.entries = [deciding.entry(trials, best, "tuned-1")]
                found.winner = deciding.winner(trials.goal, found.entries)
    found.seconds = journal.spent
    return found


def costs_of(
    bench: Any, journal: Journal, steps: Steps, forms: Sequence[Form], rounds: int, tell: Tell, refused: dict[str, str]
) -> Costs:
    """What the steps of all forms cost, from rounds. What does not run comes to `refused`."""
    lines: list[dict[str, Any]] = []
    total = (rounds + 1) * (len(forms) + 2)
    for number in range(-1, rounds):  # the first one warms up

        def said(what: str, place: int, number: int = number) -> str:
            tell(f"cost of {what}", ((number + 1) * (len(forms) + 2) + place) / total)
            return f"cost {number} {what}"

        one: dict[str, Any] = {"unpatched": journal.do(said("unpatched", 0), bench.time_unpatched)}
        one["dense"] = journal.do(said("dense", 1), lambda: bench.time_steps(None, steps))
        one["forms"] = {}
        for place, form in enumerate(forms):
            if form.name not in refused:
                probe = journal.do(said(form.name, 2 + place), partial(_probe, bench, form, steps))
                if "refused" in probe:
                    refused[form.name] = probe["refused"]
                else:
                    one["forms"][form.name] = probe
        lines.append(one)
    costs = measured(lines[1:])
    for form in forms:
        if form.name not in costs.forms:
            refused.setdefault(form.name, f"in a run of {len(steps.us)} steps it computes all of them in full")
    return costs


def _probe(bench: Any, form: Form, steps: Steps) -> Any:
    """Seconds, or why the form does not run after all: some things only a run shows."""
    try:
        return bench.time_steps(form, steps)
    except (ConfigError, UnsupportedError) as error:
        return {"refused": str(error)}


def decide(found: Found, rounds: int, held: Tell, raced: Tell) -> None:
    """Held-out prompts, then the clock. After a second search, what was timed after the first is timed once more, and
    measured speeds say which are fast enough."""
    trials = found.search.trials
    first = [one for one in found.entries if one.speed is not None and one.candidate is not None]
    found.curve = steps_curve(trials)
    some = deciding.entries(found.search)
    found.entries = some
    if not some:
        return
    found.entries = deciding.held_out(trials, some, held)
    found.winner = best = deciding.winner(trials.goal, found.entries)
    kept = [one for one in found.entries if one is best or not one.name.startswith("tuned")]
    raced("timing", 0.0)
    timed, timing = deciding.race(trials, [*kept, *first], rounds)
    by_name = {one.name: one for one in timed[: len(kept)]}
    found.entries = [by_name.get(one.name, one) for one in found.entries]
    found.winner = by_name[best.name]
    if first and trials.goal.speed is not None:
        least = trials.goal.speed * (1 - OFF)
        found.entries, found.winner = deciding.of_both(found.entries, timed[len(kept) :], least)
    found.noise = vars(timing.noise)
    raced("timing", 1.0)


def steps_curve(trials: Trials) -> list[tuple[int, float, float]]:
    """Fewer steps: quality against time, for some numbers of them."""
    units = len(trials.steps.units)
    counts = sorted({max(round(share * units), 1) for share in (0.85, 0.7, 0.5, 0.35, 0.2)}, reverse=True)
    found = [deciding.of_steps(trials, count) for count in counts]
    return [(count, one.composed, one.train) for count, one in zip(counts, found, strict=True)]


def _aim_higher(found: Found, rounds: int, held: Tell, raced: Tell) -> None:
    """Where the measured speed stays below what was asked for, search again with a composed speed that makes up."""
    trials, goal, best = found.search.trials, found.search.trials.goal, found.winner
    if goal.speed is None or best is None or best.speed is None:
        return
    measured_speed = best.speed["median"]
    wanted = goal.speed * best.composed / measured_speed
    if measured_speed >= goal.speed * (1 - OFF) or goal.composed is not None or wanted > found.ceiling:
        return
    found.aimed.append(wanted)
    trials.goal = found.search.random.goal = goal.aimed(wanted)
    spent, start = found.search.spent, found.search.spent(trials.pictures)
    found.search.spent = lambda pictures: (spent(pictures) - start) * 3  # a third of the budget again
    found.search.run()
    decide(found, rounds, held, raced)


def _last(costs: Costs, held: int, rounds: int, goal: Goal) -> float:
    """Seconds that held-out prompts and timing will take."""
    speed = goal.least or 2.0
    settings = deciding.FINALISTS + 3
    return costs.seconds * (held * (1 + settings / speed) + (rounds + 1) * (2 + 4 / speed))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without optuna's log."""
    logging = library().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)

"""Constant settings: what a user would try by hand. An interval, a warm-up, a ratio, the same at every noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..schedule.intervals import fixed_full_steps
from .forms import Candidate, Form

SOURCE = "constant"
INTERVALS = (2, 3, 4, 5, 6)  # of methods that compute some tokens between full steps
WARMUPS = (1, 3)
THRESHOLDS = tuple(round(0.01 * 1.25**i, 4) for i in range(24))  # to 1.7

Row = list[Candidate]  # from slow to fast


def rows(form: Form, steps: int) -> list[Row]:
    """The settings of a form, in rows from slow to fast.

    Where whole steps are left out, each number of full steps comes once in a row: with the shortest interval that gives
    it, and in the first row with the longest warm-up, in the second with the shortest. Where tokens are, a row has one
    interval and all ratios.
    """
    if form.method == "firstblock":
        return [[constant(form, threshold=t, interval=1000, warmup=min(3, steps)) for t in THRESHOLDS]]
    if not form.caches:
        return [[constant(form, ratio) for ratio in form.ratios]]
    if form.method == "cat":  # no full step after the warm-up
        ends = range(2, steps)
        return [[constant(form, ratio, warmup=w) for w in reversed(ends)] for ratio in form.ratios[1::2]]
    if form.ratios:
        pairs = [(i, w) for i in INTERVALS for w in WARMUPS if max(i, w) < steps]
        return [[constant(form, ratio, interval=i, warmup=w) for ratio in form.ratios] for i, w in pairs]
    whole = range(1, steps)
    found = []
    for warmups in (reversed(whole), whole):
        by_count: dict[int, Candidate] = {}
        order = list(warmups)
        for interval in range(2, steps + 1):
            for warmup in order:
                count = len(fixed_full_steps(steps, interval, warmup))
                by_count.setdefault(count, constant(form, interval=interval, warmup=warmup))
        found.append([by_count[count] for count in sorted(by_count, reverse=True)])
    return found


def constant(form: Form, ratio: float = 1.0, **options: float) -> Candidate:
    """A constant setting."""
    return Candidate(form, None, ratio, tuple(options.items()), source=SOURCE)


def fastest(row: Sequence[Candidate], good: Callable[[Candidate], bool]) -> Candidate | None:
    """The last of a row that is still good, by bisection; None if the first is not."""
    low, high = -1, len(row) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if good(row[middle]):
            low = middle
        else:
            high = middle - 1
    return row[low] if low >= 0 else None


def slowest(row: Sequence[Candidate], fast: Callable[[Candidate], bool]) -> Candidate | None:
    """The first of a row that is fast enough, by bisection; None if the last is not."""
    low, high = 0, len(row)
    while low < high:
        middle = (low + high) // 2
        if fast(row[middle]):
            high = middle
        else:
            low = middle + 1
    return row[low] if low < len(row) else None


def few(candidates: Sequence[Candidate], most: int = 3) -> list[Candidate]:
    """At most so many, spread over them."""
    places = {round(i * (len(candidates) - 1) / max(most - 1, 1)) for i in range(most)} if candidates else set()
    return [candidates[place] for place in sorted(places)]

"""Smooth shapes, a ratio for every noise level, as the step functions that a policy is made of.

Every count of tokens is a shape of its own for a compiled model and for its kernels, so a run has few: a shape becomes
the step function of at most `counts` ratios that is nearest to it, in the mean square over the noise levels. (These are
the optimal levels of scalar quantisation, found exactly, not by iterating.) Each ratio is the mean of the shape where
it holds, so that the mean ratio over the noise levels is the shape's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ConfigError
from .points import Point, number, point

COUNTS = 3  # of tokens that a run may have in packed and merged modes, those of dense steps apart
_CELLS = 600  # equal stretches of u in which a shape is looked at
_SHORT = 6  # of them: a ratio that holds for less than 0.01 of u is not worth a change


def linear(first: float, last: float) -> Callable[[float], float]:
    """From `first` at u = 1 straight to `last` at u = 0."""
    return lambda u: last + (first - last) * u


def cosine(first: float, last: float) -> Callable[[float], float]:
    """From `first` at u = 1 to `last` at u = 0 along half a cosine: slow at both ends."""
    return lambda u: last + (first - last) * (1 - math.cos(math.pi * u)) / 2


def through(points: Sequence[Sequence[float]]) -> Callable[[float], float]:
    """Straight from point `(u, ratio)` to point, given by descending u; constant beyond the first and the last.

    Raises:
        ConfigError: no points, wrong numbers, or another order.
    """
    pairs = [(u, ratio) for u, ratio, _ in map(point, points)]
    if not pairs or any(below[0] >= above[0] for above, below in itertools.pairwise(pairs)):
        raise ConfigError(f"a piecewise policy goes through points (u, ratio) by descending u, found {list(points)!r}")
    levels, ratios = zip(*reversed(pairs), strict=True)
    return lambda u: float(np.interp(u, levels, ratios))


def stepped(ratios: Sequence[float], at: Sequence[float] | None, mode: str) -> tuple[Point, ...]:
    """The points of ratios that follow each other at the noise levels `at`; None: over equal stretches."""
    if isinstance(ratios, (str, bytes)) or not isinstance(ratios, Sequence) or not ratios:
        raise ConfigError(f"a stepwise policy has a list of ratios, found {ratios!r}")
    starts = [1 - i / len(ratios) for i in range(1, len(ratios))] if at is None else list(at)
    if len(starts) != len(ratios) - 1:
        raise ConfigError(f"{len(ratios)} ratios change at {len(ratios) - 1} noise levels, found at={starts}")
    return tuple(
        (number("at", u), ratio, mode if ratio else "full") for u, ratio in zip([1.0, *starts], ratios, strict=True)
    )


def quantised(shape: Callable[[float], float], counts: int = COUNTS, mode: str = "reduce") -> tuple[Point, ...]:
    """The points of the step function of at most `counts` ratios that is nearest to a shape.

    Stretches where the shape is 0 stay in full, and are no count. A shape of few ratios is taken as it is, to 1/600 of
    u. Ratios are rounded to four digits, and stretches of less than 0.01 go with the next.

    Raises:
        ConfigError: `counts` below 1, or the shape gives something that is no ratio.
    """
    if isinstance(counts, bool) or not isinstance(counts, int) or counts < 1:
        raise ConfigError(f"counts is a number of ratios, 1 or more, found {counts!r}")
    tops = [1 - i / _CELLS for i in range(_CELLS)]
    values = np.array([point((u, shape(u - 0.5 / _CELLS), mode))[1] for u in tops])
    near = np.zeros(_CELLS)
    if (some := values[values > 0]).size:
        levels = _levels(np.sort(some), counts)
        near = levels[np.abs(values[:, None] - levels).argmin(1)].round(4) * (values > 0)
    runs = [(ratio, len(list(cells))) for ratio, cells in itertools.groupby(near.tolist())]
    points: list[Point] = []
    start = 0  # of the stretch, with the short ones before it
    place = 0
    for ratio, length in runs:
        place += length
        if length >= _SHORT:
            if not points or ratio != points[-1][1]:
                points.append((round(tops[start], 4), ratio, mode if ratio else "full"))
            start = place
    return tuple(points)


def _levels(values: np.ndarray, counts: int) -> np.ndarray:
    """At most `counts` numbers with the least sum of squared distances to sorted `values`: the means of stretches of
    them (Wang and Song, Ckmeans.1d.dp, 2011)."""
    distinct = np.unique(values.round(9))
    if len(distinct) <= counts:
        return distinct
    n = len(values)
    sums, squares = np.append(0.0, values.cumsum()), np.append(0.0, (values**2).cumsum())
    start, end = np.arange(n)[:, None], np.arange(1, n + 1)[None]
    length = np.maximum(end - start, 1)
    cost = squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / length  # of the stretch [start, end)
    cost[end <= start] = np.inf
    best, cuts = cost[0], []  # of the first `end` values in so many stretches; where the last one starts
    for _ in range(counts - 1):
        through = np.append(np.inf, best[:-1])[:, None] + cost
        cuts.append(through.argmin(0))
        best = through.min(0)
    bounds = [n]
    for cut in reversed(cuts):
        bounds.append(int(cut[bounds[-1] - 1]))
    bounds.append(0)
    return np.array([values[low:high].mean() for high, low in itertools.pairwise(bounds)])[::-1]

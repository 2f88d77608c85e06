"""Statistics as the textbooks write them: plain Python, loops, exact fractions where counting is meant.

BCa: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 14.3. Sign flips: Fisher's randomisation
test. Holm: Scand. J. Statist. 6 (1979).
"""

from fractions import Fraction
from itertools import product
from statistics import NormalDist


def mean_over_prompts(values, prompts):
    """The mean of the prompts' means, exactly."""
    groups = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(Fraction(value))
    means = [sum(group) / len(group) for group in groups.values()]
    return sum(means) / len(means)


def quantile(values, q):
    """Linear between order statistics: position q (n - 1)."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = min(int(place), len(ordered) - 2)
    return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])


def bca(data, resamples, level=0.95):
    """Interval of the mean. `resamples`: for each, the indices that were drawn."""
    n, normal = len(data), NormalDist()
    estimate = sum(data) / n
    means = [sum(data[i] for i in drawn) / n for drawn in resamples]
    z0 = normal.inv_cdf(sum(m < estimate for m in means) / len(means))
    without = [sum(data[j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
    middle = sum(without) / n
    top = sum((middle - w) ** 3 for w in without)
    bottom = 6 * sum((middle - w) ** 2 for w in without) ** 1.5
    a = top / bottom
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = normal.inv_cdf(tail)
        ends.append(quantile(means, normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))
    return tuple(ends)


def sign_flip(differences):
    """Share of all patterns of signs whose sum is at least as far from 0, counted exactly, in decimals as printed."""
    exact = [Fraction(repr(d)) for d in differences]
    seen = abs(sum(exact))
    patterns = list(product((1, -1), repeat=len(exact)))
    return sum(abs(sum(s * d for s, d in zip(signs, exact, strict=True))) >= seen for signs in patterns) / len(patterns)


def win_rate(values, others, better):
    wins = 0.0
    for a, b in zip(values, others, strict=True):
        if a == b:
            wins += 0.5
        elif (a > b) == (better == "higher"):
            wins += 1
    return wins / len(values)


def worst(values, better):
    """Mean of the worst values: as few as make 5 % or more of them."""
    ordered = sorted(values, reverse=better == "lower")
    count = 0
    while Fraction(count, len(values)) < Fraction(5, 100):
        count += 1
    return sum(ordered[:count]) / count


def holm(ps):
    """Step down: the k-th smallest of m is multiplied by m - k + 1, never below one before it, never above 1."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted = [None] * len(ps)
    for rank, i in enumerate(order):
        adjusted[i] = max(min(1.0, (len(ps) - k) * ps[order[k]]) for k in range(rank + 1))
    return adjusted

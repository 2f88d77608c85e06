"""What many pictures say together: means with intervals, tests, the worst cases, a verdict. NumPy alone.

The unit is the prompt. Pictures of one prompt from several seeds are not independent, so they are averaged first: each
prompt weighs the same, and what is resampled (or has its sign flipped) are prompts, with all their pictures. With one
picture a prompt nothing changes. Everything is repeatable: the same values give the same figures.

A None among the values is a picture without that figure: it is left out and counted as `missing`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

from ..errors import ConfigError

LEVEL = 0.95
RESAMPLES = 10_000
BEYOND = 50  # resamples that lie beyond each end of an interval, at least: an end that few decide is not repeatable
EXACT = 16  # prompts up to which all sign flips are enumerated: 65,536
FEW = 20  # prompts below which an interval is marked, and no verdict is given; see docs/how-to-measure.md
WORST = 20  # the worst one in 20: 5 %
BETTER = ("higher", "lower")

Key = TypeVar("Key", bound=Hashable)
Values = Sequence["float | None"]
_DRAWS = 2_000_000  # numbers drawn at a time, to bound memory
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Mean:
    """Mean over prompts with its 95 % interval: of `n` pictures of `prompts` prompts, `missing` more had no figure.

    `note` says what the interval is worth where that is less than its name. Without an interval, low and high are nan.
    """

    mean: float
    low: float
    high: float
    n: int
    prompts: int
    missing: int = 0
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data; what does not exist is nan, with the reason under `why_null`."""
        data: dict[str, Any] = {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}
        data["prompts"] = self.prompts
        if self.missing:
            data["missing"] = self.missing
        if self.note:
            data["note"] = self.note
        lost = [key for key in ("mean", "low", "high") if math.isnan(data[key])]
        return data | ({"why_null": dict.fromkeys(lost, self.note)} if lost else {})


def mean(values: Values, prompts: Sequence[Hashable] | None = None, level: float = LEVEL) -> Mean:
    """Mean over prompts with its BCa bootstrap interval (Efron 1987; 10,000 resamples of the prompts, more above 99 %).

    Args:
        values: a figure a picture.
        prompts: the prompt of each value, whatever tells prompts apart; by default every value has its own.
        level: of the interval.

    The bootstrap sees only the values there are. Equal values give an interval without width, one prompt gives none,
    and with few prompts it is too narrow; `note` then says so.

    Raises:
        ConfigError: a value is not finite, or lengths differ.
    """
    kept, labels = _kept(values, prompts)
    missing, data = len(values) - len(kept), _by_prompt(kept, labels)
    n = len(data)
    if not n:
        return Mean(math.nan, math.nan, math.nan, 0, 0, missing, "no picture has this figure")
    middle = float(data.mean())
    if n == 1:
        return Mean(middle, math.nan, math.nan, len(kept), 1, missing, "one prompt: no interval")
    if _constant(data):
        note = f"all {n} prompts have the same value: the bootstrap cannot tell how far others would be"
        return Mean(middle, middle, middle, len(kept), n, missing, note)
    low, high = bca(data, _resampled(data, max(RESAMPLES, round(2 * BEYOND / (1 - level)))), level)
    few = f"{n} prompts: an interval from fewer than {FEW} is too narrow" if n < FEW else None
    return Mean(middle, low, high, len(kept), n, missing, few)


def bca(data: np.ndarray, means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Ends of the BCa interval of a mean, from the means of the bootstrap's resamples.

    Bias correction and acceleration move the two quantiles where the plain bootstrap takes (1 ± level) / 2: to the
    right for data with a long right tail. Ties with the mean count half.
    """
    off = data - data.mean()
    tied = np.abs(means - data.mean()) <= 1e-12 * np.abs(data).max()
    below = float(np.mean((means < data.mean()) & ~tied) + tied.mean() / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    skew = float((off**3).sum() / (6 * (off**2).sum() ** 1.5))  # from the jackknife, which for a mean is this
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        moved = bias + _NORMAL.inv_cdf(tail)
        ends.append(_NORMAL.cdf(bias + moved / (1 - skew * moved)))
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def sign_flip(differences: Values, prompts: Sequence[Hashable] | None = None) -> float:
    """Two-sided p-value of the paired permutation test (Fisher 1935) that differences are symmetric around 0.

    Each prompt's difference may as well have had the other sign. p is the share of all sign patterns whose mean is at
    least as far from 0 as the one seen: all 2^n of them up to 16 prompts, else 10,000 random ones and the one seen. So
    p is never 0, and with n prompts never below 2 / 2^n: four prompts cannot show anything at 5 %. nan without values.
    """
    data = _by_prompt(*_kept(differences, prompts))
    n = len(data)
    if not n:
        return math.nan
    seen = abs(data.sum()) * (1 - 1e-12)  # a pattern whose sum differs by rounding alone counts
    if n <= EXACT:
        patterns = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(patterns @ data) >= seen))
    rng, reached = np.random.default_rng(0), 0
    for rows in _chunks(RESAMPLES, n):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (rows, n), dtype=np.int8)
        reached += int(np.sum(np.abs(signs @ data) >= seen))
    return (reached + 1) / (RESAMPLES + 1)


def win_rate(differences: Values, better: str, prompts: Sequence[Hashable] | None = None) -> float:
    """How often a variant's figure is the better one: differences are variant minus unpatched, ties count half."""
    kept, labels = _kept(differences, prompts)
    wins = np.sign(kept) * _sign(better) / 2 + 0.5
    return float(_by_prompt(wins, labels).mean()) if len(kept) else math.nan


def worst(values: Values, better: str) -> float:
    """Mean of the worst 5 % of the pictures, rounded up to whole ones, so of one at least. Infinities may be there."""
    kept = np.sort(np.array([v for v in values if v is not None], dtype=np.float64) * _sign(better))
    return float(kept[: -(-len(kept) // WORST)].mean() * _sign(better)) if len(kept) else math.nan


def holm(ps: Mapping[Key, float | None]) -> dict[Key, float]:
    """Holm's (1979) adjusted p-values of a family of tests: below 0.05, a finding holds among all of them.

    The chance of one false finding or more is then at most 5 %, however the tests depend on each other. A None or nan
    is no test: it is left out.
    """
    tests = sorted((p, i, key) for i, (key, p) in enumerate(ps.items()) if p is not None and not math.isnan(p))
    adjusted, reached = {}, 0.0
    for rank, (p, _, key) in enumerate(tests):
        reached = max(reached, min(1.0, (len(tests) - rank) * p))
        adjusted[key] = reached
    return {key: adjusted[key] for key in ps if key in adjusted}


def capped_psnr(values: Values, values_per_picture: int) -> list[float | None]:
    """PSNRs (dB) in which equal pictures, whose PSNR is infinite, get the largest finite one there is.

    That is the PSNR of two 8-bit pictures which differ in one of their `values_per_picture` (3·height·width) numbers by
    one step of 255: 20·log10(255) + 10·log10(values_per_picture), 95.05 dB at 128×128. The alternatives mislead: the
    mean of the finite ones leaves out the best pairs, so a variant that changes fewer pictures can look worse; pooling
    the squared errors before the logarithm is another quantity, ruled by the worst pair. A mean with capped pairs is a
    lower bound of it, depends on the size of the pictures, and so always stands beside the number of equal pairs.
    """
    cap = 20 * math.log10(255) + 10 * math.log10(values_per_picture)
    return [cap if v == math.inf else v for v in values]


def paired(values: Values, better: str, prompts: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """A result file's entry for distances to the unpatched pictures: mean, interval, the worst 5 %."""
    return mean(values, prompts).to_dict() | {"worst5": worst(values, better), "better": better}


def paired_psnr(values: Values, values_per_picture: int, prompts: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """`paired` of PSNRs in which equal pictures are inf: counted under `identical`, and capped, see `capped_psnr`.

    If all pictures are equal there is no finite figure: mean, interval and worst5 are nan.
    """
    identical = sum(v == math.inf for v in values)
    entry = paired(capped_psnr(values, values_per_picture), "higher", prompts) | {"identical": identical}
    if identical and identical == entry["n"]:
        lost = ("mean", "low", "high", "worst5")
        return entry | dict.fromkeys(lost, math.nan) | {"why_null": dict.fromkeys(lost, "all pictures are equal")}
    return entry


def score(values: Values, better: str, prompts: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """A result file's entry for figures of single pictures, such as a CLIP score."""
    return mean(values, prompts).to_dict() | {"better": better}


def change(values: Values, unpatched: Values, better: str, prompts: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """A result file's entry for the change of such figures: this variant's minus the unpatched one's, pair by pair."""
    gaps = differences(values, unpatched)
    entry = mean(gaps, prompts).to_dict()
    return entry | {"p": sign_flip(gaps, prompts), "win_rate": win_rate(gaps, better, prompts), "better": better}


def differences(values: Values, others: Values) -> list[float | None]:
    """values - others, None where either is. Raises ConfigError if they are not pairs."""
    if len(values) != len(others):
        raise ConfigError(f"differences need pairs of values, found {len(values)} and {len(others)}")
    return [None if a is None or b is None else a - b for a, b in zip(values, others, strict=True)]


def verdict(
    values: Values,
    control: Values,
    *,
    margin: float,
    better: str,
    against: str,
    prompts: Sequence[Hashable] | None = None,
    family: int = 1,
) -> dict[str, Any]:
    """Is a variant no worse than a control, by more than a margin? A non-inferiority test, by the interval.

    Passed only if the interval of the mean difference to the control lies wholly on the better side of `margin`; from
    too few prompts never. Not passed does not mean worse: it was not shown.

    Args:
        values: figures of the variant, picture by picture: scores, or distances to the unpatched pictures.
        control: the same figures of what it is held against: a run of fewer steps, or (for scores) the unpatched run.
        margin: by how much the variant may be worse, in the metric's unit, 0 or more. It must be chosen before the
            figures are seen: that is what makes the answer mean anything.
        better: "higher" or "lower" figures.
        against: the control's name.
        family: how many verdicts are given together: those of all metrics and of all variants that are held against the
            control. The interval's level is then 1 - 0.05 / family (Bonferroni).

    Returns:
        margin, against, level, statement (a sentence), passed, and the difference with its interval, in the metric's
        unit.

    Raises:
        ConfigError: a margin that is negative or not a number; no pairs.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ConfigError(f"a margin says how much worse is still as good: a number >= 0, got {margin}")
    if family < 1:
        raise ConfigError(f"a family has at least one verdict, got {family}")
    level = 1 - (1 - LEVEL) / family
    gap = mean(differences(values, control), prompts, level)
    near = gap.low if better == "higher" else -gap.high  # the end of the interval on the worse side
    worse = f"{margin:g} or more worse than {against}" if margin else f"worse than {against}"
    passed = gap.prompts >= FEW and near > -margin
    found = f"difference {gap.mean:+.4g} [{gap.low:+.4g}, {gap.high:+.4g}] over {gap.prompts} prompts"
    if gap.prompts < FEW:
        statement = f"not decided: {gap.prompts} prompts are too few, {FEW} are needed"
    elif passed:
        statement = f"not {worse}: {found}"
    else:
        statement = f"not shown, it may be {worse}: {found}"
    return {
        "margin": float(margin),
        "against": against,
        "level": level,
        "statement": statement,
        "passed": passed,
        "difference": gap.to_dict() | {"better": better},
    }


def _sign(better: str) -> int:
    if better not in BETTER:
        raise ConfigError(f"better is one of {', '.join(BETTER)}, got {better!r}")
    return 1 if better == "higher" else -1


def _kept(values: Values, prompts: Sequence[Hashable] | None) -> tuple[np.ndarray, list[Hashable]]:
    """The values that are there, with the prompts they belong to."""
    labels: Sequence[Hashable] = range(len(values)) if prompts is None else prompts
    if len(labels) != len(values):
        raise ConfigError(f"each value needs its prompt, found {len(values)} values and {len(labels)} prompts")
    pairs = [(float(v), label) for v, label in zip(values, labels, strict=True) if v is not None]
    kept = np.array([v for v, _ in pairs], dtype=np.float64)
    if not np.isfinite(kept).all():
        raise ConfigError("a mean needs finite values: give None where there is none, and `capped_psnr` equal pictures")
    return kept, [label for _, label in pairs]


def _by_prompt(values: np.ndarray, labels: Sequence[Hashable]) -> np.ndarray:
    """Mean value of each prompt, in the order of their first appearance."""
    places: dict[Hashable, int] = {}
    at = np.array([places.setdefault(label, len(places)) for label in labels], dtype=np.int64)
    return np.bincount(at, values, len(places)) / np.maximum(np.bincount(at, minlength=len(places)), 1)


def _constant(data: np.ndarray) -> bool:
    return bool(np.ptp(data) <= 1e-12 * np.abs(data).max())


def _resampled(data: np.ndarray, count: int = RESAMPLES) -> np.ndarray:
    """Means of `count` resamples with replacement, the same every time."""
    rng = np.random.default_rng(0)
    return np.concatenate(
        [data[rng.integers(0, len(data), (rows, len(data)))].mean(1) for rows in _chunks(count, len(data))]
    )


def _chunks(rows: int, width: int) -> Iterator[int]:
    """How many rows at a time, `rows` in all."""
    most = max(1, _DRAWS // width)
    for start in range(0, rows, most):
        yield min(most, rows - start)

"""How far apart two sets of pictures are: FID and KID, on the features of any extractor.

FID: Heusel et al., arXiv 1706.08500. It is biased upwards when pictures are few, by an amount that depends on the model
(Chong and Forsyth, arXiv 1911.07023), so it is printed with n, and compares only at equal n. KID: Binkowski et al.,
arXiv 1801.01401, here over all pairs of pictures instead of random subsets: unbiased, and the same on every call.

Sets whose features were made differently are refused: such figures do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigError
from . import inception
from .features import Statistics, comparable, moments

CHEAP = 256  # features up to which FID is resampled unless told otherwise
RESAMPLES = 100
Z = 1.959964  # standard errors in half a 95 % interval


@dataclass(frozen=True)
class Distance:
    """A figure between two sets, with all that it depends on; `low` and `high` bound 95 %, `why_null` tells of nan."""

    value: float
    low: float
    high: float
    n: int
    n_reference: int | None
    reference: str
    extractor: str
    weights_sha256: str | None
    resize: str | None
    label: str
    better: Literal["higher", "lower"] = "lower"
    why_null: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def key(metric: str, extractor: str) -> str:
    """The name of "fid" or "kid" on an extractor's features: plain for Inception's, else "toy_fid" or "clip_fid"."""
    if extractor == inception.NAME:
        return metric
    return f"{'toy' if extractor.startswith('toy') else 'clip'}_{metric}"


def fid(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of the two normal distributions, by torchmetrics.

    Raises `ConfigError` if the two do not compare.
    """
    comparable(a, b)
    return _frechet(a.mu, a.sigma, b.mu, b.sigma)


def kid(a: Statistics, b: Statistics, paired: bool = False) -> float:
    """Squared maximum mean discrepancy, kernel `(x·y / d + 1)³`: the unbiased U-statistic over all pairs of pictures.

    Args:
        paired: picture i of both sets comes from the same prompt and noise. Then they are not independent, and pairs
            (i, i) are left out of the cross term too (Gretton et al., JMLR 13, 2012, eq. 4); otherwise it would come
            out too small.

    Raises:
        ConfigError: statistics without features, or that do not compare.
    """
    comparable(a, b)
    return _mmd(_features(a), _features(b), paired, [])[0]


def distances(
    generated: Statistics,
    reference: Statistics,
    *,
    paired: bool = False,
    prompts: Sequence[int] | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Distance]:
    """FID and KID of generated pictures to a reference, each under its `key`, with 95 % intervals over prompts.

    FID: 1.96 standard deviations over bootstrap resamples of the prompts, around the value; its bias is not in it. KID:
    1.96 standard errors of the jackknife, which leaves out one prompt at a time.

    Args:
        paired: the reference is the unpatched pipeline's, from the same prompts and noise: both are resampled together.
        prompts: which prompt each picture is of, as a number: those of one prompt are kept together. None: all differ.
        resamples: of the bootstrap. None: 100 up to 256 features, none above, where each takes seconds.

    Raises:
        ConfigError: the two do not compare, or are not pairs.
    """
    _may_be_compared(generated, reference, resamples)
    if paired:
        _pairs(generated, reference)
    found = {}
    for name, estimate in _estimates(generated, reference, paired, prompts, resamples, seed).items():
        found[key(name, generated.extractor)] = _distance(name, estimate, generated, reference)
    return found


def changes(
    generated: Statistics,
    unpatched: Statistics,
    reference: Statistics,
    *,
    prompts: Sequence[int] | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Distance]:
    """What a reduction adds to FID and KID to a reference: `{"fid_change": ...}`, above 0 where it is further away.

    `generated` and `unpatched` come from the same prompts and noise and are resampled together, so that the interval is
    that of the difference; FID's bias cancels in part. Arguments and errors as in `distances`.
    """
    _may_be_compared(generated, reference, resamples)
    _may_be_compared(unpatched, reference, resamples)
    _pairs(generated, unpatched)
    before = _estimates(unpatched, reference, False, prompts, resamples, seed)
    found = {}
    for name, estimate in _estimates(generated, reference, False, prompts, resamples, seed).items():
        change = _distance(name, estimate.minus(before[name]), generated, reference, " change")
        found[f"{key(name, generated.extractor)}_change"] = change
    return found


@dataclass(frozen=True)
class _Estimate:
    """A value with its repetitions: resampled, or with one prompt left out; and why `value` or `low` is missing."""

    value: float
    repetitions: torch.Tensor
    jackknife: bool
    why: dict[str, str]

    def minus(self, other: _Estimate) -> _Estimate:
        both = self.repetitions - other.repetitions  # of the same draws
        return _Estimate(self.value - other.value, both, self.jackknife, self.why | other.why)

    @property
    def error(self) -> float:
        count = len(self.repetitions)
        if count < 2:
            return math.nan
        squares = (self.repetitions - self.repetitions.mean()).square().sum().item()
        return math.sqrt(squares * (count - 1) / count if self.jackknife else squares / (count - 1))


class _Given(nn.Module):
    """For torchmetrics, where an extractor is expected: the features are given already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _frechet(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    # One process measures: a metric that waited for the others of the run would wait for ever.
    metric = FrechetInceptionDistance(feature=_Given(len(mu1)), sync_on_compute=False)
    metric.update(torch.zeros(0, len(mu1), dtype=torch.float64), real=True)  # no pictures: sets the result's dtype
    # It turns sums back into mean and covariance; two pictures are enough to give any.
    for side, mu, sigma in (("real", mu1, sigma1), ("fake", mu2, sigma2)):
        setattr(metric, f"{side}_features_sum", 2 * mu)
        setattr(metric, f"{side}_features_cov_sum", sigma + 2 * torch.outer(mu, mu))
        setattr(metric, f"{side}_features_num_samples", torch.tensor(2))
    return metric.compute().item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _own(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The kernel of row i with row i."""
    return ((x * y).sum(1) / x.shape[1] + 1) ** 3


def _sums(x: torch.Tensor, y: torch.Tensor, block: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column sums of the kernel matrix, which is never held whole."""
    rows, columns = [], torch.zeros(len(y), dtype=torch.float64)
    for part in x.split(block):
        values = _kernel(part, y)
        rows.append(values.sum(1))
        columns += values.sum(0)
    return torch.cat(rows), columns


def _mmd(x: torch.Tensor, y: torch.Tensor, paired: bool, groups: Sequence[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """KID, and KID without each of the groups: rows of x, and of y too if they are pairs."""
    n, m = len(x), len(y)
    in_x, in_y = (_sums(z, z)[0] - _own(z, z) for z in (x, y))
    across, across_y = _sums(x, y)
    if paired:
        across, across_y = across - _own(x, y), across_y - _own(x, y)

    def value(sum_x: torch.Tensor, sum_y: torch.Tensor, sum_xy: torch.Tensor, n: int, m: int) -> torch.Tensor:
        return sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * sum_xy / (n * (n - 1) if paired else n * m)

    def inside(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _kernel(a, b).sum() - _own(a, b).sum()

    left = []
    for rows in groups:
        count, part_x = n - len(rows), x[rows]
        # Sums by row and by column both count the pairs inside the group, so these are added once.
        sum_x, sum_y = in_x.sum() - 2 * in_x[rows].sum() + inside(part_x, part_x), in_y.sum()
        sum_xy = across.sum() - across[rows].sum()
        if paired:
            part_y = y[rows]
            sum_y = sum_y - 2 * in_y[rows].sum() + inside(part_y, part_y)
            sum_xy = sum_xy - across_y[rows].sum() + inside(part_x, part_y)
        left.append(value(sum_x, sum_y, sum_xy, count, count if paired else m))
    whole = value(in_x.sum(), in_y.sum(), across.sum(), n, m)
    return whole.item(), torch.stack(left) if left else torch.zeros(0, dtype=torch.float64)


def _estimates(
    generated: Statistics,
    reference: Statistics,
    paired: bool,
    prompts: Sequence[int] | None,
    resamples: int | None,
    seed: int,
) -> dict[str, _Estimate]:
    """ "fid" and "kid", with as many repetitions as can be had."""
    nothing = torch.zeros(0, dtype=torch.float64)
    distance = fid(generated, reference)
    if generated.features is None:
        why = {"low": f"intervals need the features of every picture, {generated.source} has none"}
        missing = {"value": f"KID needs the features of every picture, {generated.source} has none"}
        return {"fid": _Estimate(distance, nothing, False, why), "kid": _Estimate(math.nan, nothing, True, missing)}

    groups = _groups(prompts, len(generated.features))
    few = {"low": "an interval over prompts needs two prompts or more, and two pictures without any one of them"}
    enough = len(groups) > 1 and len(generated.features) - max(map(len, groups)) > 1
    repetitions, why = nothing, {}
    if resamples is None and len(generated.mu) > CHEAP:
        why = {"low": f"not resampled: {len(generated.mu)} features take seconds each time; ask for resamples"}
    elif not enough:
        why = few
    else:
        count = RESAMPLES if resamples is None else resamples
        repetitions = _resampled(generated, reference, paired, groups, count, seed)
    found = {"fid": _Estimate(distance, repetitions, False, why)}

    if reference.features is None:
        why = {"value": f"KID needs the features of every picture, {reference.source} has none"}
        return found | {"kid": _Estimate(math.nan, nothing, True, why)}
    value, left = _mmd(_features(generated), _features(reference), paired, groups if enough else [])
    return found | {"kid": _Estimate(value, left, True, {} if enough else few)}


def _resampled(
    generated: Statistics,
    reference: Statistics,
    paired: bool,
    groups: Sequence[torch.Tensor],
    resamples: int,
    seed: int,
) -> torch.Tensor:
    """FID of each resample of the prompts; the same seed draws the same prompts."""
    x, draws, found = _features(generated), torch.Generator().manual_seed(seed), []
    y = _features(reference) if paired else None
    for _ in range(resamples):
        drawn = torch.randint(len(groups), (len(groups),), generator=draws)
        rows = torch.cat([groups[i] for i in drawn.tolist()])
        there = (reference.mu, reference.sigma) if y is None else moments(y[rows])
        found.append(_frechet(*moments(x[rows]), *there))
    return torch.tensor(found, dtype=torch.float64)


def _distance(
    metric: str, estimate: _Estimate, generated: Statistics, reference: Statistics, change: str = ""
) -> Distance:
    half, why = Z * estimate.error, dict(estimate.why)
    low, high = estimate.value - half, estimate.value + half
    if metric == "fid" and not change and low < 0:
        low = 0.0
    if not math.isfinite(half):
        why["low"] = why["high"] = why.get("low", why.get("value", "fewer than two resamples were asked for"))
    label = _label(metric, generated, reference, change)
    made = (generated.extractor, generated.weights_sha256, generated.resize)
    n = generated.n
    assert n is not None
    return Distance(estimate.value, low, high, n, reference.n, reference.source, *made, label, why_null=why)


def _label(metric: str, generated: Statistics, reference: Statistics, change: str) -> str:
    """Such as "toy FID on toy-clip, n=64 (relative only: n < 128 features)"."""
    kind = key(metric, generated.extractor).removesuffix(metric).removesuffix("_")
    notes = []
    for words, n in (("n", generated.n), ("the reference's n", reference.n)):
        if metric == "fid" and n is not None and n < len(generated.mu):
            notes.append(f"relative only: {words} < {len(generated.mu)} features")
            break
    if reference.resize is None and generated.resize is not None:
        notes.append("how the reference was resized is not known")
    name = f"{kind} {metric.upper()}".strip() + change
    return f"{name} on {generated.extractor}, n={generated.n}" + (f" ({'; '.join(notes)})" if notes else "")


def _groups(prompts: Sequence[int] | None, n: int) -> list[torch.Tensor]:
    """The rows of each prompt."""
    if prompts is None:
        return list(torch.arange(n).split(1))
    if len(prompts) != n:
        raise ConfigError(f"{len(prompts)} prompt numbers for {n} pictures; give one a picture")
    numbers = torch.as_tensor(list(prompts))
    return [(numbers == number).nonzero()[:, 0] for number in numbers.unique()]


def _features(statistics: Statistics) -> torch.Tensor:
    if statistics.features is None:
        raise ConfigError(
            f"{statistics.source}: KID needs the features of every picture; mean and covariance are there"
        )
    return statistics.features.double()


def _may_be_compared(generated: Statistics, reference: Statistics, resamples: int | None) -> None:
    comparable(generated, reference)
    if generated.n is None:
        raise ConfigError(f"{generated.source} does not say of how many pictures it is; give the pictures themselves")
    if resamples is not None and resamples < 0:
        raise ConfigError(f"resamples is 0 or more, got {resamples}")


def _pairs(a: Statistics, b: Statistics) -> None:
    if a.features is None or b.features is None or len(a.features) != len(b.features):
        raise ConfigError(
            f"{a.source} ({a.n} pictures) and {b.source} ({b.n}) are not pairs: features of as many pictures are needed"
        )

"""Times of variants side by side: alternating rounds, ratios within a round, and the noise shown.

One measurement tells little on a machine that heats up and serves others. So a round times every variant once and the
first one twice, at both ends of the round; every other round runs backwards (ABBA); ratios are taken within a round,
where slow drift cancels; and the first variant against itself says what is noise.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """A median with the 95 % bootstrap interval of it, from `n` rounds."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Variant:
    """What is timed: `run`, inside a context made by `state` (a patch put on and taken off), which is not timed."""

    run: Callable[[], Any]
    state: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Timing:
    """Seconds of each variant, one entry a round. `again`: the baseline (the first variant) timed a second time."""

    seconds: dict[str, tuple[float, ...]]
    again: tuple[float, ...]

    @property
    def baseline(self) -> str:
        """The first variant."""
        return next(iter(self.seconds))

    def median(self, name: str) -> float:
        """Median seconds of a variant."""
        return float(np.median(self._of(name)))

    def quartiles(self, name: str) -> tuple[float, float]:
        """25 and 75 % quantiles of a variant's seconds."""
        low, high = np.quantile(self._of(name), (0.25, 0.75))
        return float(low), float(high)

    def ratio(self, one: str, other: str) -> Interval:
        """Median over rounds of (seconds of `one`) / (seconds of `other`): how many times `other` is faster.

        The baseline counts with the mean of its two times, which stand at both ends of a round.
        """
        return median_interval(self._paired(one) / self._paired(other))

    def speedup(self, name: str) -> Interval:
        """How many times a variant is faster than the baseline."""
        return self.ratio(self.baseline, name)

    @property
    def noise(self) -> Interval:
        """The baseline against itself (A/A): a difference inside this interval is noise."""
        return median_interval(self._of(self.baseline) / np.asarray(self.again))

    def _paired(self, name: str) -> np.ndarray:
        return (self._of(name) + np.asarray(self.again)) / 2 if name == self.baseline else self._of(name)

    def _of(self, name: str) -> np.ndarray:
        return np.asarray(self.seconds[name])


def paired(
    variants: Mapping[str, Callable[[], Any] | Variant],
    rounds: int = 10,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Timing:
    """Time variants in alternating rounds, on the wall clock, waiting for the device before and after each.

    Args:
        variants: by name; the first is the baseline.
        rounds: how many times each variant is timed (the baseline twice as often).
        warmup: untimed calls of each variant before.
        device: where the work runs.
        progress: called after each call with how many are done, and of how many.

    Raises:
        ConfigError: no variants, or no rounds.
    """
    if not variants or rounds < 1 or warmup < 0:
        raise ConfigError(f"timing needs variants and at least one round, got {len(variants)} and {rounds}")
    device = torch.device(device)
    runs = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
    order = [*runs.items(), (None, next(iter(runs.values())))]  # None: the baseline again
    seconds: dict[str | None, list[float]] = {name: [] for name, _ in order}
    total, done = warmup * len(runs) + rounds * len(order), 0

    def call(variant: Variant) -> float:
        nonlocal done
        with variant.state(), _no_collection():
            synchronize(device)
            start = time.perf_counter()
            variant.run()
            synchronize(device)
            took = time.perf_counter() - start
        done += 1
        if progress is not None:
            progress(done, total)
        return took

    for variant in runs.values():
        for _ in range(warmup):
            call(variant)
    for index in range(rounds):
        for name, variant in order if index % 2 == 0 else reversed(order):
            seconds[name].append(call(variant))
    again = tuple(seconds.pop(None))
    return Timing({str(name): tuple(times) for name, times in seconds.items()}, again)


def median_interval(values: Sequence[float] | np.ndarray, resamples: int = 10_000) -> Interval:
    """Median of values with its 95 % percentile-bootstrap interval; the resampling is the same every time."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (resamples, len(data)))
    low, high = np.quantile(np.median(data[drawn], axis=1), (0.025, 0.975))
    return Interval(float(np.median(data)), float(low), float(high), len(data))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def _no_collection() -> Any:
    """Without Python's garbage collector, which would run at some variant's cost."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

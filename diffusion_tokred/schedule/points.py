"""Points of a policy, `(u, ratio, mode)`: what is allowed, and what holds at a noise level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError

MODES = ("full", "reduce", "reuse", "forecast", "skip")

Point = tuple[float, float, str]  # u, ratio, mode


def checked(points: Any) -> tuple[Point, ...]:
    """A list of `(u, ratio[, mode])`, normalised. Raises ConfigError for what cannot be right."""
    if isinstance(points, (str, bytes, Mapping)) or not isinstance(points, Sequence):
        raise ConfigError(f"points must be a list of (u, ratio, mode), found {points!r}")
    found = tuple(point(p) for p in points)
    for above, below in itertools.pairwise(found):
        if not below[0] < above[0]:
            raise ConfigError(
                f"points must be sorted by descending u, without repeats: found {below[0]:g} after {above[0]:g}"
            )
    return found


def holds(points: Sequence[Point], u: float) -> tuple[str, float]:
    """`(mode, ratio)` at a noise level: the last point's that is not below it; full above the first."""
    mode, ratio = "full", 0.0
    for start, point_ratio, point_mode in points:
        if u > start:
            break
        mode, ratio = point_mode, point_ratio
    return mode, ratio


def is_constant(points: Sequence[Point]) -> bool:
    """Whether the same holds at every noise level."""
    rules = {(mode, ratio) for _, ratio, mode in points}
    return rules <= {("full", 0.0)} or (len(rules) == 1 and points[0][0] == 1.0)


def point(value: Any) -> Point:
    """Check and normalise one `(u, ratio[, mode])`."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) not in (2, 3):
        raise ConfigError(f"a point is (u, ratio, mode), found {value!r}")
    u = number("u", value[0])
    ratio = number("ratio", value[1])
    mode = value[2] if len(value) == 3 else ("reduce" if ratio else "full")
    if mode not in MODES:
        raise ConfigError(f"mode is one of {', '.join(MODES)}, found {mode!r}")
    if not 0 <= u <= 1:
        raise ConfigError(f"u is a noise level in [0, 1] (1 = noise), found {u:g}")
    if not (0 <= ratio < 1 or (ratio == 1 and mode in ("reuse", "forecast", "skip"))):
        allowed = "[0, 1]" if mode in ("reuse", "forecast", "skip") else "[0, 1)"
        raise ConfigError(f"ratio is the share of tokens not computed, in {allowed} for mode {mode!r}, found {ratio:g}")
    if mode == "full" and ratio:
        raise ConfigError(f"mode 'full' computes all tokens: its ratio is 0, found {ratio:g}")
    return (u, ratio, mode) if ratio else (u, 0.0, "full")


def number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, found {value!r}")
    return float(value)

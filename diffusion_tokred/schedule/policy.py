"""What to leave out, as a function of the noise level: piecewise constant in `u`, saved as versioned JSON."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ..errors import ConfigError, UnsupportedError

MODES = ("full", "reduce", "reuse", "forecast", "skip")
VERSION = 1

Point = tuple[float, float, str]  # u, ratio, mode
_META = ("method", "model", "scheduler", "measured")


@dataclass(frozen=True)
class Policy:
    """A ratio and a mode for every noise level.

    `points` are `(u, ratio, mode)`, sorted by descending `u` (the order in which a run meets them). A point holds
    from its own `u` *inclusive* down to the next point's; above the first point everything is computed. So, for a run
    from u = 1 to 0,

        Policy(points=[(0.9, 0.5, "reduce"), (0.3, 0.0, "full")])

    computes all tokens while u > 0.9, half of them for 0.9 >= u > 0.3, and all of them again from 0.3 on.

    `ratio` is the share of tokens *not* computed (a paper's keep ratio is `1 - ratio`), in [0, 1); 1 is allowed for
    "reuse", "forecast" and "skip", which may leave out a whole step. Ratio 0 and mode "full" mean the same and are
    written as ("full", 0).

    `method`, `model`, `scheduler` and `measured` say what the policy was made for (any JSON); they change nothing.

    Raises:
        ConfigError: points that are not sorted, numbers out of range or not finite, unknown modes.
    """

    points: tuple[Point, ...] = ()
    method: Any = field(default=None, hash=False)
    model: Any = field(default=None, hash=False)
    scheduler: Any = field(default=None, hash=False)
    measured: Any = field(default=None, hash=False)
    function: Callable[[float], Any] | None = (
        None  # instead of points: u -> ratio, or u -> (ratio, mode); cannot be saved
    )

    def __post_init__(self) -> None:
        if self.function is not None and self.points:
            raise ConfigError("a policy has points or a function, not both")
        if isinstance(self.points, (str, bytes, Mapping)) or not isinstance(self.points, Sequence):
            raise ConfigError(f"points must be a list of (u, ratio, mode), found {self.points!r}")
        points = tuple(_point(p) for p in self.points)
        for above, below in itertools.pairwise(points):
            if not below[0] < above[0]:
                raise ConfigError(
                    f"points must be sorted by descending u, without repeats: found {below[0]:g} after {above[0]:g}"
                )
        object.__setattr__(self, "points", points)

    @classmethod
    def constant(cls, ratio: float, mode: str = "reduce") -> Policy:
        """The same ratio and mode at every noise level."""
        return cls(points=((1.0, ratio, mode),))

    @property
    def is_constant(self) -> bool:
        """Whether `at` is the same for every `u`, so that the noise level need not be known."""
        rules = {(mode, ratio) for _, ratio, mode in self.points}
        return self.function is None and (rules <= {("full", 0.0)} or (len(rules) == 1 and self.points[0][0] == 1.0))

    @property
    def is_dense(self) -> bool:
        """Whether everything is computed at every noise level."""
        return self.function is None and all(mode == "full" for _, _, mode in self.points)

    def at(self, u: float, level: int = 0, kind: str = "attention", block: int = 0) -> tuple[str, float]:
        """`(mode, ratio)` at noise level `u`, for a site (version 1 has the same rule for all sites).

        Raises:
            UnsupportedError: `u` is nan, that is unknown, and the policy is not constant.
            ConfigError: a function returned something that is no ratio.
        """
        if math.isnan(u):
            if not self.is_constant:
                raise UnsupportedError(
                    "this policy depends on the noise level, which is unknown here: the denoiser was called outside of"
                    " a denoising loop, or its scheduler has no table of noise levels; use a constant ratio"
                )
            u = 1.0
        if self.function is not None:
            value = self.function(u)
            rule = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            _, ratio, mode = _point((u, *rule))
            return mode, ratio
        mode, ratio = "full", 0.0
        for start, point_ratio, point_mode in self.points:
            if u > start:
                break
            mode, ratio = point_mode, point_ratio
        return mode, ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Raises ConfigError for a policy made of a function."""
        if self.function is not None:
            raise ConfigError("a policy made of a function cannot be saved: give its points, (u, ratio, mode)")
        head: dict[str, Any] = {"_type": "Policy", "_version": VERSION, "points": [list(p) for p in self.points]}
        return head | {key: getattr(self, key) for key in _META if getattr(self, key) is not None}

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """The inverse of `to_dict`. Raises ConfigError saying what was found and what is allowed."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a policy is a JSON object, found {type(data).__name__}")
        if data.get("_type") != "Policy":
            raise ConfigError(f"not a policy: _type is {data.get('_type')!r}, must be 'Policy'")
        version = data.get("_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ConfigError(f"_version of a policy is a whole number from 1 on, found {version!r}")
        if version > VERSION:
            raise ConfigError(
                f"the policy has version {version}, this release reads up to {VERSION}: update diffusion-tokred"
            )
        if unknown := sorted(set(data) - {"_type", "_version", "points", *_META}):
            raise ConfigError(f"unknown keys in a policy: {', '.join(unknown)}; allowed are points, {', '.join(_META)}")
        if "points" not in data:
            raise ConfigError("the policy has no points: a list of [u, ratio, mode]")
        return cls(**{key: value for key, value in data.items() if key in ("points", *_META)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically: the file is the old one or the new one, never half of it."""
        try:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the policy cannot be written as JSON: {error}") from error
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read what `save` wrote. Raises ConfigError that names the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the policy {os.fspath(path)}: {error}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{os.fspath(path)} is not JSON: {error}") from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from error


@overload
def as_policy(value: None) -> None: ...
@overload
def as_policy(value: Policy | float | Sequence[Sequence[Any]] | Callable[[float], Any]) -> Policy: ...
def as_policy(value: Any) -> Policy | None:
    """What users hand in as `policy=`: None (stays None: the method's own ratio), a ratio, a Policy, a list of `(u,
    ratio[, mode])` points, or a function `u -> ratio` or `u -> (ratio, mode)`. Raises ConfigError for anything else.
    """
    if value is None or isinstance(value, Policy):
        return value
    if isinstance(value, (int, float)):
        return Policy.constant(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return Policy(points=tuple(value))
    if callable(value):
        return Policy(function=value)
    raise ConfigError(
        "a policy is a ratio, a Policy, a list of (u, ratio, mode) points or a function of u,"
        f" found {type(value).__name__}"
        + ("; read a file with Policy.load(path)" if isinstance(value, (str, os.PathLike)) else "")
    )


def _point(point: Any) -> Point:
    """Check and normalise one `(u, ratio[, mode])`."""
    if isinstance(point, (str, bytes)) or not isinstance(point, Sequence) or len(point) not in (2, 3):
        raise ConfigError(f"a point is (u, ratio, mode), found {point!r}")
    u = _number("u", point[0])
    ratio = _number("ratio", point[1])
    mode = point[2] if len(point) == 3 else ("reduce" if ratio else "full")
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


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, found {value!r}")
    return float(value)

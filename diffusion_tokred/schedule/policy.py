"""What to leave out, as a function of the noise level: piecewise constant in `u`, saved as versioned JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ..errors import ConfigError, UnsupportedError
from . import hub, shapes, stamp
from .points import MODES, Point, checked, holds, is_constant, point
from .rules import Rule, as_rule
from .shapes import COUNTS

__all__ = ["MODES", "Policy", "Rule", "as_policy"]

VERSION = 2  # 1: without rules and library
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

    `rules` say what holds at some sites instead: see `Rule`; plain dicts will do. *The first that matches a site wins*,
    so put the narrow ones first; where none matches, `points` hold.

    `method` (a config's `to_dict()`), `model`, `scheduler`, `measured` and `library` say what the policy was made for:
    `for_pipe` fills them in. `patch` takes the method from there if it is not told one, and refuses another method or
    another model. Anything else in them is a remark, and changes nothing.

    Raises:
        ConfigError: points that are not sorted, numbers out of range or not finite, unknown modes, wrong rules.
    """

    points: tuple[Point, ...] = ()
    method: Any = field(default=None, hash=False)
    model: Any = field(default=None, hash=False)
    scheduler: Any = field(default=None, hash=False)
    measured: Any = field(default=None, hash=False)
    function: Callable[[float], Any] | None = (
        None  # instead of points: u -> ratio, or u -> (ratio, mode); cannot be saved
    )
    rules: tuple[Rule, ...] = ()
    library: str | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.function is not None and self.points:
            raise ConfigError("a policy has points or a function, not both")
        object.__setattr__(self, "points", checked(self.points))
        if isinstance(self.rules, (str, bytes, Mapping)) or not isinstance(self.rules, Sequence):
            raise ConfigError(f"rules must be a list such as [{{'level': 1, 'points': ...}}], found {self.rules!r}")
        object.__setattr__(self, "rules", tuple(map(as_rule, self.rules)))

    # --- shapes --------------------------------------------------------------------------------------------------

    @classmethod
    def constant(cls, ratio: float, mode: str = "reduce") -> Policy:
        """The same ratio and mode at every noise level."""
        return cls(points=((1.0, ratio, mode),))

    @classmethod
    def stepwise(cls, ratios: Sequence[float], at: Sequence[float] | None = None, mode: str = "reduce") -> Policy:
        """Ratios one after the other, from pure noise on.

        `stepwise([0.6, 0.3, 0], at=[0.7, 0.2])` is 0.6 down to u = 0.7, then 0.3, and from 0.2 on everything is
        computed. Without `at` each holds over an equal stretch of u.
        """
        return cls(points=shapes.stepped(ratios, at, mode))

    @classmethod
    def linear(cls, first: float, last: float = 0.0, mode: str = "reduce", counts: int = COUNTS) -> Policy:
        """From the ratio `first` at u = 1 straight to `last` at u = 0, in at most `counts` steps: see `shaped`."""
        return cls.shaped(shapes.linear(first, last), mode, counts)

    @classmethod
    def cosine(cls, first: float, last: float = 0.0, mode: str = "reduce", counts: int = COUNTS) -> Policy:
        """From the ratio `first` at u = 1 to `last` at u = 0 along half a cosine, in at most `counts` steps."""
        return cls.shaped(shapes.cosine(first, last), mode, counts)

    @classmethod
    def piecewise(cls, points: Sequence[Sequence[float]], mode: str = "reduce", counts: int = COUNTS) -> Policy:
        """Straight from point `(u, ratio)` to point, in at most `counts` steps; constant beyond the ends.

        Points are given by descending u, as everywhere.
        """
        return cls.shaped(shapes.through(points), mode, counts)

    @classmethod
    def shaped(cls, shape: Callable[[float], float], mode: str = "reduce", counts: int = COUNTS) -> Policy:
        """The step function of at most `counts` ratios that is nearest to a shape u -> ratio, in the mean square over
        u. Each ratio is the shape's mean where it holds.

        Three is what methods that merge or pack tokens may have in a run, beside 0; where the shape is 0, everything is
        computed. Methods that run as published (`mode="faithful"`) take as many as you like.

        Raises:
            ConfigError: the shape gives something that is no ratio.
        """
        return cls(points=shapes.quantised(shape, counts, mode))

    # --- what holds ----------------------------------------------------------------------------------------------

    @property
    def is_constant(self) -> bool:
        """Whether `at` is the same for every `u`, so that the noise level need not be known."""
        return self.function is None and all(map(is_constant, self._lists))

    @property
    def is_dense(self) -> bool:
        """Whether everything is computed at every noise level."""
        return self.function is None and all(mode == "full" for points in self._lists for _, _, mode in points)

    @property
    def _lists(self) -> list[tuple[Point, ...]]:
        return [self.points, *(rule.points for rule in self.rules)]

    def rule(self, level: int, kind: str, block: int) -> Rule | None:
        """The rule for a site: the first that matches. None: the policy's own points hold."""
        return next((rule for rule in self.rules if rule.matches(level, kind, block)), None)

    def at(self, u: float, level: int = 0, kind: str = "attention", block: int = 0) -> tuple[str, float]:
        """`(mode, ratio)` at noise level `u`, for a site.

        Raises:
            UnsupportedError: `u` is nan, that is unknown, and what holds at this site is not constant.
            ConfigError: a function returned something that is no ratio.
        """
        rule = self.rule(level, kind, block) if self.rules else None
        points = self.points if rule is None else rule.points
        function = self.function if rule is None else None
        if math.isnan(u):
            if function is not None or not is_constant(points):
                raise UnsupportedError(
                    "this policy depends on the noise level, which is unknown here: the denoiser was called outside of"
                    " a denoising loop, or its scheduler has no table of noise levels; use a constant ratio"
                )
            u = 1.0
        if function is not None:
            value = function(u)
            given = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            _, ratio, mode = point((u, *given))
            return mode, ratio
        return holds(points, u)

    def everywhere(self, u: float) -> list[tuple[str, float]]:
        """`(mode, ratio)` at a noise level: of the policy's own points, then of each rule."""
        own = dataclasses.replace(self, rules=()).at(u) if self.function is not None else holds(self.points, u)
        return [own, *(holds(rule.points, u) for rule in self.rules)]

    def asked(self, level: int = 0, kind: str = "attention", block: int = 0) -> dict[float, tuple[str, float]]:
        """`(mode, ratio)` of a site by the noise levels at which they begin to hold, from 1 down; a function's, at
        each hundredth."""
        rule = self.rule(level, kind, block)
        if rule is None and self.function is not None:
            return {i / 100: self.at(i / 100) for i in range(100, -1, -1)}
        points = self.points if rule is None else rule.points
        return {u: holds(points, u) for u in (1.0, *(u for u, _, _ in points))}

    # --- what it was made for ------------------------------------------------------------------------------------

    def for_pipe(self, pipe: Any, method: Any = None, measured: Any = None) -> Policy:
        """A copy that says what it is for: the pipeline's model and scheduler, and this release of the library.

        Args:
            pipe: a pipeline, or a denoiser.
            method: the config it is for, or its `to_dict()`; default: what it says already.
            measured: what was measured, plain JSON; default: what it says already.

        Raises:
            ConfigError: there is no denoiser in it.
        """
        parts = [getattr(pipe, name, None) for name in stamp.PARTS]
        found = [part for part in (*parts, pipe) if hasattr(part, "forward") and not isinstance(part, type)]
        if not found:
            raise ConfigError(f"{type(pipe).__name__} is neither a pipeline with a denoiser nor a denoiser")
        return dataclasses.replace(
            self,
            method=(method.to_dict() if hasattr(method, "to_dict") else method) or self.method,
            model=stamp.model_of(getattr(part, "_orig_mod", part) for part in found),
            scheduler=stamp.scheduler_of(getattr(pipe, "scheduler", None)) or self.scheduler,
            measured=measured or self.measured,
            library=stamp.library(),
        )

    def without_model(self) -> Policy:
        """A copy that any model may take."""
        return dataclasses.replace(self, model=None)

    def without_method(self) -> Policy:
        """A copy that any method may take."""
        return dataclasses.replace(self, method=None)

    # --- files ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; version 1 where it has neither rules nor `library`. Raises ConfigError for a policy made
        of a function."""
        if self.function is not None:
            raise ConfigError(
                "a policy made of a function cannot be saved: give its points, (u, ratio, mode), or Policy.shaped("
                "function), the nearest step function"
            )
        newer: dict[str, Any] = {}
        if self.rules:
            newer["rules"] = [rule.to_dict() for rule in self.rules]
        if self.library is not None:
            newer["library"] = self.library
        head: dict[str, Any] = {
            "_type": "Policy",
            "_version": 2 if newer else 1,
            "points": list(map(list, self.points)),
        }
        return head | newer | {key: getattr(self, key) for key in _META if getattr(self, key) is not None}

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
        known = ("points", *(("rules", "library") if version > 1 else ()), *_META)
        if unknown := sorted(set(data) - {"_type", "_version", *known}):
            raise ConfigError(f"unknown keys in a policy: {', '.join(unknown)}; allowed are {', '.join(known)}")
        if "points" not in data:
            raise ConfigError("the policy has no points: a list of [u, ratio, mode]")
        if not isinstance(data.get("library"), (str, type(None))):
            raise ConfigError(f"library of a policy is a name and a version, found {data['library']!r}")
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_json(self) -> str:
        """As `save` writes it. Raises ConfigError for what is no JSON."""
        try:
            return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the policy cannot be written as JSON: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically: the file is the old one or the new one, never half of it."""
        text = self.to_json()
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
        return cls._read(Path(path), os.fspath(path))

    def push_to_hub(
        self, repo_id: str, filename: str = hub.FILENAME, *, commit_message: str | None = None,
        private: bool | None = None, token: str | bool | None = None, create_pr: bool = False,
        revision: str | None = None,
    ) -> str:  # fmt: skip
        """Write the policy to a repository of the Hugging Face hub, as one JSON file.

        Args:
            repo_id: "user/name"; made if it is not there.
            filename: in the repository, which may hold many.
            commit_message, private, token, create_pr: as in diffusers' `push_to_hub`.
            revision: branch to write to; default: main.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: the policy is made of a function; or the hub refuses, with its reason.
        """
        message = commit_message or f"Upload {filename} with diffusion_tokred"
        return hub.push(self.to_json(), repo_id, filename, message, private, token, create_pr, revision)

    @classmethod
    def from_hub(
        cls, repo_id: str, filename: str = hub.FILENAME, *, revision: str | None = None,
        token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str | None = None, force_download: bool = False, local_files_only: bool = False,
    ) -> Policy:  # fmt: skip
        """Read a policy from a repository of the Hugging Face hub, or from the local cache of it.

        Args: as in diffusers' `from_pretrained`.

        Raises:
            ConfigError: no such file, no access, or no policy in it.
        """
        path = hub.pull(
            repo_id, filename, revision=revision, token=token, cache_dir=cache_dir, subfolder=subfolder,
            force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        return cls._read(path, "/".join(filter(None, (repo_id, subfolder, filename))))

    @classmethod
    def _read(cls, path: Path, name: str) -> Policy:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the policy {name}: {error}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{name} is not JSON: {error}") from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


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

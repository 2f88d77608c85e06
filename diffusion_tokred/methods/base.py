"""What a method file provides: a frozen config and what to do at a site. No diffusers class is known here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch

from ..errors import ConfigError
from ..runtime.rows import Out
from ..runtime.site import OFFERS, Call, Level, Site
from ..runtime.stack import StackCall
from ..runtime.store import Clock
from ..runtime.work import Work
from ..schedule.shapes import COUNTS
from ..tokens.regions import ratio_of, room

_VERSION = 1
ALIGNED = 1024  # tokens from which on counts are snapped to `align`


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a config: default, one sentence of help, and limits that the command line and the app show too.

    Limits: `low` and `high` (inclusive), or `choices`.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class MethodConfig:
    """Base of all configs: validated when made, serialised with `_type` and `_version`."""

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, limits = getattr(self, field.name), field.metadata
            kind = type(field.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            if kind in (int, float, bool, str) and (type(value) is not kind):
                raise ConfigError(f"{self.name}: {field.name} must be {kind.__name__}, got {value!r}")
            if kind is tuple:
                if isinstance(value, int):
                    value = (value,)
                if not isinstance(value, (tuple, list)) or not all(type(v) is int and v >= 0 for v in value):
                    raise ConfigError(f"{self.name}: {field.name} must be integers >= 0 such as (0, 1), got {value!r}")
                object.__setattr__(self, field.name, tuple(value))
            if "choices" in limits and value not in limits["choices"]:
                raise ConfigError(f"{self.name}: {field.name} must be one of {_list(limits['choices'])}, got {value!r}")
            low, high = limits.get("low", float("-inf")), limits.get("high", float("inf"))
            if ("low" in limits or "high" in limits) and not low <= value <= high:
                raise ConfigError(f"{self.name}: {field.name} must be in [{low:g}, {high:g}], got {value!r}")

    @property
    def share(self) -> float:
        """The ratio that this config asks for: share of tokens not computed."""
        raise NotImplementedError

    @property
    def asks(self) -> str:
        """The mode that it asks for, at that ratio."""
        return "reduce"

    @property
    def keep(self) -> float:
        """The papers' keep ratio: 1 - ratio."""
        return 1.0 - self.share

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with `_type` (the method's name) and `_version`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"_type": self.name, "_version": _VERSION} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MethodConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown type, a newer version, an unknown or a wrong field.
        """
        data = dict(data)
        name, version = data.pop("_type", None), data.pop("_version", None)
        if version != _VERSION:
            raise ConfigError(f"a config of version {version!r} cannot be read: this library reads version {_VERSION}")
        return make_config(str(name), **data)


@dataclass(frozen=True)
class MethodInfo:
    """A row of `methods()`. `measured`: the backbones for which its default settings were chosen by measuring."""

    name: str
    config: type[MethodConfig]
    sites: tuple[str, ...]
    paper: str
    backbones: tuple[str, ...]
    measured: tuple[str, ...] = ()


class Method:
    """A method at work on one denoiser. Subclass it in one file and decorate with `register_method`.

    Attributes:
        paper: "Title, arXiv number".
        kinds: site kinds it can use.
        modes: modes that a policy may ask of it.
        watches_input: True if it reads `block.input`.
        every: what it keeps in a level's memory is made anew after this many steps; 0 or 1: at every step.
        plans_for: "run" if its first step that is not full makes what the rest of the run goes by, "interval" if the
            first one after each full step does until the next: such a step takes longer than those that follow.
        ties: True if the halves of a guidance pair share what is chosen by what one of them, or both, compute.
        shares_rows: True if all pictures of a batch have the same tokens computed.
        shares_passes: True if the passes of a step (conditional, unconditional) share the level's memory.
        keeps: True if full steps are handed to it too, since it keeps what they compute for later ones.
        watches_output: True if it is shown the denoiser's output after each step.
        unforeseen: what a dry run cannot know of it, a sentence.
        coordinate: what forecasts are functions of: "step" or "noise".
        whole: True if it acts at all kinds of site that a model has of its own, or not at all.
        ratios: how many ratios other than 0 a policy may ask of a site in mode "reduce": each is a shape of its own for
            compiled models and kernels. None: any number, as papers have them.
        shares: what a policy's rules may not tell apart at a level, since its sites share a clock ("mode") or a choice
            of tokens ("ratio"); "" if nothing.
        heeds: what it heeds of what a user marks: "protect" (tokens that are never reduced), "importance".
        deaf: why it does not heed the rest, a clause.
        store: type of what is kept; None: the model's.
        guarded: True if tokens are protected on this model. Set before `needs` is asked.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ()
    modes: tuple[str, ...] = ("full", "reduce")
    watches_input: ClassVar[bool] = False
    every: int = 1
    plans_for: ClassVar[str] = ""
    ties: bool = False
    shares_rows: bool = False
    shares_passes: bool = False
    keeps: ClassVar[bool] = False
    unforeseen: ClassVar[str] = ""
    watches_output: bool = False
    coordinate: str = "step"
    whole: ClassVar[bool] = False
    ratios: ClassVar[int | None] = COUNTS
    shares: str = ""
    heeds: frozenset[str] = frozenset()
    deaf: str = "it does not choose between tokens"
    guarded: bool = False
    store: torch.dtype | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def on(self, kinds: Collection[str]) -> Method:
        """The method for a model with sites of these kinds: itself, or another form of it."""
        return self

    def wants(self, site: Site) -> bool:
        """Whether it would act at this site with these options."""
        raise NotImplementedError

    def leaves(self, site: Site) -> str:
        """Why it leaves alone a site that it does not want, in a few words."""
        if site.kind not in self.kinds:
            return f"{self.name} does not act on {site.kind}"
        if missing := self.needs(site.kind) - site.offers:
            return "not offered: " + "; ".join(site.lacks.get(need, OFFERS[need]) for need in sorted(missing))
        levels = getattr(self.config, "levels", None)
        if levels is not None and site.level.index not in levels:
            return f"level {site.level.index} not in levels={levels}"
        return "its options leave it out"

    def needs(self, kind: str) -> frozenset[str]:
        """Which of `runtime.site.OFFERS` a site of this kind must have."""
        raise NotImplementedError

    def asks(self) -> dict[str, str]:
        """Kinds of site that the user asked for by name: kind -> the option. A model without them is refused."""
        return {}

    def check(self, ratio: float) -> None:
        """Refuse a ratio that the method cannot do.

        Raises:
            ConfigError: with what is allowed.
        """
        raise NotImplementedError

    def allow(self, mode: str, ratio: float) -> None:
        """Refuse what a policy asks for and the method cannot do.

        Raises:
            ConfigError: with what is allowed.
        """
        self.check(ratio)
        if mode not in self.modes:
            raise ConfigError(f"{self.name} has no mode {mode!r}: its modes are {', '.join(self.modes)}")

    def count(self, grid: tuple[int, int], ratio: float) -> int:
        """Tokens left of a grid."""
        return count(grid[0] * grid[1], ratio, getattr(self.config, "align", 1))

    def snapped(self, grid: tuple[int, int], ratio: float) -> float:
        """The ratio that is left where the count of tokens is snapped; else the ratio itself."""
        n = grid[0] * grid[1]
        m = self.count(grid, ratio)
        return ratio if m == n - int(n * ratio) else 1 - m / n

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        """How many rows the site computes of one sample."""
        raise NotImplementedError

    def overhead(self, site: Site, grid: tuple[int, int], ratio: float) -> int:
        """Multiply-adds of one sample that it spends itself when it decides, such as on matching."""
        return 0

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        """Bytes that it keeps from step to step at a site, for `batch` samples with `text` rows beside the image's;
        what a level shares, at its leader."""
        return 0

    def lighter(self) -> str:
        """Options that make it keep less, for the user to read."""
        return "see `explain`, and the method's options"

    def rests(self, total: int | None) -> str | None:
        """Why it leaves a run of so many steps as it is; None if it does not."""
        return None

    def step(self, clock: Clock, index: int, total: int | None, mode: str, ratio: float) -> tuple[str, float]:
        """What a step does, given when this pass was last computed in full. Reads the clock; the root turns it.

        Args:
            index, total: as in `StepInfo`.
            mode, ratio: what the policy asks for at this noise level.
        """
        return mode, ratio

    def part(self, site: Site, index: int, total: int | None, mode: str, ratio: float) -> tuple[str, float]:
        """What a site does of it."""
        return mode, ratio

    def spare(self, site: Site, mode: str, ratio: float) -> tuple[str, float]:
        """What a site, or a step at its level, does instead, so that no protected token (`level.guard`) is reduced.

        Default: for methods that choose `count` tokens of all; others override it.
        """
        guard, grid = site.level.guard, site.level.grid
        if guard is None or grid is None or mode == "full" or not (need := guard.most(self.shares_rows)):
            return mode, ratio
        n = grid[0] * grid[1]
        if mode == "reduce" and self.count(grid, ratio) >= need:
            return mode, ratio
        m = room(n, need, self.align_of(n))
        return ("reduce", ratio_of(n, m)) if m < n else ("full", 0.0)

    def align_of(self, n: int) -> int:
        """What counts of `n` tokens are multiples of."""
        align: int = getattr(self.config, "align", 1)
        return align if n >= ALIGNED else 1

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        """Learn the name of the backbone, and the sites that it will act at."""

    def observe(self, level: Level, output: torch.Tensor, index: int) -> None:
        """See the denoiser's output (B, N, F) after a step, eagerly."""

    def enter(self, call: StackCall) -> torch.Tensor | None:
        """At the first block of a stack: which tokens to compute, (M,) or (B, M) int64; None for all, or for none if
        the plan's mode leaves the blocks out."""
        raise NotImplementedError

    def goes_on(self, call: StackCall) -> bool:
        """After the blocks of a stack that run in any case (`StackSite.divide`): whether the others do."""
        raise NotImplementedError

    def leave(self, call: StackCall, y: torch.Tensor | None) -> torch.Tensor:
        """After its last block: all tokens (B, N, C), from those that were computed, `y` (B, M, C); None if the blocks
        were left out."""
        raise NotImplementedError

    def works(self, sites: Iterable[Site], grids: Mapping[int, tuple[int, int]]) -> dict[str, Work]:
        """What the sites compute, by name, as their plans say; without those that are dense.

        The overhead comes with the site that decides: the first of its block, and each with another ratio than the one
        before; or, where decisions are kept in a level's memory (`every`), the level's leader at the steps that renew
        them.
        """
        result: dict[str, Work] = {}
        decided: dict[int, str] = {}  # the ratio that each block decided for last
        for site in sites:
            if site.plan.mode == "full":
                continue
            grid, ratio = grids[site.level.index], site.plan.ratio
            result[site.name] = work = self.work(site, grid, ratio)
            result |= {inner.name: self.work(inner, grid, ratio) for inner in site.inner}
            decides = (
                site.leader and site.plan.refresh if self.every else decided.get(site.block.index) != site.plan.text
            )
            if decides:
                work.extra += self.overhead(site, grid, ratio)
            decided[site.block.index] = site.plan.text
        return result

    def prepare(self, site: Site) -> Any:
        """Make what a plan needs and no token decides, such as positions: `call.prepared`, for all sites of the level.

        Called eagerly at the root when the level's plan is made anew: before each step, or each `every` steps.
        `site.level.grid` and `.key` are known then, and `site.plan`.
        """

    def apply(self, call: Call) -> Out:
        """Act at a site. Called inside the model, maybe under `torch.compile`: static shapes, no generator, no branch
        on data."""
        raise NotImplementedError


def count(n: int, ratio: float, align: int) -> int:
    """Tokens left of `n`: snapped down to a multiple of `align` in large pictures, but never to none.

    Raises:
        ConfigError: no multiple of `align` fits.
    """
    m = n - int(n * ratio)
    if n < ALIGNED or m % align == 0:
        return m
    if align > n:
        raise ConfigError(f"align={align}: there are only {n} tokens to count in multiples of it; use a smaller one")
    return max(m // align, 1) * align


METHODS: dict[str, type[Method]] = {}
CONFIGS: dict[str, type[MethodConfig]] = {}
_M = TypeVar("_M", bound=type[Method])


def register_method(name: str, config: type[MethodConfig]) -> Callable[[_M], _M]:
    """Class decorator: make a method known under `name`, with its config class."""

    def register(method: _M) -> _M:
        method.name = config.name = name
        METHODS[name], CONFIGS[name] = method, config
        return method

    return register


def make_config(method: str, **options: Any) -> MethodConfig:
    """The config of a method by name, with options checked by name.

    Raises:
        ConfigError: unknown method or option (with the nearest known one), or a value out of range.
    """
    if method not in CONFIGS:
        raise ConfigError(f"unknown method {method!r}{_nearest(method, CONFIGS)}; methods: {', '.join(CONFIGS)}")
    known = [f.name for f in fields(CONFIGS[method])]
    for name in options:
        if name not in known:
            raise ConfigError(f"{method} has no option {name!r}{_nearest(name, known)}; options: {', '.join(known)}")
    return CONFIGS[method](**options)


def make_method(config: MethodConfig) -> Method:
    """The method that a config belongs to."""
    for name, kind in CONFIGS.items():
        if type(config) is kind:
            return METHODS[name](config)
    raise ConfigError(f"{type(config).__name__} is not a config of a registered method: {', '.join(CONFIGS)}")


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _list(values: Any) -> str:
    return ", ".join(repr(v) for v in values)

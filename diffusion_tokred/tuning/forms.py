"""What can be searched: ways of leaving out whose steps have a price of their own (forms), and settings of them.

A form is a method with those of its options that change what a step costs. What is left to search: which steps are
full, the share of tokens left out in the others, and options that change the picture but not the price (levers).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import ConfigError, UnsupportedError
from ..methods import CONFIGS, MethodConfig, make_config, make_method
from ..patching import plan
from ..schedule.policy import Policy
from ..schedule.rules import Rule
from .steps import Does, Steps

# The method's own interval must not come before the policy's full steps. It is no larger than needed: what the age of a
# token counts is a share of it.
FREE = 100
RATIOS = (0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375)


@dataclass(frozen=True)
class Form:
    """A method with the options that decide what its steps cost.

    Attributes:
        name: in reports, such as "deepcache branch=1".
        method: of `METHODS`.
        fixed: its options.
        ratios: shares of tokens that steps between full ones may leave out, rising; empty: they leave out all.
        levers: option -> values to choose from, in an order where neighbours are alike.
    """

    name: str
    method: str
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ratios: tuple[float, ...] = ()
    levers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)

    @property
    def caches(self) -> bool:
        """Whether it keeps what full steps compute, so that the first step of a run is always full."""
        return "interval" in defaults(self.method)

    def config(self, options: Mapping[str, Any], steps: int) -> MethodConfig:
        """With full steps where a policy puts them, and nowhere else."""
        given = dict(self.fixed) | dict(options)
        if self.caches:  # unless the options say otherwise
            known = defaults(self.method)
            least = next(f for f in fields(CONFIGS[self.method]) if f.name == "warmup").metadata["low"]
            given = {"interval": FREE, "warmup": least, "min_steps": min(known["min_steps"], steps)} | given
            if "age_weight" in known:
                given.setdefault("age_weight", known["age_weight"] * FREE / known["interval"])
        return make_config(self.method, **given)

    def rule(self, config: MethodConfig, ratio: float) -> Does:
        """What a step that is not full is asked to do."""
        return (config.asks, ratio if self.ratios else 1.0)

    def usual(self, lever: str) -> Any:
        """A lever's usual value: the config's default."""
        default, values = defaults(self.method)[lever], self.levers[lever]
        return default if default in values else values[0]

    @property
    def probed(self) -> tuple[float, ...]:
        """Ratios whose cost is measured; those between are interpolated. Three, as a run has at most three counts."""
        if len(self.ratios) <= 3:
            return self.ratios or (1.0,)
        return self.ratios[0], self.ratios[len(self.ratios) // 2], self.ratios[-1]


@dataclass(frozen=True)
class Candidate:
    """A setting: something whose speed and pictures can be measured.

    Attributes:
        form: what it is a setting of.
        full: units computed in full; None: as the method's own interval and warm-up (in `options`) say.
        ratio: share of tokens left out in the others.
        options: levers; of a constant setting also its interval and warm-up.
        blocks: first and last of those that are reduced, the others are full at all steps; None: all of them.
        source: how it was come upon; two candidates are equal whatever it is.
    """

    form: Form
    full: tuple[int, ...] | None
    ratio: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    blocks: tuple[int, int] | None = None
    source: str = field(default="", compare=False)

    def config(self, steps: int) -> MethodConfig:
        """The method's config."""
        known, given = defaults(self.form.method), dict(self.options)
        if self.form.ratios:
            given |= {"ratio": self.ratio} if "ratio" in known else {"factor": round((1 - self.ratio) ** -0.5)}
        if self.full is not None:
            return self.form.config(given, steps)
        given |= {"min_steps": min(known["min_steps"], steps)} if "min_steps" in known else {}
        return make_config(self.form.method, **{**self.form.fixed, **given})

    def policy(self, steps: Steps) -> Policy:
        """What `patch` is given beside the config."""
        config = self.config(len(steps.us))
        if self.full is None:
            mode, ratio = self.form.rule(config, self.ratio)
            return Policy.constant(ratio, mode)
        points = steps.schedule(self.full, self.form.rule(config, self.ratio))
        return Policy(points=points) if self.blocks is None else Policy(rules=(Rule(points, blocks=self.blocks),))

    def key(self, steps: Steps) -> str:
        """The same for the same pictures."""
        made = {"config": self.config(len(steps.us)).to_dict(), **self.policy(steps).to_dict()}
        return json.dumps(made, sort_keys=True)

    def words(self, units: int) -> str:
        """In a line."""
        parts = [self.form.name]
        parts += [f"{name}={value}" for name, value in self.options]
        parts += [f"ratio={self.ratio:g}"] if self.form.ratios else []
        if self.full is not None:
            parts.append(f"{len(self.full)} of {units} full: {','.join(map(str, self.full))}")
        return " ".join(parts)

    def moved(self, **changes: Any) -> Candidate:
        """With other attributes."""
        return replace(self, **changes)


def bare(form: Form) -> Candidate:
    """The fastest setting of a form."""
    return Candidate(form, (0,) if form.caches else (), form.ratios[-1] if form.ratios else 1.0, source="fastest")


def defaults(method: str) -> dict[str, Any]:
    """A config's fields with what they are when they are not given."""
    return {f.name: f.default for f in fields(CONFIGS[method])}


_LAGRANGE = {"order": (1, 2), "damping": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 1.0, 1.1)}
_DAMPED = {"damping": (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)}
_PACKED = {"select": ("drift", "noise_change", "random"), "forecast": (True, False)}


def known(kinds: Collection[str], levels: Sequence[int]) -> list[Form]:
    """All forms for a model with sites of these kinds, on these levels of attention; not all of them need be able.

    Random-keep is a baseline to be beaten, not one of them.
    """
    stack = "stack" in kinds
    packed = _PACKED if stack else {"score": ("value", "key", "random")}
    found = [
        Form("taylorseer", "taylorseer", levers=_LAGRANGE),
        Form("clusca", "clusca", levers=_LAGRANGE | {"weight": (0.0, 0.005, 0.02)}),
        Form("fora what=stack", "fora", {"what": "stack"}),
        Form("fora what=modules", "fora", {"what": "modules"}),
        *(Form(f"deepcache branch={b}", "deepcache", {"branch": b, "order": 1}, levers=_DAMPED) for b in (0, 1, 2)),
        Form("firstblock", "firstblock", {"threshold": 100.0}),
        Form("toca", "toca", ratios=RATIOS, levers=packed),
        Form("duca", "duca", ratios=RATIOS, levers={"forecast": (False, True)}),
        Form("ras", "ras", ratios=RATIOS, levers={"high": (1.0, 0.7, 0.5)}),
        Form("cat", "cat", ratios=RATIOS),
    ]
    for count in range(1, len(levels) + 1):
        few = tuple(levels[:count])
        where = {"levels": few} if len(levels) > 1 else {}
        name = f" levels={','.join(map(str, few))}" if where else ""
        found += [
            Form(f"tome merge_ff{name}", "tome", {"merge_ff": True, **where}, ratios=(0.25, 0.5, 0.75)),
            Form(f"todo{name}", "todo", where, ratios=(0.75, 8 / 9, 0.9375)),
        ]
    return found


def able(denoiser: Any, forms: Sequence[Form], steps: int) -> tuple[list[Form], dict[str, str]]:
    """Those that work on a denoiser, and why the others do not."""
    fit, refused = list[Form](), dict[str, str]()
    for form in forms:
        try:
            config = form.config({}, steps)
            method = make_method(config)
            for ratio in form.ratios or (1.0,):
                method.allow(*form.rule(config, ratio))
            plan(denoiser, method, Policy.constant(config.share, config.asks), 0, None)
            fit.append(form)
        except (ConfigError, UnsupportedError) as error:
            refused[form.name] = str(error)
    return fit, refused


def chosen(forms: Sequence[Form], methods: Sequence[str] | None) -> list[Form]:
    """Those of the methods asked for.

    Raises:
        ConfigError: an unknown one, or one that tune does not search.
    """
    if methods is None:
        return list(forms)
    names = dict.fromkeys(form.method for form in forms)
    for method in methods:
        make_config(method)
        if method not in names:
            raise ConfigError(f"tune does not search {method!r}: it searches {', '.join(names)}")
    return [form for form in forms if form.method in methods]

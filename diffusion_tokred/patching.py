"""`patch`, `unpatch`, `patched`, `report`: the calls a user makes."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

from torch import nn

from .backbones import BACKBONES, Backbone, Layout, backbone_of
from .defaults import measured_families
from .driver import RECORDS, REPORTS, Driver
from .errors import ConfigError, StateError, UnsupportedError
from .methods import METHODS, Method, MethodConfig, MethodInfo, make_config, make_method
from .ruling import check_fit, settle
from .runtime.regions import Regions
from .runtime.site import OFFERS, Site
from .runtime.stats import Report
from .schedule.policy import Policy
from .schedule.stamp import PARTS

_T = TypeVar("_T")


def patch(
    target: _T,
    config: MethodConfig | None = None,
    *,
    method: str | None = None,
    policy: Any = None,
    seed: int = 0,
    record: str | None = None,
    cache_budget: int | str | None = None,
    protect: Any = None,
    importance: Any = None,
    **options: Any,
) -> _T:
    """Put a token-reduction method on a pipeline or a denoiser. Undone, exactly, by `unpatch`.

    Args:
        target: a diffusers pipeline, or its denoiser (UNet, transformer). Changed in place, and returned. Pipelines
            that share the denoiser (`from_pipe`) share the patch.
        config: a method's config, such as `ToMeConfig(ratio=0.5)`; or
        method: a method's name ("tome", "todo": see `methods()`), with `options`, the fields of its config. Alone, it
            means what was measured for this family of models, if there is that; else the method's defaults. "auto":
            what `tune` found for this model on this machine, else a default for its kind.
        policy: the ratio as a function of the noise level, instead of the config's constant one: a number, a `Policy`,
            a list of points (u, ratio) or (u, ratio, mode), or a function of u. Methods that merge or pack tokens have
            at most three ratios in a run: see `Policy.shaped`. A `Policy` that says what method it is
            for brings that method, with its options (those given here win); one for another method or another model is
            refused, see `Policy.without_method` and `without_model`.
        seed: of the method's own random draws; no generator of torch is read or changed.
        record: "time" to measure each denoiser call (waits for the device), "tokens" to keep a map of what became of
            each token. Both go into `report`.
        cache_budget: the most that may be kept from step to step, in bytes or as "2GB"; a run that would need more
            is refused at its first step, with what it needs. Default: no limit.
        protect: a mask of what is never reduced (a face, text): a PIL image, an array or a tensor (H, W) of any size,
            for all pictures of a run, or (B, H, W), or a list, with one for each. White, true and nonzero pixels are
            protected, with all tokens that they touch. `tokred.protect` changes it later.
        importance: weights, as `protect` (of 8-bit pictures as shares of white), or a function (info, grid) -> weights
            of a step, `info.u` its noise level. Tokens that matter more are kept first: a method that would go by a
            score goes by the share of tokens of lower score, in [0, 1), plus the weight.

    Raises:
        ConfigError: an unknown method or option, a ratio that the method cannot do, a wrong policy, one that was made
            for something else.
        UnsupportedError: an unknown architecture, a combination that cannot work, options that match no site, or
            nothing pays ("auto"). Nothing has been changed then.
    """
    config, rule = settle(config, method, options, policy, denoisers(target)[0], target)
    check_settings(seed, record)
    budget = bytes_of(cache_budget)
    drivers = [
        plan(denoiser, make_method(config), rule, seed, record, budget, Regions(protect, importance))
        for denoiser in denoisers(target)
    ]
    for driver in drivers:
        if isinstance(before := driver.denoiser.__dict__.get("_tokred"), Driver):
            warn_of(before.remove())
            # Planned over the old patch: plan again on what is there now.
            driver = plan(driver.denoiser, driver.method, rule, seed, record, budget, driver.regions)
        if target is not driver.denoiser:
            driver.tracker.watch(target)
        driver.install()
    return target


def unpatch(target: _T) -> _T:
    """Take the patch off again, bit-exact, leaving nothing. No effect on what is not patched."""
    for denoiser in denoisers(target):
        if isinstance(driver := denoiser.__dict__.get("_tokred"), Driver):
            warn_of(driver.remove())
    return target


def protect(target: _T, mask: Any) -> _T:
    """Protect other tokens, from the next run on, of what was patched with `protect=`: nothing is compiled anew as long
    as the same number of tokens is computed.

    Args:
        target: as in `patch`.
        mask: as `patch`'s `protect`; None protects nothing.

    Raises:
        StateError: it is not patched with `protect=`.
        ConfigError: not a mask.
    """
    for denoiser in denoisers(target):
        driver = denoiser.__dict__.get("_tokred")
        if not isinstance(driver, Driver) or not driver.regions.protects:
            raise StateError(f"this {type(denoiser).__name__} is not patched with protect=: patch it with a mask first")
        driver.regions.set(mask)
    return target


@contextlib.contextmanager
def patched(target: _T, config: MethodConfig | None = None, **options: Any) -> Iterator[_T]:
    """`patch` for the length of a `with` block. Takes the arguments of `patch`."""
    patch(target, config, **options)
    try:
        yield target
    finally:
        unpatch(target)


def report(target: Any) -> Report | None:
    """What the last finished run did, step by step; also after `unpatch`. None if no patched run has finished.

    Of a pipeline with two denoisers (Wan 2.2) it is the first one's: ask `report(pipe.transformer_2)` for the other's.
    """
    for denoiser in denoisers(target):
        if isinstance(driver := denoiser.__dict__.get("_tokred"), Driver):
            driver.publish()
        if (found := REPORTS.get(denoiser)) is not None:
            return found
    return None


def methods() -> list[MethodInfo]:
    """All methods, with the backbones they work on."""
    return [
        MethodInfo(
            name,
            config_of(name),
            kinds_of(name),
            kind.paper,
            tuple(b for b in BACKBONES if not why_not(make_method(config_of(name)()), BACKBONES[b])),
            measured_families(name),
        )
        for name, kind in METHODS.items()
    ]


def kinds_of(method: str) -> tuple[str, ...]:
    """Kinds of site that a method uses on some model, in any of its forms."""
    config = config_of(method)
    values = [{field.name: value} for field in fields(config) for value in field.metadata.get("choices", ())]
    forms = [make_method(config(**value)) for value in ({}, *values)]
    families = [{site.kind for site in backbone.sites} for backbone in BACKBONES.values()]
    return tuple(dict.fromkeys(kind for form in forms for family in families for kind in form.on(family).kinds))


def config_of(method: str) -> type[MethodConfig]:
    """The config class of a method."""
    return type(make_config(method))


def why_not(method: Method, backbone: Backbone, kind: str | None = None) -> str | None:
    """Why a method, with its options, cannot work on a family, at sites of a kind if one is named; None if it can."""
    method = method.on({site.kind for site in backbone.sites})
    if kind is None:
        there = [kind for kind in method.kinds if any(site.kind == kind for site in backbone.sites)]
        reasons = [why_not(method, backbone, kind) for kind in there or method.kinds]
        if method.whole:
            return next(filter(None, reasons), None)
        return None if None in reasons else reasons[0]
    if kind not in method.kinds:
        return f"{method.name} does not act on {kind}"
    sites = [site for site in backbone.sites if site.kind == kind]
    if not sites:
        return f"no {kind} in {backbone.name}"
    lacking = [(site, missing) for site in sites if (missing := method.needs(kind) - site.offers)]
    if len(lacking) < len(sites):
        return None
    site, missing = lacking[0]
    return "; ".join(site.lacks.get(need, f"not offered: {OFFERS[need]}") for need in sorted(missing))


def denoisers(target: Any) -> list[nn.Module]:
    """The denoisers of a pipeline, or the target itself; `torch.compile`'s wrapper is looked through.

    Raises:
        UnsupportedError: there is none.
    """
    if isinstance(target, nn.Module):
        found: list[Any] = [target]
    else:
        found = [part for name in PARTS if isinstance(part := getattr(target, name, None), nn.Module)]
    if not found:
        raise UnsupportedError(
            f"{type(target).__name__} is neither a denoiser nor a pipeline with one ({', '.join(PARTS)})"
        )
    return [getattr(module, "_orig_mod", module) for module in found]


def check_settings(seed: Any, record: Any) -> None:
    """Refuse a seed or a record that is none."""
    if record not in RECORDS:
        raise ConfigError(f"record must be one of {', '.join(map(repr, RECORDS))}, got {record!r}")
    if not isinstance(seed, int):
        raise ConfigError(f"seed must be an integer, got {seed!r}")


def bytes_of(text: int | str | None) -> int | None:
    """A budget: a number of bytes, or "500MB", "1.5 GB", "2GiB" (units of 1000 and of 1024).

    Raises:
        ConfigError: it is none.
    """
    if text is None or (isinstance(text, int) and not isinstance(text, bool) and text >= 0):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    if isinstance(text, bool) or not found:
        raise ConfigError(f'cache_budget is a number of bytes, or a size such as "2GB" or "500MiB", got {text!r}')
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def plan(
    denoiser: nn.Module, method: Method, policy: Policy, seed: int, record: str | None, budget: int | None = None,
    regions: Regions | None = None,
) -> Driver:  # fmt: skip
    """Everything checked, nothing changed."""
    backbone = backbone_of(denoiser)
    layout = backbone.layout(denoiser)
    method = heeding(method.on({site.kind for site in (*layout.pairs, *layout.sites)}), regions)
    sites = choose(layout, method)
    if any(hasattr(getattr(module, "processor", None), "tokred_config") for module in denoiser.modules()):
        raise UnsupportedError(
            f"this {type(denoiser).__name__} has attention processors of this library: use them, inside of "
            "`with tokred.steps(pipe)`, or set back the processors that were there before"
        )
    verify(denoiser, layout, sites, method)
    check_fit(policy, denoiser, sites, method)
    return Driver(denoiser, backbone, layout, sites, method, policy, seed, record, budget, regions)


def heeding(method: Method, regions: Regions | None) -> Method:
    """The method, told whether tokens are protected.

    Raises:
        UnsupportedError: it cannot heed what is marked.
    """
    asked = {"protect": regions is not None and regions.protects, "importance": regions is not None and regions.weighs}
    for name, given in asked.items():
        if given and name not in method.heeds:
            able = [other for other, kind in METHODS.items() if name in kind.heeds]
            raise UnsupportedError(f"{method.name} cannot heed {name}=: {method.deaf}. These can: {', '.join(able)}")
    method.guarded = asked["protect"]
    return method


def verify(denoiser: nn.Module, layout: Layout, sites: list[Site], method: Method) -> None:
    """Refuse what cannot work.

    Raises:
        UnsupportedError: with the reason.
    """
    if not sites:
        raise UnsupportedError(_nothing(layout, method, denoiser))
    if getattr(denoiser, "is_cache_enabled", False):
        raise UnsupportedError(
            f"a built-in cache of diffusers is enabled on this {type(denoiser).__name__}: call disable_cache() first"
        )
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise UnsupportedError("context parallelism splits the tokens over devices: token reduction cannot work on it")
    if reason := unmet(layout, sites, method):
        raise UnsupportedError(f"{method.name} on {type(denoiser).__name__}: {reason}")
    for site in sites:
        if reason := site.refusal(method.needs(site.kind)):
            raise UnsupportedError(f"{method.name} at {site.name}: {reason}")


def choose(layout: Layout, method: Method) -> list[Site]:
    """The sites that a method would use: those that it wants and that can do what it needs.

    Where it could use a site and one inside of it (a parallel block, and its attention), it uses the outer one.
    """
    every = [*layout.pairs, *layout.sites]
    able = [site for site in every if method.wants(site) and method.needs(site.kind) <= site.offers]
    inside = {id(inner) for site in able for inner in site.inner}
    return [site for site in able if id(site) not in inside]


def unmet(layout: Layout, sites: list[Site], method: Method) -> str | None:
    """An option that would do nothing although others do something; None if all have an effect."""
    used = {site.kind for site in sites}
    for site in layout.sites:
        if site.kind not in used and method.wants(site) and (missing := method.needs(site.kind) - site.offers):
            return f"{site.name} cannot do what is needed: {_missing(site, missing)}"
    kinds = {site.kind for site in layout.sites}
    for kind, option in method.asks().items():
        if kind not in kinds:
            return f"{option} matches nothing, there is no {kind} here: leave it out"
    there, levels = {site.level.index for site in sites}, getattr(method.config, "levels", ())
    if lost := [level for level in levels if level not in there]:
        known = sorted({site.level.index for site in layout.sites if site.kind in used})
        return f"levels={levels}: nothing to act on at level {lost[0]}; the levels here: {', '.join(map(str, known))}"
    return None


def _missing(site: Site, missing: frozenset[str]) -> str:
    return "; ".join(site.lacks.get(need, OFFERS[need]) for need in sorted(missing))


def _nothing(layout: Layout, method: Method, denoiser: nn.Module) -> str:
    for site in layout.sites:
        if method.wants(site) and (missing := method.needs(site.kind) - site.offers):
            where = f"{site.name} of this {type(denoiser).__name__}"
            return f"{method.name} needs at {where} what cannot be done there: {_missing(site, missing)}"
    kinds = dict.fromkeys(site.kind for site in (*layout.pairs, *layout.sites))
    if kinds and kinds.keys().isdisjoint(method.kinds):
        return (
            f"{method.name} acts on {', '.join(method.kinds)}, and this {type(denoiser).__name__} has none of that: "
            f"it has {', '.join(kinds)}"
        )
    there: dict[int, set[str]] = {}
    for site in layout.sites:
        there.setdefault(site.level.index, set()).add(site.kind)
    found = "; ".join(f"level {level}: {', '.join(sorted(kinds))}" for level, kinds in sorted(there.items()))
    return (
        f"{method.name} with these options matches nothing in this {type(denoiser).__name__}: {method.config}. "
        f"It has {found or 'no transformer blocks'}. Change levels, blocks, or the kinds of module to act on."
    )


def warn_of(left: list[str]) -> None:
    for text in left:
        warnings.warn(f"unpatched, but {text}: what is left there is inert, and goes when that tool goes", stacklevel=3)

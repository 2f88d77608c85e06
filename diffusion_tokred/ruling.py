"""Which policy a run goes by, and whether method, model and policy fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from .auto import AUTO, choose_auto
from .backbones import backbone_of
from .defaults import measured_default
from .errors import ConfigError, UnsupportedError
from .methods import METHODS, Method, MethodConfig, make_config, make_method
from .runtime.site import Site
from .schedule.policy import Policy, as_policy
from .schedule.rules import Rule
from .schedule.stamp import check_model

_WHOLE = ("stack", "deep")  # kinds of site that are many blocks at once


def settle(
    config: MethodConfig | None, method: str | None, options: Mapping[str, Any], policy: Any, model: nn.Module,
    target: Any = None,
) -> tuple[MethodConfig, Policy]:  # fmt: skip
    """The config and the policy that `patch`'s arguments mean for a denoiser, of the pipeline `target`.

    Raises:
        ConfigError: as `resolve` and `rule_of`.
        UnsupportedError: an unknown architecture, or nothing pays ("auto").
    """
    if method == AUTO:
        if given := [
            *(["config"] if config is not None else []),
            *(["policy"] if policy is not None else []),
            *options,
        ]:
            raise ConfigError(
                f'method="auto" chooses everything itself: leave out {", ".join(given)}, or name a method'
            )
        layout = backbone_of(model).layout(model)
        config, policy = choose_auto(target, model, {site.kind for site in (*layout.pairs, *layout.sites)})
        return settle(config, None, {}, policy, model)
    policy = offered(config, method, options, policy, model)
    config = resolve(config, method, options, policy)
    return config, rule_of(config, policy)


def offered(
    config: MethodConfig | None, method: str | None, options: Mapping[str, Any], policy: Any, model: nn.Module
) -> Any:
    """The policy that was given; or, for a method that is named and nothing else, what was measured for the model's
    family, if that was. None: the config's own ratio."""
    if config is None and policy is None and not options and method in METHODS:
        return measured_default(method, backbone_of(model).name)
    return policy


def resolve(
    config: MethodConfig | None, method: str | None, options: Mapping[str, Any], policy: Any = None
) -> MethodConfig:
    """The config that `patch`'s arguments mean. Options given by name win over those that a policy comes with."""
    if config is None:
        own = config_in(policy)
        if own is not None and method in (None, own.name):
            return make_config(own.name, **({f.name: getattr(own, f.name) for f in fields(own)} | dict(options)))
        if method is None:
            raise ConfigError(f"which method? pass method= one of: {', '.join(METHODS)}, or a config")
        return make_config(method, **options)
    if not isinstance(config, MethodConfig):
        raise ConfigError(
            f"a config is an object such as ToMeConfig(ratio=0.5), got {config!r}; a name goes to method="
        )
    if method is not None and method != config.name:
        raise ConfigError(f"method={method!r} contradicts the config, which is for {config.name!r}")
    if options:
        raise ConfigError(f"options beside a config: put {', '.join(options)} into the {type(config).__name__}")
    return config


def config_in(policy: Any) -> MethodConfig | None:
    """The config that a policy was made for, None if it does not say.

    Raises:
        ConfigError: what it says is neither a method's name nor a config's `to_dict()`.
    """
    made_for = policy.method if isinstance(policy, Policy) else None
    if made_for is None:
        return None
    try:
        if isinstance(made_for, str):
            return make_config(made_for)
        if isinstance(made_for, Mapping):
            return MethodConfig.from_dict(dict(made_for))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"the policy's method: {error}") from error
    raise ConfigError(f"the policy's method is a name or a config's to_dict(), found {made_for!r}")


def rule_of(config: MethodConfig, policy: Any) -> Policy:
    """The policy to run by, its points checked against what the method can do.

    Raises:
        ConfigError: no policy, or one for another method, or a mode or ratio that the method has not.
    """
    method = make_method(config)
    rule = Policy.constant(config.share, config.asks) if policy is None else as_policy(policy)
    own = config_in(rule)
    if own is not None and own.name != config.name:
        raise ConfigError(
            f"the policy was made for {own.name}, and this is {config.name}: leave the method out to use the policy's, "
            "or take the policy all the same: policy.without_method()"
        )
    asked = [(mode, ratio) for points in (rule.points, *(r.points for r in rule.rules)) for _, ratio, mode in points]
    if rule.function is not None:
        asked += dict.fromkeys(rule.at(i / 100) for i in range(101))
    for mode, ratio in asked:
        method.allow(mode, ratio)
    return rule


def check_fit(rule: Policy, model: nn.Module, sites: Sequence[Site], method: Method) -> None:
    """Refuse a policy that this model, or this method on it, cannot follow to the letter.

    Args:
        rule: the policy.
        model: the denoiser.
        sites: those that the method acts at.
        method: in its form for this model.

    Raises:
        ConfigError: made for another model, or more ratios than the method can have.
        UnsupportedError: a rule that nothing here goes by, or that tells apart what goes together.
    """
    check_model(rule.model, model)
    first: dict[tuple[int, Rule | None], Site] = {}  # of the sites that go by the same points
    for site in sites:
        first.setdefault((site.level.index, _rule(rule, site)), site)
    _check_counts(rule, list(first.values()), method)
    if not rule.rules:
        return
    used = [found for _, found in first]
    for found in rule.rules:
        if found not in used:
            raise UnsupportedError(_unused(rule, found, sites, method, model))
        if found.blocks is not None and (whole := next((s for s in sites if s.kind in _WHOLE), None)):
            raise UnsupportedError(
                f"the policy has a rule for {found}, and {method.name} takes all blocks of this {type(model).__name__} "
                f"as one ({whole.kind}), which has one clock: use rules without blocks, or a method that works inside "
                "of the blocks (tome; fora; toca with mode='faithful'; taylorseer with what='modules')"
            )
    for level in {index for index, _ in first}:
        _check_shared(rule, [site for (index, _), site in first.items() if index == level], method)


def _check_counts(rule: Policy, sites: Sequence[Site], method: Method) -> None:
    if method.ratios is None:
        return
    for site in sites:
        asked = _asked(rule, site).values()
        ratios = sorted({ratio for mode, ratio in asked if mode == "reduce"}, reverse=True)
        if len(ratios) > method.ratios:
            shown = ", ".join(f"{ratio:g}" for ratio in ratios[:5]) + (", ..." if len(ratios) > 5 else "")
            raise ConfigError(
                f"the policy asks {method.name} for {len(ratios)} different ratios at {site.name} ({shown}), and it "
                f"may have {method.ratios} in a run, as each is a shape of its own for kernels and compiled models: "
                "Policy.shaped(function), or linear, cosine, piecewise, choose the nearest"
            )


def _check_shared(rule: Policy, sites: Sequence[Site], method: Method) -> None:
    """The sites of one level, one for each rule that holds there."""
    if not method.shares or len(sites) < 2:
        return
    asked = [_asked(rule, site) for site in sites]
    for u in sorted({u for points in asked for u in points}, reverse=True):
        found = [rule.at(u, site.level.index, site.kind, site.block.index) for site in sites]
        if len({mode if method.shares == "mode" else (mode, ratio) for mode, ratio in found}) > 1:
            each = "; ".join(
                f"{_rule(rule, site) or 'other sites'}: {mode} {ratio:g}"
                for site, (mode, ratio) in zip(sites, found, strict=True)
            )
            what = "one clock, which says what steps are full" if method.shares == "mode" else "one choice of tokens"
            must = "the modes" if method.shares == "mode" else "modes and ratios"
            raise UnsupportedError(
                f"the sites of a level have {what} with {method.name}, so {must} of rules at level "
                f"{sites[0].level.index} must be the same; at u={u:g} they are {each}"
            )


def _unused(rule: Policy, found: Rule, sites: Sequence[Site], method: Method, model: nn.Module) -> str:
    """Why nothing goes by a rule."""
    for site in sites:
        if found.matches(site.level.index, site.kind, site.block.index):
            return (
                f"the policy's rule for {found} is never reached: all its sites go by earlier ones, such as "
                f"{_rule(rule, site)}. The first that matches wins, so narrow ones come first"
            )
    levels = ", ".join(map(str, sorted({site.level.index for site in sites})))
    kinds = ", ".join(dict.fromkeys(site.kind for site in sites))
    blocks = _ranges(sorted({site.block.index for site in sites}))
    return (
        f"the policy's rule for {found} matches no site of {method.name} in this {type(model).__name__}: it acts at "
        f"{kinds}; levels {levels}; blocks {blocks}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5" """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _rule(rule: Policy, site: Site) -> Rule | None:
    return rule.rule(site.level.index, site.kind, site.block.index)


def _asked(rule: Policy, site: Site) -> dict[float, tuple[str, float]]:
    return rule.asked(site.level.index, site.kind, site.block.index)

"""The contract as a library: `check_method`, `check_backbone`, `assert_contract`.

from diffusion_tokred import testing

testing.assert_contract(testing.check_method("my-method"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..backbones import backbone_of
from ..errors import ConfigError, UnsupportedError
from ..methods import METHODS, MethodConfig, make_config
from ..patching import patch
from . import families, tiny
from .cases import Broken, Case, Finding, Snapshot, describe, model_of, short
from .checks import CHECKS, SLOW
from .sites import SITE_CHECKS

__all__ = ["CHECKS", "SITE_CHECKS", "SLOW", "Finding", "Snapshot", "assert_contract", "check_backbone", "check_method"]

_OTHER = dict(height=48, width=32)  # the tiny pipelines' own size is 32 x 32


def check_method(
    config: MethodConfig | str,
    pipes: Iterable[str] | Mapping[str, Callable[[], Any]] | None = None,
    checks: Iterable[str] | None = None,
) -> list[Finding]:
    """Check a method on pipelines of every architecture.

    Args:
        config: a config, or the name of a registered method, for its defaults (made to act in runs of a few steps).
        pipes: names of tiny pipelines (`BUILDERS` of `testing.tiny` and of `testing.families`), or name -> function
            that makes a pipeline which `testing.tiny.run` can run. Default: all tiny pipelines. Those that the method
            cannot work on are left out.
        checks: names in `CHECKS`. Default: all but those in `SLOW`.

    Returns:
        A `Finding` for each check that applies, on each pipeline.

    Raises:
        ConfigError: an unknown method, check or pipeline.
        UnsupportedError: the method can work on none of the pipelines.
    """
    if isinstance(config, str):
        config = short(make_config(config))
    names = _names(checks, CHECKS)
    if not isinstance(pipes, Mapping):
        known = tiny.BUILDERS | families.BUILDERS
        pipes = {name: known[name] for name in _known(known if pipes is None else pipes, known, "pipeline")}
    found: list[Finding] = []
    reasons = []
    for name, build in pipes.items():
        if reason := _refusal(build, config):
            reasons.append(f"{name}: {reason}")
        else:
            found += _examine(Case(name, build, tiny.run, config, _OTHER), names, CHECKS, describe(config))
    if len(reasons) == len(pipes):
        raise UnsupportedError(f"{describe(config)} works on none of these pipelines: {'; '.join(reasons)}")
    return found


def check_backbone(
    build: Callable[[], Any],
    run: Callable[..., Tensor],
    configs: Iterable[MethodConfig] | None = None,
    checks: Iterable[str] | None = None,
    other: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Check a backbone: by itself (`SITE_CHECKS`), and under each method (`CHECKS`).

    Args:
        build: makes a fresh pipeline, or denoiser, with the same weights each time.
        run: `run(pipe, steps=2, seed=0, batch=1, **size)` -> its output, a tensor (batch, ...). Row i of a batch must
            be what `seed + i` gives with `batch=1`. `testing.tiny.run` is one.
        configs: default: the defaults of all methods that can work on it, made to act in runs of a few steps.
        checks: names in `SITE_CHECKS` and `CHECKS`. Default: all but those in `SLOW`.
        other: arguments of `run` for another size, not square. Default: height 48 and width 32.

    Raises:
        ConfigError: an unknown check.
        UnsupportedError: no backbone knows the denoiser, or a method named in `configs` cannot work on it.
    """
    names = _names(checks, SITE_CHECKS | CHECKS)
    model, size = model_of(build()), dict(_OTHER if other is None else other)
    label = type(model).__name__
    backbone_of(model)  # or raise
    if configs is None:
        configs = [config for name in METHODS if not _refusal(build, config := short(make_config(name)))]
    else:
        configs = list(configs)
        for config in configs:
            if reason := _refusal(build, config):
                raise UnsupportedError(f"{describe(config)} on {label}: {reason}")
    alone = Case(label, build, run, MethodConfig(), size)
    found = [*_examine(alone, [n for n in names if n in SITE_CHECKS], SITE_CHECKS, "any method")]
    for config in configs:
        case = Case(label, build, run, config, size)
        found += _examine(case, [n for n in names if n in CHECKS], CHECKS, describe(config))
    return found


def assert_contract(findings: Iterable[Finding]) -> None:
    """Fail with a list of everything that breaks.

    Raises:
        AssertionError: a line for each finding that is not ok.
    """
    findings = list(findings)
    if broken := [str(finding) for finding in findings if not finding.ok]:
        raise AssertionError("\n".join([f"{len(broken)} of {len(findings)} checks are broken:", *broken]))


def _refusal(build: Callable[[], Any], config: MethodConfig) -> str | None:
    """Why a method cannot work on a pipeline."""
    try:
        patch(build(), config)
    except UnsupportedError as error:
        return str(error)
    return None


def _names(checks: Iterable[str] | None, known: Mapping[str, Any]) -> list[str]:
    return [name for name in known if name not in SLOW] if checks is None else _known(checks, known, "check")


def _known(names: Iterable[str], known: Mapping[str, Any], what: str) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; there are: {', '.join(known)}")
    return names


def _examine(case: Case, names: list[str], known: Mapping[str, Any], config: str) -> Iterator[Finding]:
    """Run checks by name. What one raises is a finding, not the end."""
    for name in names:
        try:
            text, ok = known[name](case), True
        except Broken as error:
            text, ok = str(error), False
        except Exception as error:
            text, ok = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", False
        if text is not None:
            yield Finding(name, case.pipe, config, ok, text)

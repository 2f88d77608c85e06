"""`steps`: what a `with` block around a run does. It tells attention processors of ours the step, and it marks where a
run begins and ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from .backbones import backbone_of
from .driver import Driver
from .errors import ConfigError, StateError, UnsupportedError
from .methods import make_method
from .patching import check_settings, denoisers, heeding, verify, warn_of
from .processors import PLACE, Place, ours, places
from .ruling import check_fit, rule_of
from .runtime.regions import Regions
from .runtime.site import Site

_T = TypeVar("_T")
_KINDS = ("attention", "cross_attention")


@contextlib.contextmanager
def steps(
    target: _T,
    *,
    policy: Any = None,
    seed: int = 0,
    record: str | None = None,
    protect: Any = None,
    importance: Any = None,
) -> Iterator[_T]:
    """A block in which attention processors of this library work: `with steps(pipe): pipe(...)`.

    Also for what `patch` has patched: there it marks one run, from the block's beginning to its end, for denoising
    loops written by hand and for calls of a bare denoiser.

    Args:
        target: a pipeline, or its denoiser, with processors of ours, or patched. At the end everything is as before.
        policy, seed, record, protect, importance: as in `patch`, which has them for what it has patched.

    Raises:
        StateError: it is patched, and has processors of ours too.
        UnsupportedError: it is neither, or what the processors shall do cannot be done.
        ConfigError: wrong arguments.
    """
    check_settings(seed, record)
    marked: list[Driver] = []
    made: list[Driver] = []
    for denoiser in denoisers(target):
        modules = ours(denoiser)
        if isinstance(driver := denoiser.__dict__.get("_tokred"), Driver):
            if any(PLACE not in vars(module) for module in modules.values()):
                raise StateError(
                    f"this {type(denoiser).__name__} is patched, and has attention processors of this library too: "
                    "unpatch it, or set back the processors that were there before"
                )
            marked.append(driver)
        elif modules:
            made.append(_plan(denoiser, modules, policy, seed, record, Regions(protect, importance)))
    if not marked and not made:
        raise UnsupportedError(
            f"{type(target).__name__} has no attention processor of this library, and is not patched. Install one "
            "first: model.set_attn_processor(ToMeAttnProcessor.around(model)), or tokred.patch. (Attention slicing, "
            "xFormers, fused projections and adapters put processors of their own in the place of ours.)"
        )
    if marked and (policy is not None or seed != 0 or record is not None or not (protect is importance is None)):
        raise ConfigError("policy, seed, record, protect and importance are the patch's: pass them to tokred.patch")
    whole = False
    try:
        for driver in marked:
            driver.finish(False)
        for driver in made:
            if target is not driver.denoiser:
                driver.tracker.watch(target)
            driver.install()
        yield target
        whole = True
    finally:
        for driver in marked + made:
            driver.finish(whole)
        for driver in made:
            warn_of(driver.remove())


class Steps(Driver):
    """A method at work in the attention processors of one denoiser."""

    places: list[tuple[Any, Place]]  # with the attention module

    def install(self) -> None:
        for module, place in self.places:
            place.enter(module.processor)
            if place.made is not None:
                self.ledger.replace(module, "processor", place.made)
            self.ledger.shadow(module, PLACE, place)
        super().install()

    def act(self, site: Site) -> None:
        """The processor does, by its place."""

    def remove(self) -> list[str]:
        left = super().remove()
        for _, place in self.places:
            place.leave()
        return left


def _plan(
    denoiser: nn.Module, modules: dict[str, Any], policy: Any, seed: int, record: str | None, regions: Regions
) -> Steps:
    """Everything checked, nothing changed."""
    config, *others = dict.fromkeys(module.processor.tokred_config for module in modules.values())
    if others:
        raise UnsupportedError(
            f"the attention processors of this {type(denoiser).__name__} have {1 + len(others)} different configs, and "
            f"a denoiser has one method at a time: {config}; {others[0]}. Where only the ratio differs, a policy can "
            "depend on level and block"
        )
    method, rule = heeding(make_method(config).on(_KINDS), regions), rule_of(config, policy)
    known = places(denoiser, modules)
    by_module = {id(modules[name]): place for name, place in known.items()}
    backbone = backbone_of(denoiser)
    layout = backbone.layout(denoiser)
    able = [s for s in layout.sites if s.kind in _KINDS and method.wants(s) and method.needs(s.kind) <= s.offers]
    sites = [site for site in able if id(site.module) in by_module]
    if able and not sites:
        raise UnsupportedError(f"no processor of {method.name} is where these options act: {able[0].name}, ...")
    for kind, option in method.asks().items():
        if sites and kind not in {site.kind for site in sites}:
            raise UnsupportedError(
                f"{option} matches nothing, no {kind} has a processor of {method.name}: leave it out"
            )
    try:
        for site in sites:
            by_module[id(site.module)].use(site, method.apply)
        verify(denoiser, layout, sites, method)
        check_fit(rule, denoiser, sites, method)
    except BaseException:
        for place in known.values():
            place.leave()
        raise
    driver = Steps(denoiser, backbone, layout, sites, method, rule, seed, record, None, regions)
    driver.places = [(modules[name], place) for name, place in known.items()]
    return driver

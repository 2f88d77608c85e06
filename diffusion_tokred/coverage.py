"""`coverage`: what each method can do at each kind of site of each family, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from .backbones import BACKBONES, Backbone
from .methods import METHODS, Method, make_method
from .patching import config_of, kinds_of, why_not
from .runtime.site import OFFERS


@dataclass(frozen=True)
class Cell:
    """A method at one kind of site of one family.

    Attributes:
        method, kind, backbone: names.
        reason: why it cannot work there; None if it can.
        absent: True if the family has no such site: there is nothing to refuse.
        limits: what does not work there although the method does, with the reason: values of options, and some of the
            sites, (("mode='area'", "..."), ("all its sites", "...")).
        only: the option with which it works there, where it does not by default: "mode='faithful'".
    """

    method: str
    kind: str
    backbone: str
    reason: str | None
    absent: bool = False
    limits: tuple[tuple[str, str], ...] = ()
    only: str = ""

    @property
    def works(self) -> bool:
        return self.reason is None


def coverage() -> list[Cell]:
    """Every (method, site, backbone): works, or why not. For one model and its sizes ask `explain`."""
    return [
        _cell(name, kind, backbone) for name in METHODS for kind in kinds_of(name) for backbone in BACKBONES.values()
    ]


def _cell(name: str, kind: str, backbone: Backbone) -> Cell:
    absent = not any(site.kind == kind for site in backbone.sites)
    kinds = {site.kind for site in backbone.sites}
    if absent or kind in make_method(config_of(name)()).on(kinds).kinds:
        reason = _refusal(make_method(config_of(name)()), backbone, kind)
        limits = () if reason else (*_limits(name, kind, backbone), *_some(name, kind, backbone))
        return Cell(name, kind, backbone.name, reason, absent, limits)
    for option, method in _others(name):  # another form of it
        if kind in method.on(kinds).kinds and not _refusal(method, backbone, kind):
            return Cell(name, kind, backbone.name, None, only=option)
    return Cell(name, kind, backbone.name, f"{name} does not act on {kind}", True)


def _some(name: str, kind: str, backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Sites of the kind that are left alone, where others are used."""
    needs = make_method(config_of(name)()).on({site.kind for site in backbone.sites}).needs(kind)
    for site in backbone.sites:
        if site.kind == kind and (missing := needs - site.offers):
            yield "all its sites", "; ".join(site.lacks.get(need, OFFERS[need]) for need in sorted(missing))


def _limits(name: str, kind: str, backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Options that ask for more than the default does: those with a list of values to choose from."""
    kinds = {site.kind for site in backbone.sites}
    for option, method in _others(name):
        if kind in method.on(kinds).kinds and (reason := _refusal(method, backbone, kind)):
            yield option, reason


def _refusal(method: Method, backbone: Backbone, kind: str) -> str | None:
    """Why not: there, or, for a method that acts everywhere or not at all, elsewhere."""
    there = {site.kind for site in backbone.sites}
    form = method.on(there)
    kinds = [kind, *(other for other in form.kinds if form.whole and other in there)]
    return next((reason for k in kinds if (reason := why_not(method, backbone, k))), None)


def _others(name: str) -> Iterator[tuple[str, Method]]:
    """The method with each value of its options that have a list of them."""
    config = config_of(name)
    for field in fields(config):
        for value in field.metadata.get("choices", ()):
            yield f"{field.name}={value!r}", make_method(config(**{field.name: value}))

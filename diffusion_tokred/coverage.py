"""`coverage`: what each method can do at each kind of site of each family, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from .backbones import BACKBONES, Backbone
from .methods import METHODS, Method
from .patching import config_of, why_not
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
    """

    method: str
    kind: str
    backbone: str
    reason: str | None
    absent: bool = False
    limits: tuple[tuple[str, str], ...] = ()

    @property
    def works(self) -> bool:
        return self.reason is None


def coverage() -> list[Cell]:
    """Every (method, site, backbone): works, or why not. For one model and its sizes ask `explain`."""
    return [
        _cell(name, kind, backbone)
        for name, method in METHODS.items()
        for kind in method.kinds
        for backbone in BACKBONES.values()
    ]


def _cell(name: str, kind: str, backbone: Backbone) -> Cell:
    reason = why_not(METHODS[name](config_of(name)()), backbone, kind)
    absent = not any(site.kind == kind for site in backbone.sites)
    limits = () if reason else (*_limits(name, kind, backbone), *_some(name, kind, backbone))
    return Cell(name, kind, backbone.name, reason, absent, limits)


def _some(name: str, kind: str, backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Sites of the kind that are left alone, where others are used."""
    needs = METHODS[name](config_of(name)()).needs(kind)
    for site in backbone.sites:
        if site.kind == kind and (missing := needs - site.offers):
            yield "all its sites", "; ".join(site.lacks.get(need, OFFERS[need]) for need in sorted(missing))


def _limits(name: str, kind: str, backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Options that ask for more than the default does: those with a list of values to choose from."""
    config = config_of(name)
    for field in fields(config):
        for value in field.metadata.get("choices", ()):
            method: Method = METHODS[name](config(**{field.name: value}))
            if reason := why_not(method, backbone, kind):
                yield f"{field.name}={value!r}", reason

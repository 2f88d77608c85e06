"""Selectors: scores (R, N) by which a stack's tokens are chosen; large means compute. R is 1, or the images of a batch.

They run eagerly at the root, before a step. Both halves of a guidance pair share their rows: what needs the output
takes the conditional half, which pipelines put last; what needs keys or values takes the mean over the halves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..runtime.site import Site
from ..runtime.stack import StackSite
from ..tokens import draw
from ..tokens.scores import change, deviation, norms
from ..tokens.select import tie

SELECTORS: dict[str, Callable[[Site], Tensor]] = {}


def _selector(function: Callable[[Site], Tensor]) -> Callable[[Site], Tensor]:
    SELECTORS[function.__name__.strip("_")] = function
    return function


@_selector
def random(site: Site) -> Tensor:
    """Uniform on [0, 1), anew at each step, the same for all samples."""
    level = site.level
    assert level.grid is not None and level.key is not None
    n = level.grid[0] * level.grid[1]
    return draw(level.key, n, 1 << 24).float()[None] / (1 << 24)


@_selector
def age(site: Site) -> Tensor:
    """Steps since a token was computed: a round-robin."""
    slot = site.level.memory.slots[site.name]
    assert slot.age is not None
    return tie(slot.age.float(), site.level.halves)


@_selector
def drift(site: Site) -> Tensor:
    """How far a token's residual has moved since it was computed, if it goes on as fast as it was last seen to."""
    slot = site.level.memory.slots[site.name]
    assert slot.age is not None
    if slot.rate is None:  # nothing seen yet
        return random(site)
    assert slot.since is not None and site.level.pace is not None
    return tie(slot.rate * (slot.since + site.level.pace), site.level.halves)


@_selector
def value(site: Site) -> Tensor:
    """DuCa (arXiv 2412.18911): tokens whose values are small, over all attentions."""
    return _kept(site, 1)


@_selector
def key(site: Site) -> Tensor:
    """Tokens whose keys are small: these take less attention."""
    return _kept(site, 0)


@_selector
def noise_change(site: Site) -> Tensor:
    """CAT (arXiv 2502.00433): how much the predicted noise has changed since the last step."""
    notes = site.level.memory.notes
    if "before" not in notes:
        return random(site)
    return change(conditional(site, notes["output"]), conditional(site, notes["before"]))


@_selector
def noise_deviation(site: Site) -> Tensor:
    """RAS (arXiv 2502.10389): standard deviation of the predicted noise over a token's channels. Background has more,
    so the tokens with *less* are computed."""
    return -deviation(conditional(site, site.level.memory.notes["output"]))


def conditional(site: Site, output: Tensor) -> Tensor:
    """The last of the equal parts of a batch: (B, N, F) -> (B / halves, N, F)."""
    return output[len(output) - len(output) // site.level.halves :]


def _kept(site: Site, place: int) -> Tensor:
    """By the norms of the kept keys (0) or values (1) of the last full step; large where these are small."""
    assert isinstance(site, StackSite)
    memory, name = site.level.memory, f"norms {place}"
    full, score = memory.notes.get(name, (None, None))
    if full != memory.clock.full:
        caches = [(a.module.heads, memory.slots[a.name].cache.stored) for a in site.attentions]
        found = [
            norms(stored[place].unflatten(2, (heads, -1)).transpose(1, 2))
            for heads, stored in caches
            if stored  # skip-layer guidance leaves blocks out
        ]
        memory.notes[name] = memory.clock.full, (score := torch.stack(found).mean(0))
    return tie(score, site.level.halves)

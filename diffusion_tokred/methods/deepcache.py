"""DeepCache: between full steps, the inner part of a UNet is reused (arXiv 2312.00858)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.deep import DeepSite
from ..runtime.rows import packed
from ..runtime.site import Site
from ..runtime.stack import PairCall
from ..runtime.work import Work
from ..tokens.forecast import extrapolate, factors
from .base import option, register_method
from .caching import CacheConfig, CacheMethod


@dataclass(frozen=True)
class DeepCacheConfig(CacheConfig):
    """DeepCache (arXiv 2312.00858): the outer layers of a UNet run at every step, the inner ones every few steps.

    `order` and `damping` are this library's: with order 1 the inner output goes on as it last changed, by finite
    differences as in TaylorSeer (arXiv 2503.06923), and `damping` shortens the way.
    """

    warmup: int = option(1, "first steps of a run, which are full", low=1, high=1000)
    branch: int = option(
        0, "layers of the way down that run at every step, downsamplers counted, and one more on the way up; the "
        "release's cache_branch_id", low=0, high=100,
    )  # fmt: skip
    order: int = option(
        0, "order of the inner output's forecast; 0 reuses it, as published, 1 is linear", low=0, high=4
    )
    damping: float = option(
        0.4, "how much of the way the forecast goes: 1 to the step itself, 0 nowhere (the inner output bends soon)",
        low=0.0, high=2.0,
    )  # fmt: skip

    @property
    def asks(self) -> str:
        return "forecast" if self.order and self.interval > 1 else super().asks


@register_method("deepcache", DeepCacheConfig)
class DeepCache(CacheMethod):
    """What comes up from the inner part is kept whole. With `branch=0`, `conv_in`, the last layer of the way up and
    what follows it are all that runs between full steps."""

    paper = "DeepCache: Accelerating Diffusion Models for Free, arXiv 2312.00858"
    kinds = ("deep",)
    modes = ("full", "reuse", "forecast")
    config: DeepCacheConfig

    def wants(self, site: Site) -> bool:
        return site.kind == "deep"

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset()

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        for site in sites:
            assert isinstance(site, DeepSite)
            site.divide(self.config.branch)

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        return Work(0, 0, text=False)

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        assert isinstance(site, DeepSite)
        return (1 + self.config.order) * batch * site.pixels(grid) * site.width * dtype.itemsize

    def leave(self, call: PairCall, y: Tensor | None) -> Tensor:
        slot, gap, mode = call.slot, call.level.gap, call.plan.mode
        assert gap is not None
        if y is not None:
            order = self.config.order
            before = [part.to(y.dtype) for part in slot.factors] if order else ()
            slot.factors = [packed(part, self.store) for part in factors(y, before, gap, order)]
            slot.dtype = y.dtype
            return y
        kept = slot.factors if mode == "forecast" else slot.factors[:1]
        call.note(lambda: _states(call, len(kept[0]), 3 if mode == "forecast" else 2))
        found = extrapolate([part.to(slot.dtype) for part in kept], gap * self.config.damping)
        return found.clone() if found is kept[0] else found  # others may write into it


def _states(call: PairCall, batch: int, state: int) -> Tensor:
    grid, gap = call.level.grid, call.level.gap
    assert grid is not None and gap is not None
    return torch.full((batch, grid[0] * grid[1]), state, dtype=torch.uint8, device=gap.device)

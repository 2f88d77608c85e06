"""TaylorSeer: forecast what a module would compute, from its last full steps (arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.rows import Out
from ..runtime.site import Call, Site
from ..runtime.stack import StackCall
from ..runtime.store import Slot
from ..tokens.forecast import BASES, extrapolate, weights
from .base import option, register_method
from .caching import BLOCKS_HELP, CacheConfig, CacheMethod, ModuleCache, StackCache


@dataclass(frozen=True)
class ForecastConfig(CacheConfig):
    """Options of methods that forecast."""

    order: int = option(1, "order of the forecast; 0 reuses", low=0, high=4)
    basis: str = option(
        "lagrange", "the polynomial through the last full steps, however far apart; by differences, as published; or "
        "HiCache's (arXiv 2508.16984)", choices=("lagrange", *BASES),
    )  # fmt: skip
    damping: float = option(
        0.85, "lagrange: how much of the change since the last full step is taken; 1 is all, as published", low=0.0,
        high=2.0,
    )  # fmt: skip
    coordinate: str = option("step", "what outputs are a function of: the step, as published, or the noise level",
                             choices=("noise", "step"))  # fmt: skip

    mode_between = "forecast"


@dataclass(frozen=True)
class TaylorSeerConfig(ForecastConfig):
    """From reusing to forecasting (arXiv 2503.06923): between full steps, outputs follow their finite differences."""

    interval: int = option(4, "a full step every so many steps; 1 is dense", low=1, high=1000)
    what: str = option(
        "auto", "what is forecast: what all blocks add to a token together (the paper's lite form), or each module's "
        "output; auto is stack, and modules in UNets", choices=("auto", "stack", "modules"),
    )  # fmt: skip
    blocks: tuple[int, ...] = option((), BLOCKS_HELP)


class Forecast(CacheMethod):
    """What both forms share."""

    paper = "From Reusable to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923"
    modes = ("full", "forecast")
    config: Any

    @property
    def coordinate(self) -> str:  # type: ignore[override]
        return str(self.config.coordinate)

    def prepare(self, site: Site) -> Tensor | None:
        """What each of the last full steps counts now, (order + 1,)."""
        c, level = self.config, site.level
        if site.plan.mode != "forecast" or c.basis != "lagrange":
            return None
        clock, noise = level.memory.clock, c.coordinate == "noise"
        *nodes, place = clock.places([*clock.fulls(c.order + 1), max(clock.kinds)], noise)
        assert level.gap is not None
        counts = [c.damping * count for count in weights(nodes, place)]
        counts[0] += 1 - c.damping  # towards reusing the last one
        return torch.tensor(counts, dtype=torch.float32, device=level.gap.device)

    def renew(self, slot: Slot, out: Out, gap: Tensor) -> None:
        """Keep what a full step computed."""
        c = self.config
        slot.dtype = out.x.dtype
        if c.basis == "lagrange":
            slot.factors = [out.packed(self.store), *slot.factors[: c.order]]
            return
        found = [out]
        for before in slot.factors[: c.order]:
            before = self.widened(before, slot.dtype)
            found.append(found[-1].combine(lambda new, old: (new - old) / gap.to(new.dtype), before))
        slot.factors = [part.packed(self.store) for part in found]

    def counts(self, call: Call | StackCall) -> Tensor:
        """What `prepare` made."""
        found: Tensor = call.prepared
        return found

    def forecast(self, call: Call | StackCall) -> Out:
        """What it would compute now."""
        gap = call.level.gap
        assert gap is not None
        slot = call.slot
        first, *others = (self.widened(part, slot.dtype) for part in slot.factors)
        if not others:
            return first
        if self.config.basis == "lagrange":
            counts = self.counts(call)
            return first.combine(lambda *parts: _weighted(parts, counts), *others)
        return first.combine(lambda *parts: extrapolate(parts, gap, self.config.basis), *others)


@register_method("taylorseer", TaylorSeerConfig)
class TaylorSeer(Forecast, StackCache):
    """All blocks as one."""

    modes = ("full", "forecast")

    def on(self, kinds: Collection[str]) -> CacheMethod:
        modules = self.config.what == "modules" or (self.config.what == "auto" and "stack" not in kinds)
        return ModuleTaylorSeer(self.config) if modules else self

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset()

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        return (1 + self.config.order) * batch * grid[0] * grid[1] * site.width * dtype.itemsize

    def enter(self, call: StackCall) -> None:
        return None

    def leave(self, call: StackCall, y: Tensor | None) -> Tensor:
        if y is None:
            call.note(lambda: call.x.new_full(call.x.shape[:2], 3, dtype=torch.uint8))
            return call.x + self.forecast(call).x
        assert call.level.gap is not None
        self.renew(call.slot, Out(y - call.x), call.level.gap)
        return y


class ModuleTaylorSeer(Forecast, ModuleCache):
    """Attention and feed-forward by themselves, gated anew."""

    name = TaylorSeer.name
    modes = ("full", "forecast")

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        return (1 + self.config.order) * super().stored(site, grid, ratio, batch, dtype, text)

    def apply(self, call: Call) -> Out:
        if call.plan.mode != "full":
            call.note(lambda: call.x.new_full(call.x.shape[:2], 3, dtype=torch.uint8))
            return call.site.given(call, self.forecast(call))
        out = call.compute()
        assert call.level.gap is not None
        self.renew(call.slot, call.site.kept(call, out), call.level.gap)
        return out


def _weighted(parts: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Sum of the parts, by counts that add up to 1: equal parts give themselves, however few digits a count has."""
    first = total = parts[0]
    for i, part in enumerate(parts[1:], 1):
        total = torch.addcmul(total, part - first, counts[i].to(part.dtype))
    return total

"""ClusCa: a forecast, set right by one token of each cluster (arXiv 2509.10312)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..runtime.rows import Out, packed
from ..runtime.site import Call, Site
from ..runtime.stack import StackCall
from ..runtime.work import Work
from ..tokens import draw
from ..tokens.cluster import kmeans, one_of_each
from ..tokens.select import rows_at, untie
from .base import option, register_method
from .caching import BLOCKS_HELP
from .selectors import conditional
from .taylorseer import ForecastConfig, ModuleTaylorSeer


@dataclass(frozen=True)
class ClusCaConfig(ForecastConfig):
    """Cluster-driven feature caching (arXiv 2509.10312): as TaylorSeer, but between full steps each feed-forward runs
    on one token of each cluster, drawn anew in each layer, and the others follow it by a small `weight`."""

    interval: int = option(5, "a full step every so many steps; 1 is dense", low=1, high=1000)
    clusters: int = option(16, "number of clusters, and of tokens that a feed-forward computes", low=1, high=1024)
    weight: float = option(0.005, "what a computed token counts for the others of its cluster", low=0.0, high=1.0)
    iterations: int = option(10, "of k-means, after each full step", low=0, high=100)
    blocks: tuple[int, ...] = option((), BLOCKS_HELP)


@register_method("clusca", ClusCaConfig)
class ClusCa(ModuleTaylorSeer):
    """Differences from the release (read in Cache4Diffusion), all told: how far a forecast was off is kept beside it,
    and is forgotten at a full step (there the forecast itself is changed: a computed token is extrapolated again, and
    the next difference of full steps is one of changed features); tokens are clustered by what the last feed-forward is
    handed (there: by what its block returns), by Euclidean distances (there: L1, with the mean as the centre), from the
    centroids of the full step before; the halves of a guidance pair share their clusters and their draws; in joint
    attention the text stream's own feed-forward is computed."""

    paper = "Compute Only 16 Tokens in One Timestep: Cluster-Driven Feature Caching, arXiv 2509.10312"
    deaf = "tokens are drawn, one of each cluster, and its attention is forecast whole"
    ties = True
    plans_for = "interval"
    config: ClusCaConfig

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        super().begin(family, sites)
        found: dict[int, dict[str, Site]] = {}
        for site in sites:
            if site.kind == "feed_forward":
                found.setdefault(site.level.index, {})[site.name] = site
        if missing := sorted({site.level.index for site in sites} - set(found)):
            raise UnsupportedError(f"clusca computes tokens in feed-forwards, and there are none at level {missing[0]}")
        self._last = {level: [*here][-1] for level, here in found.items()}  # whose input is clustered
        self._layers = {level: len(here) for level, here in found.items()}
        self._place = {name: i for here in found.values() for i, name in enumerate(here)}

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset({"at"} if kind == "feed_forward" else ())

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        if site.kind != "feed_forward":
            return super().work(site, grid, ratio)
        return Work(min(self.config.clusters, math.prod(grid)))

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        rows = batch * math.prod(grid) * site.width * dtype.itemsize
        more = (site.kind == "feed_forward") + (site.name in self._last.values())
        return super().stored(site, grid, ratio, batch, dtype, text) + more * rows

    def prepare(self, site: Site) -> Any:
        """Counts of the forecast; the cluster of each token, (B, N); for each feed-forward a token of each cluster,
        (L, B, k), and how much a token follows it, (L, B, N): wholly where it is that token itself."""
        if site.plan.mode != "forecast":
            return None
        level, memory = site.level, site.level.memory
        assert level.grid is not None and level.key is not None
        n, halves = math.prod(level.grid), level.halves
        k, layers = min(self.config.clusters, n), self._layers[level.index]
        full, labels, centroids = memory.notes.get("clusters", (None, None, None))
        if full != memory.clock.full:
            points = memory.slots[self._last[level.index]].score
            assert points is not None
            labels, centroids = kmeans(conditional(site, points), k, self.config.iterations, centroids)
            memory.notes["clusters"] = memory.clock.full, labels, centroids
        at = one_of_each(draw(level.key, layers * n, 1 << 24).view(layers, 1, n), labels, k)
        itself = at.gather(2, labels.expand(layers, -1, -1)) == torch.arange(n, device=at.device)
        follow = torch.where(itself, 1.0, self.config.weight)
        at, follow = (rows.repeat(1, halves, 1) for rows in (at, follow))
        return super().prepare(site), untie(labels, halves), at, follow

    def counts(self, call: Call | StackCall) -> Tensor:
        found: Tensor = call.prepared[0]
        return found

    def apply(self, call: Call) -> Out:
        slot, site = call.slot, call.site
        full = call.plan.mode == "full"
        if site.kind != "feed_forward":  # what became of the tokens, feed-forwards say
            return super().apply(call) if full else site.given(call, self.forecast(call))
        if full:
            out = super().apply(call)
            slot.error = packed(torch.zeros_like(out.x), self.store)
            if site.name == self._last[call.level.index]:
                slot.score = packed(call.x, self.store)
            return out
        _, labels, every, follows = call.prepared
        at, follow = every[self._place[site.name]], follows[self._place[site.name]]
        b, n = call.x.shape[:2]
        call.note(lambda: call.x.new_full((b, n), 3, dtype=torch.uint8).scatter(1, at, 0))
        expected = self.forecast(call)
        computed = call.compute(rows_at(call.x, at), at=at)
        assert slot.error is not None
        near = expected.x + slot.error.to(expected.x.dtype)
        x = torch.lerp(near, rows_at(computed.x, labels), follow[..., None].to(near.dtype))
        slot.error = packed(x - expected.x, self.store)
        return site.given(call, Out(x, computed.rest, computed.head, computed.tail))

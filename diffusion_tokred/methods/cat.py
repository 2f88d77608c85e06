"""CAT Pruning: cluster-aware token pruning (arXiv 2502.00433). Where the noise changes most, and what is oldest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.site import Level, Site
from ..schedule.intervals import cat_counts
from ..tokens.cluster import cat_select, features, kmeans, pool, spread
from ..tokens.regions import lifted
from ..tokens.scores import change
from ..tokens.select import untie
from .base import option, register_method
from .caching import BLOCKS_HELP, CHOICE, CacheMethod, StackCache, TokenCache, TokenConfig
from .selectors import conditional


@dataclass(frozen=True)
class CATConfig(TokenConfig):
    """Cluster-aware token pruning (arXiv 2502.00433).

    At the end of the warm-up the tokens are clustered by place and predicted noise, once. From then on a step computes
    a fixed number of tokens: most of it those that were chosen least often, the rest the most changed of the hottest
    clusters. The released code drops some of these by their place in the picture, pools with a sign, and knows one
    grid; here the counts are exact, clusters are pooled by magnitude, and any grid will do.

    `mode="packed"` runs the chosen tokens through all blocks. `mode="faithful"` is the paper's: all tokens pass the
    norms and residuals of each block, and in its attention and feed-forward only the chosen ones are computed, against
    kept keys and values; in UNets, at the level with the most tokens.
    """

    ratio: float = option(0.7, "share of tokens left out after the warm-up; the paper computes 0.3", low=0.0, high=0.99)
    interval: int = option(
        1000, "a full step every so many steps; the paper has none after the warm-up", low=1, high=1000
    )
    warmup: int = option(8, "first steps of a run, which are full", low=2, high=1000)
    mode: str = option("auto", "all blocks on one set of tokens, or as published; auto is packed, in UNets faithful",
                       choices=("auto", "packed", "faithful"))  # fmt: skip
    clusters: int = option(20, "number of clusters", low=1, high=256)
    hot: float = option(0.25, "share of the computed tokens that go to the hottest clusters", low=0.0, high=1.0)
    iterations: int = option(10, "of k-means", low=1, high=100)
    blocks: tuple[int, ...] = option((), BLOCKS_HELP)


class Clusters(CacheMethod):
    """The choice of tokens."""

    paper = "CAT Pruning: Cluster-Aware Token Pruning For Text-to-Image Diffusion Models, arXiv 2502.00433"
    watches_output = True
    plans_for = "run"
    heeds = CHOICE
    config: CATConfig

    def observe(self, level: Level, output: Tensor, index: int) -> None:
        notes = level.memory.notes
        notes["output"] = output
        if index == self.config.warmup - 2 or "origin" not in notes:
            notes["origin"] = output  # what changes are measured from

    def select(self, site: Site, m: int) -> Tensor:
        c, level = self.config, site.level
        notes, grid = level.memory.notes, level.grid
        assert grid is not None
        noise = conditional(site, notes["output"])
        delta = change(noise, conditional(site, notes["origin"]))
        delta, first_of_all = lifted(delta, level.weights), level.guard and level.guard.tokens
        k: int = notes.setdefault("clusters", min(c.clusters, m))  # a policy may change m later
        first = "labels" not in notes
        if first:
            notes["labels"], _ = kmeans(features(noise - conditional(site, notes["origin"]), grid), k, c.iterations)
            notes["counts"] = torch.zeros_like(delta)
        labels, counts = notes["labels"], notes["counts"]
        budget = cat_counts(grid[0] * grid[1], m / (grid[0] * grid[1]), c.hot)
        heat = pool(delta, labels, k)
        if first:
            heat = spread(heat, labels, grid)
            at = cat_select(delta, labels, counts, m, k, m, (budget.first_cap,), heat, first_of_all)
        else:
            at = cat_select(delta, labels, counts, m, k, budget.hot, budget.caps, heat, first_of_all)
        notes["counts"] = (0.5 * counts).scatter_add(1, at, torch.ones_like(at, dtype=counts.dtype))
        return at if len(at) == 1 else untie(at, level.halves)


@register_method("cat", CATConfig)
class CAT(Clusters, StackCache):
    """The packed form."""

    def on(self, kinds: Collection[str]) -> CacheMethod:
        faithful = self.config.mode == "faithful" or (self.config.mode == "auto" and "stack" not in kinds)
        return FaithfulCAT(self.config) if faithful else self


class FaithfulCAT(Clusters, TokenCache):
    """As published, module by module."""

    name = CAT.name

    def wants(self, site: Site) -> bool:
        return super().wants(site) and site.level.index == 0

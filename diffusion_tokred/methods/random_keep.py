"""Random keep: run a module on a random subset of the tokens; the others copy the nearest kept one. A baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..runtime.rows import Out
from ..runtime.site import Call, Site
from ..runtime.work import Work
from ..tokens import draw
from .base import Method, MethodConfig, option, register_method


@dataclass(frozen=True)
class RandomKeepConfig(MethodConfig):
    """A random subset of the tokens, anew at each step: what a method that chooses has to beat."""

    ratio: float = option(0.5, "share of tokens dropped; 0 is dense", low=0.0, high=0.99)
    levels: tuple[int, ...] = option((0,), "attention levels, 0 the largest")
    attention: bool = option(True, "drop around self-attention, and around blocks that are attention and MLP in one")
    cross_attention: bool = option(False, "drop around cross-attention")
    feed_forward: bool = option(False, "drop around the feed-forward")

    @property
    def share(self) -> float:
        return self.ratio


@register_method("random-keep", RandomKeepConfig)
class RandomKeep(Method):
    paper = "none: a baseline"
    kinds = ("attention", "cross_attention", "feed_forward", "parallel")
    heeds = frozenset({"protect", "importance"})
    shares_rows = True
    config: RandomKeepConfig

    def wants(self, site: Site) -> bool:
        option = "attention" if site.kind == "parallel" else site.kind
        return getattr(self.config, option, False) and site.level.index in self.config.levels

    def asks(self) -> dict[str, str]:
        return {kind: kind for kind in ("cross_attention", "feed_forward") if getattr(self.config, kind)}

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset({"at"})

    def check(self, ratio: float) -> None:
        if not 0 <= ratio <= 0.99:
            raise ConfigError(f"random-keep: ratio {ratio:g} is not in [0, 0.99]")

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        n = grid[0] * grid[1]
        return Work(n - int(n * ratio))

    def prepare(self, site: Site) -> tuple[Tensor, Tensor]:
        level, grid = site.level, site.level.grid
        assert grid is not None and level.key is not None  # set by the root, before each call of the denoiser
        return keep(
            level.key, *grid, self.work(site, grid, site.plan.ratio).queries, level.lift if level.marked else None
        )

    def apply(self, call: Call) -> Out:
        (at, slot), _ = call.prepared, call.grid  # the grid: an error if the tokens are not all there
        call.note(lambda: call.x.new_full(call.x.shape[:2], 4, dtype=torch.uint8).index_fill(1, at, 0))  # 4: pruned
        return call.compute(call.x.index_select(1, at), at=at).map(lambda y: y.index_select(1, slot))


def keep(key: Tensor, h: int, w: int, m: int, lift: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Draw `m` of h * w tokens: their positions (m,), ascending, and for each token the nearest of them, (h * w,)."""
    n = h * w
    place = torch.arange(n, device=key.device)
    rank = draw(key, n, 1 << 31) * n + place  # no two are equal
    if lift is not None:
        rank = -lift(-rank[None], shared=True)[0]
    at = rank.topk(m, largest=False, sorted=False).indices.sort().values
    # d² n + the kept token's number: the least is the nearest, and of equally near ones the first. First along the
    # rows, then along the columns: n (h + w) sums, where comparing each token with each kept one takes n m.
    cost = torch.full_like(place, 1 << 62).index_copy_(0, at, place[:m]).view(h, w)
    y, x = place[:h], place[:w]
    cost = (cost[:, None, :] + (x[:, None] - x) ** 2 * n).amin(2)
    cost = (cost + ((y[:, None] - y) ** 2 * n)[:, :, None]).amin(1)
    return at, (cost % n).flatten()

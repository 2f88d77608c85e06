"""ToDo: all queries, but keys and values from a downsampled grid; nothing to match or undo (arXiv 2402.13573)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigError
from ..runtime.rows import KV, Out
from ..runtime.site import Call, Site
from ..runtime.work import Work
from ..tokens import MODES, compact, downsample, pooled_grid, positions
from .base import Method, MethodConfig, option, register_method


@dataclass(frozen=True)
class ToDoConfig(MethodConfig):
    """Token downsampling (arXiv 2402.13573). The defaults are the paper's: factor 2, nearest, largest level.

    Keys and values come from the token grid pooled by `factor` on each side; every token still asks. The ratio, the
    share of tokens without keys and values of their own, is 1 - 1 / factor**2.
    """

    factor: int = option(2, "pooling factor a side; the authors' for 1024, 1536, 2048 px: 2, 3, 4", low=1, high=64)
    levels: tuple[int, ...] = option((0,), "attention levels, 0 the largest")
    mode: str = option("nearest", "how the grid is pooled", choices=MODES)

    @property
    def share(self) -> float:
        return 1 - 1 / self.factor**2


@register_method("todo", ToDoConfig)
class ToDo(Method):
    paper = "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images, arXiv 2402.13573"
    kinds = ("attention",)
    every = 2**31  # which tokens are kept is the same at every step
    heeds = frozenset({"protect"})
    deaf = "it keeps tokens by their place alone"
    shares_rows = True
    config: ToDoConfig

    def wants(self, site: Site) -> bool:
        return site.kind == "attention" and site.level.index in self.config.levels

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset({"kv_select" if self.config.mode in MODES[:2] else "kv"})

    def check(self, ratio: float) -> None:
        _factor(ratio)

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        h, w = pooled_grid(*grid, _factor(ratio))
        return Work(grid[0] * grid[1], h * w + self._own(site, grid, ratio))

    def spare(self, site: Site, mode: str, ratio: float) -> tuple[str, float]:
        return mode, ratio  # protected tokens keep keys and values of their own, beside those of the pooled grid

    def _own(self, site: Site, grid: tuple[int, int], ratio: float) -> int:
        """Protected tokens that get keys and values beside those of the pooled grid."""
        guard, mode, factor = site.level.guard, self.config.mode, _factor(ratio)
        if guard is None:
            return 0

        def count(tokens: Tensor) -> int:
            own = tokens.any(0)
            return int((own.index_fill(0, positions(*grid, factor, mode), False) if mode in MODES[:2] else own).sum())

        return guard.once((factor, mode), count)

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        kept = self.work(site, grid, ratio).keys
        return 8 * kept if site.leader and self.config.mode in MODES[:2] else 0

    def prepare(self, site: Site) -> KV:
        level, mode, factor = site.level, self.config.mode, _factor(site.plan.ratio)
        assert level.grid is not None and level.key is not None  # set by the root
        h, w = level.grid
        at = positions(h, w, factor, mode, level.key.device) if mode in MODES[:2] else None
        pool = partial(downsample, h=h, w=w, factor=factor, mode=mode)
        if level.guard is None:
            return KV(pool, at)
        count, own = self._own(site, level.grid, site.plan.ratio), level.guard.shared[0]
        if at is None:
            return KV(partial(_pooled, pool=pool, own=compact(own, count)))
        at = compact(own.index_fill(0, at, True), len(at) + count)
        return KV(partial(torch.index_select, dim=1, index=at), at)

    def apply(self, call: Call) -> Out:
        kv, _ = call.prepared, call.grid  # the grid: an error if the tokens are not all there
        call.note(partial(_status, call.x, kv.at))
        return call.compute(kv=kv)


def _factor(ratio: float) -> int:
    factor = round((1 - ratio) ** -0.5) if 0 <= ratio < 1 else 0
    if factor < 1 or abs(1 - 1 / factor**2 - ratio) > 1e-3:
        raise ConfigError(
            f"todo: ratio {ratio:g} is not that of a whole pooling factor: 0, 0.75, 0.8889, 0.9375, ... (1 - 1/factor²)"
        )
    return factor


def _pooled(x: Tensor, pool: Callable[[Tensor], Tensor], own: Tensor) -> Tensor:
    """The pooled tokens, and after them those at `own`."""
    return torch.cat([pool(x), x.index_select(1, own)], 1)


def _status(x: Tensor, at: Tensor | None) -> Tensor:
    """Tokens without keys and values of their own: pruned where some were chosen, merged where they were averaged."""
    status = torch.full(x.shape[:2], 1 if at is None else 4, dtype=torch.uint8, device=x.device)
    return status if at is None else status.index_fill(1, at, 0)

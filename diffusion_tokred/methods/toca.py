"""ToCa: token-wise feature caching (arXiv 2410.05317). Between full steps some tokens are computed, others reused."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..runtime.rows import Attended, Out
from ..runtime.site import Call, Site
from ..runtime.store import Clock
from ..runtime.work import Work
from ..schedule.intervals import is_full, toca_share
from ..tokens import draw
from ..tokens.scores import bonus, entropy, normalise, norms, received
from ..tokens.select import rows_at, scatter_rows, tie, top, untie
from .base import option, register_method
from .caching import CacheMethod, ModuleCache, StackCache, TokenConfig
from .selectors import SELECTORS, age, ranked

SCORES = ("attention", "entropy", "value", "key", "random")


@dataclass(frozen=True)
class ToCaConfig(TokenConfig):
    """Token-wise feature caching (arXiv 2410.05317).

    The defaults of interval and ratio were chosen on toy-dit (docs/benchmarks.md); the paper has intervals of 3 to 6.

    `mode="packed"` runs one set of tokens a step through all blocks, with the keys and values of the others kept.
    `mode="faithful"` is the paper's: self-attention is reused whole, feed-forward and cross-attention run on tokens
    that each layer chooses by itself, with the released schedules of intervals and ratios of DiT, PixArt and FLUX.
    """

    interval: int = option(2, "a full step every so many steps; 1 is dense", low=1, high=1000)
    ratio: float = option(
        0.875, "share of tokens that are reused between full steps; the paper's 1 - R", low=0.0, high=0.99
    )
    mode: str = option("auto", "all blocks on one set of tokens, or as published; auto is packed, in UNets faithful",
                       choices=("auto", "packed", "faithful"))  # fmt: skip
    select: str = option("drift", "packed: what tokens are chosen by", choices=tuple(SELECTORS))
    forecast: bool = option(True, "packed: reused tokens move on as they last did, instead of standing still")
    coordinate: str = option("step", "packed: what a forecast is a function of, the step or the noise level",
                             choices=("noise", "step"))  # fmt: skip
    score: str = option("value", "faithful: attention received (s1), entropy of cross-attention (s2), norms, or random",
                        choices=SCORES)  # fmt: skip
    schedule: str = option("auto", "faithful: whose intervals and ratios; auto goes by the model",
                           choices=("auto", "default", "dit", "dit-ddpm", "pixart", "flux"))  # fmt: skip
    age_weight: float = option(0.25, "what a token's age counts, in base intervals (s3)", low=0.0, high=100.0)
    bonus: float = option(
        0.0, "what the best of each cell gets more (s4); the releases have 0.6 (DiT) and 0.4", low=0.0, high=10.0
    )
    cell: int = option(4, "side of such a cell, in tokens; the releases have 2 (DiT) and 4 (PixArt)", low=1, high=64)


@register_method("toca", ToCaConfig)
class ToCa(StackCache):
    """The packed form."""

    paper = "Accelerating Diffusion Transformers with Token-wise Feature Caching, arXiv 2410.05317"
    config: Any

    def on(self, kinds: Collection[str]) -> CacheMethod:
        faithful = self.config.mode == "faithful" or (self.config.mode == "auto" and "stack" not in kinds)
        return FaithfulToCa(self.config) if faithful else self

    @property
    def forecasts(self) -> bool:
        return bool(self.config.forecast)

    @property
    def coordinate(self) -> str:  # type: ignore[override]
        return str(self.config.coordinate)

    @property
    def tracks(self) -> bool:
        return bool(self.config.select == "drift")

    @property
    def watches_output(self) -> bool:  # type: ignore[override]
        return self.config.select.startswith("noise")

    def select(self, site: Site, m: int) -> Tensor:
        c, level = self.config, site.level
        assert level.grid is not None
        scores = ranked(SELECTORS[c.select](site)) + c.age_weight * age(site) / c.interval
        at = top(bonus(scores, level.grid, c.cell, c.bonus) if c.bonus else scores, m)
        return at if len(at) == 1 else untie(at, level.halves)


class FaithfulToCa(ModuleCache):
    """As published, module by module. Differences, all told: the two halves of a guidance pair share their rows in all
    models (the DiT release does not); depth is relative, for models of any depth; text is computed whole, and only what
    it attends to is reused (the FLUX release chooses among its rows, too); FLUX's single blocks project the queries of
    chosen tokens, which nobody needs, as their module does not come apart."""

    name, paper = ToCa.name, ToCa.paper
    modes = ("full", "reduce", "reuse")
    config: ToCaConfig
    _family = "default"

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        c = self.config
        known = ("dit", "pixart", "flux")
        self._family = c.schedule if c.schedule != "auto" else family if family in known else "default"
        self._layers = {
            kind: 1 + max(s.block.index for s in sites if s.kind == kind) for kind in {s.kind for s in sites}
        }
        wanted = "cross_attention" if c.score == "entropy" else "attention"
        scored = {wanted, "parallel"} - ({"parallel"} if c.score == "entropy" else set())
        self._scorers = {s.block.index: s.name for s in sites if s.kind in scored}
        if not self._scorers and c.score != "random":
            raise UnsupportedError(f"toca: score={c.score!r} needs {wanted.replace('_', '-')}, and there is none here")

    def needs(self, kind: str) -> frozenset[str]:
        if kind == "cross_attention" and self.config.score == "entropy":
            return frozenset({"at", "queries"})
        if kind in ("feed_forward", "cross_attention"):
            return frozenset({"at"})
        watches = kind in ("attention", "parallel") and self.config.score in ("attention", "value", "key")
        return frozenset({"watch"} if watches else ()) | ({"at", "attended"} if kind == "parallel" else set())

    def is_full(self, clock: Clock, index: int, total: int | None) -> bool:
        family = self._family if total is not None else "default"
        return is_full(index, total, clock.full, self.config.interval, family, self.config.warmup)

    def part(self, site: Site, index: int, total: int | None, mode: str, ratio: float) -> tuple[str, float]:
        if mode != "reduce":
            return mode, ratio
        layers = self._layers[site.kind]
        layer = min(site.block.index, layers - 1)
        family, place = (self._family, index) if total is not None else ("default", 0)
        share = toca_share(family, place, total or 1, layer, layers, site.kind, 1 - ratio)
        if share <= 0:
            return "reuse", 1.0
        return "reduce", 1 - share

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        if site.plan.mode != "reduce":
            return super().work(site, grid, ratio)
        # Only the attention inside of a block is handed tokens at such a step.
        return Work(_count(grid[0] * grid[1], ratio), attends=site.kind != "attention")

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        marks = 4 * batch * grid[0] * grid[1] * (site.kind != "attention")
        for inner in site.inner:
            marks += batch * (grid[0] * grid[1] + text) * inner.width * dtype.itemsize
        if site.name in self._scorers.values() and self.config.score != "random":
            marks += 4 * batch * grid[0] * grid[1]
        return super().stored(site, grid, ratio, batch, dtype, text) + marks

    def apply(self, call: Call) -> Out:
        slot, mode = call.slot, call.plan.mode
        if mode == "full":
            scored = self.config.score != "random" and self._scorers.get(call.block.index) == call.site.name
            if call.site.kind == "parallel":
                slot.cache = Attended()
            out = self._scored(call) if scored else call.compute(kv=slot.cache)
            slot.out = call.site.kept(call, out)
            if call.site.kind != "attention":
                slot.age = torch.zeros(call.x.shape[:2], dtype=torch.int32, device=call.x.device)
            return out
        if mode == "reuse":  # what became of the tokens, the feed-forward says
            return slot.out if call.site.kind == "attention" else super().apply(call)
        assert slot.age is not None
        since = slot.age + 1
        at = top(self._scores(call, since), _count(math.prod(call.grid), call.plan.ratio))
        at = at[0] if len(at) == 1 else untie(at, call.level.halves)
        scatter_rows(since[..., None], at, since.new_zeros(len(since), at.shape[-1], 1))
        slot.age = since
        call.note(lambda: torch.where(since == 0, 0, 2).to(torch.uint8))
        if slot.cache is not None:
            slot.cache.at = at
        out = call.compute(rows_at(call.x, at), at=at, kv=slot.cache)
        if slot.cache is not None:
            slot.cache.at = None  # of this step, not to be kept
        given = call.site.given(call, slot.out).renewed(at, out)
        slot.out = call.site.kept(call, given)
        return given

    def _scored(self, call: Call) -> Out:
        """Compute an attention, and keep the scores of its tokens."""
        c, slot = self.config, call.slot
        site: Any = call.site
        if c.score == "entropy":
            q, k, mask = site.queries(call)
            slot.score = entropy(q, k, mask) + 1
            return call.compute()

        def watch(q: Tensor, k: Tensor, v: Tensor) -> None:
            start, n = (site.inner[0] if site.inner else site).tap.start, call.x.shape[1]
            if c.score == "attention":
                slot.score = received(q, k)[:, start : start + n]
            else:
                slot.score = norms((k if c.score == "key" else v)[:, :, start : start + n])

        return call.compute(kv=slot.cache, watch=watch)

    def _scores(self, call: Call, since: Tensor) -> Tensor:
        """(R, N): s1 or s2, with s3 and s4."""
        c, level = self.config, call.level
        halves, n = level.halves, call.x.shape[1]
        if c.score == "random":
            assert level.key is not None
            base = draw(level.key + call.block.index, n, 1 << 24).float()[None] / (1 << 24) / n**0.5
            base = base.expand(len(since) // halves, n)
        else:
            score = level.memory.slots[self._scorers[call.block.index]].score
            assert score is not None
            base = normalise(tie(score, halves))
        scores = base + c.age_weight * tie(since.float(), halves) / c.interval
        return bonus(scores, call.grid, c.cell, c.bonus) if c.bonus else scores


def _count(n: int, ratio: float) -> int:
    """int(R N), as the paper has it: `ratio` is 1 - R."""
    return n - math.ceil(n * ratio - 1e-9)

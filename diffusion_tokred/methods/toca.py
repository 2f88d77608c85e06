"""ToCa: token-wise feature caching (arXiv 2410.05317). Between full steps some tokens are computed, others reused."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..runtime.rows import Attended, Cache, Out
from ..runtime.site import Call, Site
from ..runtime.store import Clock
from ..runtime.work import Work
from ..schedule.intervals import is_full, toca_share
from ..tokens import draw
from ..tokens.regions import ranked
from ..tokens.scores import bonus, entropy, normalise, norms, received
from ..tokens.select import rows_at, scatter_rows, tie, top, untie
from .base import option, register_method
from .caching import BLOCKS_HELP, CHOICE, CacheMethod, ModuleCache, StackCache, TokenConfig, chosen
from .selectors import SELECTORS, age

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
    blocks: tuple[int, ...] = option((), BLOCKS_HELP)


@register_method("toca", ToCaConfig)
class ToCa(StackCache):
    """The packed form."""

    paper = "Accelerating Diffusion Transformers with Token-wise Feature Caching, arXiv 2410.05317"
    heeds = CHOICE
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
        scores = bonus(scores, level.grid, c.cell, c.bonus) if c.bonus else scores
        at = top(level.lift(scores), m)
        return at if len(at) == 1 else untie(at, level.halves)


class FaithfulToCa(ModuleCache):
    """As published, module by module. Differences, all told: the two halves of a guidance pair share their rows in all
    models (the DiT release does not); depth is relative, for models of any depth; text is computed whole, and only what
    it attends to is reused (the FLUX release chooses among its rows, too); FLUX's single blocks project the queries of
    chosen tokens, which nobody needs, as their module does not come apart. Where tokens are protected, these are
    computed in self-attention too, against kept keys and values."""

    name, paper = ToCa.name, ToCa.paper
    heeds = CHOICE
    modes = ("full", "reduce", "reuse")
    ratios = None
    config: ToCaConfig
    _family = "default"

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        super().begin(family, sites)
        c = self.config
        known = ("dit", "pixart", "flux")
        self._family = c.schedule if c.schedule != "auto" else family if family in known else "default"
        self._layers = {
            kind: 1 + max(s.block.index for s in sites if s.kind == kind) for kind in {s.kind for s in sites}
        }
        self._tokenwise = {s.level.index for s in sites if s.kind != "attention"}
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
        found = {"watch"} if watches else set()
        return frozenset(
            found | ({"at", "attended"} if kind == "parallel" else set()) | ({"at", "cache"} if self.guarded else set())
        )

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

    def count(self, grid: tuple[int, int], ratio: float) -> int:
        return _count(grid[0] * grid[1], ratio)

    def snapped(self, grid: tuple[int, int], ratio: float) -> float:
        return ratio

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        if site.plan.mode != "reduce":
            return super().work(site, grid, ratio)
        n = grid[0] * grid[1]
        m = _count(n, ratio)
        if site.level.protected and site.kind == "attention":
            return Work(m, n, projected=m)
        # Only the attention inside of a block is handed tokens at such a step.
        return Work(m, attends=site.kind != "attention")

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        marks = 4 * batch * grid[0] * grid[1] * (site.kind != "attention")
        if site.name in self._scorers.values() and self.config.score != "random":
            marks += 4 * batch * grid[0] * grid[1]
        n = grid[0] * grid[1]
        for attention in (part for part in (site, *site.inner) if part.kind == "attention"):
            rows = 2 * n if site.level.protected else n + text if site.inner else 0
            marks += batch * rows * attention.width * dtype.itemsize
        return super().stored(site, grid, ratio, batch, dtype, text) + marks

    def prepare(self, site: Site) -> Tensor | None:
        """For attention: the protected tokens, and the first others for which there is room."""
        level = site.level
        if level.guard is None or level.grid is None:
            return None
        at = top(level.guard.tokens.float(), _count(math.prod(level.grid), site.plan.ratio))
        return chosen(at if len(at) == 1 else untie(at, level.halves))

    def apply(self, call: Call) -> Out:
        slot, mode, kind = call.slot, call.plan.mode, call.site.kind
        if mode == "full":
            scored = self.config.score != "random" and self._scorers.get(call.block.index) == call.site.name
            watch = self._score(call) if scored else None
            if kind == "attention" and call.level.protected:
                return self.token_wise(call, watch, whole=True)
            if kind == "parallel":
                slot.cache = Cache(dtype=self.store) if call.level.protected else Attended(self.store)
            out = call.compute(kv=slot.cache, watch=watch)
            slot.out = self.pack(slot, call.site.kept(call, out))
            if kind != "attention":
                slot.age = torch.zeros(call.x.shape[:2], dtype=torch.int32, device=call.x.device)
            return out
        if kind == "attention" and call.level.index in self._tokenwise:  # which say what became of the tokens
            return self.token_wise(call) if mode == "reduce" else self.given(call)
        if mode == "reuse":
            return super().apply(call)
        if kind == "attention":
            at, (b, n) = call.prepared, call.x.shape[:2]
            call.note(lambda: call.x.new_full((b, n), 2, dtype=torch.uint8).scatter(1, at.expand(b, -1), 0))
            return self.token_wise(call)
        assert slot.age is not None
        since = slot.age + 1
        at = top(call.level.lift(self._scores(call, since)), self.count(call.grid, call.plan.ratio))
        at = at[0] if len(at) == 1 else untie(at, call.level.halves)
        scatter_rows(since[..., None], at, since.new_zeros(len(since), at.shape[-1], 1))
        slot.age = since
        call.note(lambda: torch.where(since == 0, 0, 2).to(torch.uint8))
        if slot.cache is not None:
            slot.cache.at = at
        out = call.compute(rows_at(call.x, at), at=at, kv=slot.cache)
        if slot.cache is not None:
            slot.cache.at = None  # of this step, not to be kept
        given = self.given(call).renewed(at, out)
        slot.out = self.pack(slot, call.site.kept(call, given))
        return given

    def _score(self, call: Call) -> Any:
        """Keep the scores of an attention's tokens: now, or by what is returned, when the attention is watched."""
        c, slot = self.config, call.slot
        site: Any = call.site
        if c.score == "entropy":
            q, k, mask = site.queries(call)
            slot.score = entropy(q, k, mask) + 1
            return None

        def watch(q: Tensor, k: Tensor, v: Tensor) -> None:
            start, n = (site.inner[0] if site.inner else site).tap.start, call.x.shape[1]
            if c.score == "attention":
                slot.score = received(q, k)[:, start : start + n]
            else:
                slot.score = norms((k if c.score == "key" else v)[:, :, start : start + n])

        return watch

    def align_of(self, n: int) -> int:
        return 1

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

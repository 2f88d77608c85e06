"""What the caching methods share: when a step is full, what a module gives back between two full steps, which tokens
of a stack are computed and what the others get.

A caching method is a *step policy* (`step`), a *selector* (`prepare`) and what is kept of a token (`enter`, `leave`,
`apply`). Two bases: `ModuleCache` works inside of the blocks, as the papers do; `StackCache` takes all blocks as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..runtime.rows import Cache, Out, packed
from ..runtime.site import Call, Level, Site
from ..runtime.stack import StackCall, StackSite
from ..runtime.store import Clock, Slot
from ..runtime.work import Work
from ..tokens.select import rows_at, scatter_rows
from .base import Method, MethodConfig, count, option

CHOICE = frozenset({"protect", "importance"})  # what methods heed that choose tokens
STORES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CacheConfig(MethodConfig):
    """Options that all caching methods have."""

    interval: int = option(3, "a full step every so many steps; 1 is dense", low=1, high=1000)
    warmup: int = option(3, "first steps of a run, which are full", low=1, high=1000)
    min_steps: int = option(9, "runs of fewer steps are computed in full: few steps differ too much", low=0, high=1000)
    store_dtype: str = option("auto", "type that what is kept is stored in; auto is the model's", choices=tuple(STORES))

    mode_between: ClassVar[str] = "reuse"

    @property
    def share(self) -> float:
        return float(self.interval > 1)

    @property
    def asks(self) -> str:
        return self.mode_between if self.interval > 1 else "full"


BLOCKS_HELP = "inside of the blocks: only these keep and reuse, the others are computed in full; () is all"


@dataclass(frozen=True)
class TokenConfig(CacheConfig):
    """Options of those that compute some of the tokens between full steps."""

    ratio: float = option(0.5, "share of tokens left out between full steps", low=0.0, high=0.99)
    align: int = option(128, "packed: counts are snapped down to it in large pictures", low=1, high=4096)

    @property
    def share(self) -> float:
        return self.ratio if self.interval > 1 else 0.0

    @property
    def asks(self) -> str:
        return "reduce"


class CacheMethod(Method):
    """A method that keeps what full steps compute, for the steps between them."""

    keeps = True
    modes: tuple[str, ...] = ("full", "reuse")
    shares = "mode"
    deaf = "between full steps it computes none of the tokens, so there are none to choose"
    config: Any

    def check(self, ratio: float) -> None:
        if not 0 <= ratio <= 1:
            raise ConfigError(f"{self.name}: ratio {ratio:g} is not in [0, 1]")

    def allow(self, mode: str, ratio: float) -> None:
        super().allow(mode, ratio)
        if mode in ("reuse", "forecast") and ratio != 1:
            raise ConfigError(
                f"{self.name}: a step in mode {mode!r} leaves out all tokens, so that its ratio is 1, found {ratio:g}; "
                "at some noise levels only: points of a policy"
            )

    @property
    def store(self) -> torch.dtype | None:  # type: ignore[override]
        return STORES[self.config.store_dtype]

    def widened(self, out: Out, dtype: torch.dtype) -> Out:
        """What was kept, for arithmetic, and back from it: in `dtype`, if it was packed at all."""
        return out if self.store is None else out.combine(lambda x: x.to(dtype))

    def lighter(self) -> str:
        return "with store_dtype='bfloat16', for one" if self.store is None else super().lighter()

    def rests(self, total: int | None) -> str | None:
        if total is None or total >= self.config.min_steps:
            return None
        return (
            f"{self.name} leaves this run of {total} steps as it is: its steps differ too much to be reused. "
            f"With min_steps={total} it acts all the same"
        )

    def step(self, clock: Clock, index: int, total: int | None, mode: str, ratio: float) -> tuple[str, float]:
        c = self.config
        if mode == "full" or c.interval == 1 or self.rests(total):
            return "full", 0.0
        if clock.full is None or index < c.warmup or self.is_full(clock, index, total):
            return "full", 0.0
        return self.between(clock, index, total, mode, ratio)

    def is_full(self, clock: Clock, index: int, total: int | None) -> bool:
        """Whether a step after the warm-up is computed in full."""
        assert clock.full is not None
        return index - clock.full >= self.config.interval

    def between(self, clock: Clock, index: int, total: int | None, mode: str, ratio: float) -> tuple[str, float]:
        """What a step between two full ones does."""
        return mode, ratio


class ModuleCache(CacheMethod):
    """Keeps what attention and feed-forward compute, before the gate: the block's residuals, norms and modulation are
    computed anew at every step."""

    kinds = ("attention", "cross_attention", "feed_forward", "parallel")
    whole = True

    def wants(self, site: Site) -> bool:
        levels, blocks = (getattr(self.config, name, ()) for name in ("levels", "blocks"))
        here = (not levels or site.level.index in levels) and (not blocks or site.block.index in blocks)
        return site.kind in self.kinds and here

    def leaves(self, site: Site) -> str:
        if site.kind in self.kinds and self.config.blocks and site.block.index not in self.config.blocks:
            return "not in blocks: computed in full"
        return super().leaves(site)

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        if lost := sorted({*self.config.blocks} - {site.block.index for site in sites}):
            raise ConfigError(f"{self.name}: blocks={self.config.blocks}: nothing to act on in block {lost[0]}")

    def lighter(self) -> str:
        return "with store_dtype='bfloat16', or with blocks=(...): only these keep"

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset()

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        return Work(0, 0, text=False)

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        n = grid[0] * grid[1] + site.beside(text)
        return batch * n * site.width * dtype.itemsize

    def apply(self, call: Call) -> Out:
        slot = call.slot
        if call.plan.mode == "full":
            out = call.compute()
            slot.out = self.pack(slot, call.site.kept(call, out))
            return out
        call.note(lambda: call.x.new_full(call.x.shape[:2], 2, dtype=torch.uint8))
        return self.given(call)

    def pack(self, slot: Slot, out: Out) -> Out:
        """An output as it is kept."""
        slot.dtype = out.x.dtype
        return out.packed(self.store)

    def given(self, call: Call) -> Out:
        """The output that is kept, for the model."""
        return call.site.given(call, self.widened(call.slot.out, call.slot.dtype))

    def token_wise(self, call: Call, watch: Any = None, whole: bool = False) -> Out:
        """A module that between full steps runs on the tokens `call.prepared`, attention against kept keys and values.

        `watch`: as in `Call.compute`, at full steps; `whole`: keep at these the text as well.
        """
        slot, cache = call.slot, None
        if call.site.kind in ("attention", "parallel"):
            slot.cache = cache = slot.cache or Cache(dtype=self.store)
        if call.plan.mode == "full":
            out = call.compute(kv=cache, watch=watch)
            slot.out = self.pack(slot, call.site.kept(call, out) if whole else out.image())
            return out
        at: Tensor = call.prepared
        if cache is not None:
            cache.at = at
        kept = self.widened(slot.out, slot.dtype)
        out = kept.renewed(at, call.compute(rows_at(call.x, at), at=at, kv=cache))
        slot.out = out.image().packed(self.store)
        if cache is not None:
            cache.at = None  # of this step, not to be kept
        return out


class TokenCache(ModuleCache):
    """Between full steps each module runs on the chosen tokens, the same in all modules: in attention they attend to
    the kept keys and values of all. The other rows of what a module gives back are as they were."""

    modes: tuple[str, ...] = ("full", "reduce")
    ratios = None
    shares = "ratio"
    heeds = CHOICE

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset({"at", "cache"} if kind in ("attention", "parallel") else {"at"})

    def count(self, grid: tuple[int, int], ratio: float) -> int:
        """Tokens computed, exactly as many as published."""
        return count(grid[0] * grid[1], ratio, 1)

    def align_of(self, n: int) -> int:
        return 1

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        m = self.count(grid, ratio)
        return Work(m, grid[0] * grid[1] if site.kind == "attention" else m, projected=m)

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        attention = next((part for part in (site, *site.inner) if part.kind == "attention"), None)
        kept = 2 * batch * grid[0] * grid[1] * attention.width * dtype.itemsize if attention else 0
        return kept + super().stored(site, grid, ratio, batch, dtype)  # text is computed at each step

    def prepare(self, site: Site) -> Any:
        assert site.level.grid is not None
        return chosen(self.select(site, self.count(site.level.grid, site.plan.ratio)))

    def select(self, site: Site, m: int) -> Tensor:
        """As `StackCache.select`."""
        raise NotImplementedError

    def apply(self, call: Call) -> Out:
        b, n = call.x.shape[:2]
        if call.plan.mode != "full":
            at: Tensor = call.prepared
            call.note(lambda: call.x.new_full((b, n), 2, dtype=torch.uint8).scatter(1, at.expand(b, -1), 0))
        return self.token_wise(call)


class StackCache(CacheMethod):
    """Keeps what all blocks together add to each token. Between full steps the chosen tokens run through all blocks,
    and attend to the kept keys and values of all; the others get what was added to them last, or its forecast."""

    kinds = ("stack",)
    modes: tuple[str, ...] = ("full", "reduce", "reuse")

    @property
    def forecasts(self) -> bool:
        """Whether tokens that are not computed go on moving as they last did."""
        return False

    @property
    def tracks(self) -> bool:
        """Whether it is kept how fast each token moves."""
        return False

    def observe(self, level: Level, output: Tensor, index: int) -> None:
        notes = level.memory.notes
        if "output" in notes:
            notes["before"] = notes["output"]
        notes["output"] = output

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        if getattr(self.config, "blocks", ()):
            raise UnsupportedError(
                f"{self.name} takes all blocks as one here, so blocks= cannot leave some out: use a form that works "
                "inside of them (mode='faithful', what='modules')"
            )

    def wants(self, site: Site) -> bool:
        return site.kind == "stack"

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset({"pack"})

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        if site.plan.mode in ("reuse", "forecast"):
            return Work(0, 0, text=False)
        m = self.count(grid, ratio)
        keys = grid[0] * grid[1] if site.kind == "attention" else m
        return Work(m, keys, projected=m, text_kept=site.keeps_text())

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        assert isinstance(site, StackSite)
        n = grid[0] * grid[1]
        row = (1 + self.forecasts) * site.width * dtype.itemsize + 8 + 4 * self.tracks
        rows = batch * n * row
        if "pack" in self.needs("stack"):
            rows += sum(2 * batch * n * attention.width * dtype.itemsize for attention in site.attentions)
            asking = sum(inner.keeps_text() for inner in site.inner)
            rows += asking * 2 * batch * text * site.width * dtype.itemsize
        return rows

    def prepare(self, site: Site) -> Any:
        if site.plan.mode != "reduce":
            return None
        level = site.level
        assert level.grid is not None
        return chosen(self.select(site, self.count(level.grid, site.plan.ratio)))

    def select(self, site: Site, m: int) -> Tensor:
        """Which `m` tokens are computed, (B, m) int64, ascending; or (1, m) for all samples. At the root, eagerly."""
        raise NotImplementedError

    def enter(self, call: StackCall) -> Tensor | None:
        if call.plan.mode != "reduce":
            return None
        at: Tensor = call.prepared
        return at

    def leave(self, call: StackCall, y: Tensor | None) -> Tensor:
        slot, x, mode = call.slot, call.x, call.plan.mode
        if mode == "full":
            assert y is not None
            self._renew(slot, y - x, call.level.pace)
            return y
        residual, age = slot.residual, slot.age
        assert residual is not None and age is not None and slot.since is not None and call.level.pace is not None
        age, since = age + 1, slot.since + call.level.pace
        if y is not None:
            at = call.at
            assert at is not None
            fresh = y - call.entered
            if self.forecasts or self.tracks:
                moved = (fresh - rows_at(residual, at)) / rows_at(since[..., None], at).to(fresh.dtype)
                if self.forecasts:
                    scatter_rows(slot.factors[0], at, moved)
                if self.tracks:
                    assert slot.rate is not None
                    scatter_rows(slot.rate[..., None], at, _length(moved)[..., None])
            scatter_rows(residual, at, packed(fresh, self.store))
            for clock in (age, since):
                scatter_rows(clock[..., None], at, clock.new_zeros(len(clock), at.shape[-1], 1))
        slot.age, slot.since = age, since
        call.note(lambda: torch.where(age == 0, 0, 3 if self.forecasts else 2).to(torch.uint8))
        kept = residual.dtype
        dtype = torch.promote_types(x.dtype, kept)
        residual = residual.to(dtype)
        if self.forecasts:
            residual = torch.addcmul(residual, slot.factors[0].to(dtype), since[..., None].to(dtype))
        if kept == x.dtype:
            return x + residual
        out = (x + residual).to(x.dtype)
        # Those that were computed are as they are, not as they are kept.
        return out if y is None or call.at is None else scatter_rows(out, call.at, y)

    def _renew(self, slot: Slot, residual: Tensor, pace: Tensor | None) -> None:
        """After a full step."""
        before = slot.residual
        if self.forecasts or self.tracks:
            if before is None or slot.since is None or pace is None:
                moved = torch.zeros_like(residual)
            else:
                moved = (residual - before) / (slot.since + pace)[..., None].to(residual.dtype)
            if self.forecasts:
                slot.factors = [packed(moved, self.store)]
            if self.tracks:
                slot.rate = _length(moved)
        slot.residual = packed(residual, self.store)
        slot.age = torch.zeros(residual.shape[:2], dtype=torch.int32, device=residual.device)
        slot.since = torch.zeros(residual.shape[:2], dtype=torch.float32, device=residual.device)


def chosen(at: Tensor) -> Tensor:
    """(1, M) -> (M,): the same tokens of all samples."""
    return at[0] if len(at) == 1 else at


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.float(), dim=-1)

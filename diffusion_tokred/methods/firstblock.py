"""First-block reuse: the first block of a step says whether the others are needed.

The idea is ParaAttention's First Block Cache (Cheng Zeyi, github.com/chengzeyi/ParaAttention), which pipelines' own
library has too (`FirstBlockCacheConfig`). It descends from TeaCache (arXiv 2411.19108), which judges by the first
block's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.rows import packed
from ..runtime.site import Site
from ..runtime.stack import StackCall, StackSite
from .base import option, register_method
from .caching import CacheConfig, StackCache


@dataclass(frozen=True)
class FirstBlockConfig(CacheConfig):
    """First-block reuse (after ParaAttention's First Block Cache): while the first block adds to the tokens nearly what
    it added at the last full step, the other blocks are left out, and what they added then is added again."""

    threshold: float = option(
        0.08, "relative change of the first block's residual from which on a step is full: mean |r - r_full| / mean "
        "|r_full|; 0 is dense", low=0.0, high=100.0,
    )  # fmt: skip
    interval: int = option(1000, "a full step at least every so many steps; 1 is dense", low=1, high=1000)

    @property
    def share(self) -> float:
        return float(self.interval > 1 and self.threshold > 0)

    @property
    def asks(self) -> str:
        return "reuse" if self.share else "full"


@register_method("firstblock", FirstBlockConfig)
class FirstBlock(StackCache):
    """One decision a denoiser call: for the whole batch, both halves of a guidance pair included; passes that are
    calls of their own decide by themselves. It is read by the host, which waits for the device once a step. A compiled
    model breaks its graph there, so `fullgraph=True` is refused by torch, with the reason."""

    paper = "First Block Cache, ParaAttention; after TeaCache, arXiv 2411.19108"
    modes = ("full", "reuse")
    unforeseen = (
        "firstblock decides in each step whether it is full: this counts the steps that could be reused as if they were"
    )
    config: FirstBlockConfig

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset()

    def begin(self, family: str, sites: Sequence[Site]) -> None:
        for site in sites:
            assert isinstance(site, StackSite)
            site.divide(1)

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        return 2 * batch * grid[0] * grid[1] * site.width * dtype.itemsize

    def enter(self, call: StackCall) -> None:
        return None

    def goes_on(self, call: StackCall) -> bool:
        slot, added = call.slot, call.after - call.x
        if call.plan.mode == "reuse" and _change(added, slot.out) < self.config.threshold:
            return False
        slot.out = packed(added, self.store)
        return True

    def leave(self, call: StackCall, y: Tensor | None) -> Tensor:
        slot = call.slot
        if y is not None:
            slot.residual = packed(y - call.after, self.store)
            return y
        assert slot.residual is not None
        call.note(lambda: torch.full(call.x.shape[:2], 2, dtype=torch.uint8, device=call.x.device))
        return call.after + slot.residual.to(call.after.dtype)


@torch.compiler.disable(reason="firstblock decides on the host which blocks run: compile without fullgraph=True")
def _change(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|. nan, which is below no threshold, if there was nothing."""
    new, old = new.float(), old.float()
    return float((new - old).abs().mean() / old.abs().mean())

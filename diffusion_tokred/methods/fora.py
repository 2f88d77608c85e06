"""FORA: compute every few steps, reuse between (arXiv 2407.01425). The baseline of all caching."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..runtime.stack import StackCall
from .base import option, register_method
from .caching import BLOCKS_HELP, CacheConfig, CacheMethod, ModuleCache, StackCache


@dataclass(frozen=True)
class FORAConfig(CacheConfig):
    """Fast-forward caching (arXiv 2407.01425): outputs of attention and feed-forward are reused between full steps."""

    what: str = option(
        "modules", "what is reused: each module's output, gated anew, or what all blocks add to a token together",
        choices=("modules", "stack"),
    )  # fmt: skip
    blocks: tuple[int, ...] = option((), BLOCKS_HELP)


@register_method("fora", FORAConfig)
class FORA(ModuleCache):
    paper = "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, arXiv 2407.01425"

    config: FORAConfig

    def on(self, kinds: Collection[str]) -> CacheMethod:
        return StackFORA(self.config) if self.config.what == "stack" else self


class StackFORA(StackCache):
    """The blocks are left out whole."""

    name, paper = FORA.name, FORA.paper
    modes = ("full", "reuse")

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset()

    def enter(self, call: StackCall) -> None:
        return None

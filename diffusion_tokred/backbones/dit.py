"""DiTTransformer2DModel: the class-conditional DiT. Positions are added to the tokens; square pictures only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..runtime.site import Block, Level, Site
from ..runtime.stack import StackSite
from .attention import FeedForwardSite, SelfAttention, basic_sites
from .base import Backbone, Layout, register_backbone


@register_backbone
class DiT(Backbone):
    name = "dit"
    models = ("DiTTransformer2DModel",)
    sites = (StackSite, SelfAttention, FeedForwardSite)
    only_native = True

    def layout(self, denoiser: Any) -> Layout:
        level, sites = Level(0), list[Site]()
        for index, module in enumerate(denoiser.transformer_blocks):
            sites += basic_sites(Block(index, f"transformer_blocks.{index}", module, denoiser.inner_dim), level)
        blocks = [(module, False) for module in denoiser.transformer_blocks]
        return Layout(sites, [level], [], [StackSite("transformer_blocks", blocks, level, sites)])

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        return 0  # class labels

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.pos_embed.proj, h * w
        for block in denoiser.transformer_blocks:
            yield block.norm1, 1
        # Once more, for the output's modulation, where the blocks are left out too: so not as the block's own.
        yield nn.Sequential(denoiser.transformer_blocks[0].norm1.emb), 1
        yield denoiser.proj_out_1, 1
        yield denoiser.proj_out_2, h * w

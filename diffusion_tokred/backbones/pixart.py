"""PixArtTransformer2DModel: PixArt-alpha and PixArt-Sigma. Positions are added to the tokens, prompts are masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..runtime.site import Block, Level, Site
from ..runtime.stack import StackSite
from .attention import CrossAttention, FeedForwardSite, SelfAttention, basic_sites
from .base import Backbone, Layout, register_backbone


@register_backbone
class PixArt(Backbone):
    name = "pixart"
    models = ("PixArtTransformer2DModel",)
    sites = (StackSite, SelfAttention, CrossAttention, FeedForwardSite)

    def layout(self, denoiser: Any) -> Layout:
        level, sites = Level(0), list[Site]()
        for index, module in enumerate(denoiser.transformer_blocks):
            sites += basic_sites(Block(index, f"transformer_blocks.{index}", module, denoiser.inner_dim), level)
        blocks = [(module, False) for module in denoiser.transformer_blocks]
        return Layout(sites, [level], [], [StackSite("transformer_blocks", blocks, level, sites)])

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.pos_embed.proj, h * w
        yield denoiser.adaln_single, 1
        if (sides := getattr(denoiser.adaln_single.emb, "resolution_embedder", None)) is not None:
            yield sides, 1  # height and width are embedded each by itself
        if denoiser.caption_projection is not None:
            yield denoiser.caption_projection, text
        yield denoiser.proj_out, h * w

"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5, with the dual attention of 3.5-medium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..runtime.site import Block, Level, Site
from ..runtime.stack import StackSite
from .attention import FeedForwardSite, JointAttention
from .base import Backbone, Layout, default_of, register_backbone


class SD3Stack(StackSite):
    separate = True


@register_backbone
class SD3(Backbone):
    name = "sd3"
    models = ("SD3Transformer2DModel",)
    sites = (SD3Stack, JointAttention, FeedForwardSite)

    def layout(self, denoiser: Any) -> Layout:
        level = Level(0)
        sites: list[Site] = []
        for index, module in enumerate(denoiser.transformer_blocks):
            block = Block(index, f"transformer_blocks.{index}", module, denoiser.inner_dim)
            sites.append(JointAttention(f"{block.name}.attn", module.attn, block, level))
            if module.attn2 is not None:
                sites.append(JointAttention(f"{block.name}.attn2", module.attn2, block, level))
            sites.append(FeedForwardSite(f"{block.name}.ff", module.ff, block, level))
        refused = {"block_controlnet_hidden_states": "a ControlNet's residuals"}
        blocks = [(module, False) for module in denoiser.transformer_blocks]
        return Layout(sites, [level], [], [SD3Stack("transformer_blocks", blocks, level, sites, refused)])

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        return 77 + (default_of(pipe, "max_sequence_length") or 256)  # CLIP's tokens and T5's

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.pos_embed.proj, h * w
        yield denoiser.time_text_embed, 1
        yield denoiser.context_embedder, text
        for block in denoiser.transformer_blocks:
            yield block.norm1, 1
            yield block.norm1_context, 1
            if block.ff_context is not None:
                yield block.ff_context, text
        yield denoiser.norm_out, 1
        yield denoiser.proj_out, h * w

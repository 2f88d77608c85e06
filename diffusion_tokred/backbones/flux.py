"""FluxTransformer2DModel: FLUX.1, guidance-distilled or with true guidance, Kontext's reference pictures included.

Positions are rotary, one table for text and image, [text, image], shared by the batch. In the single blocks attention
and MLP stand side by side: methods that run on fewer tokens take the block whole (`parallel`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..runtime.site import Block, Level, Site
from ..runtime.stack import StackSite
from .attention import FeedForwardSite, JointAttention, ParallelSite, StreamAttention
from .base import Backbone, Layout, even_sigmas, register_backbone

_OFFERS = frozenset({"at", "kv_select", "cache", "watch"})
_LACKS = {"kv": "rotary keys can be chosen, not averaged: use mode='nearest'"}


class FluxJointAttention(JointAttention):
    """`attn` of a double block."""

    text_first, extras = True, True
    table, rotary = "image_rotary_emb", "apply_rotary_emb"
    offers, lacks = _OFFERS, _LACKS


class FluxStreamAttention(StreamAttention):
    """`attn` of a single block: one sequence, text first."""

    extras = True
    table, rotary = "image_rotary_emb", "apply_rotary_emb"
    offers, lacks = _OFFERS, _LACKS


class FluxFeedForward(FeedForwardSite):
    extras = True


class FluxParallel(ParallelSite):
    """A single block."""

    extras = True

    def weights(self) -> Any:
        return self.mlp(self.module.proj_mlp, self.module.proj_out)


class FluxStack(StackSite):
    """The double blocks, then the single ones: both are handed text and image separately."""

    separate = True


@register_backbone
class Flux(Backbone):
    name = "flux"
    models = ("FluxTransformer2DModel",)
    sites: tuple[type[Site], ...] = (FluxStack, FluxJointAttention, FluxStreamAttention, FluxFeedForward, FluxParallel)

    def layout(self, denoiser: Any) -> Layout:
        level, sites, width = Level(0), list[Site](), denoiser.inner_dim
        for index, module in enumerate(denoiser.transformer_blocks):
            block = Block(index, f"transformer_blocks.{index}", module, width, level)
            sites.append(FluxJointAttention(f"{block.name}.attn", module.attn, block, level))
            sites.append(FluxFeedForward(f"{block.name}.ff", module.ff, block, level))
        first = len(denoiser.transformer_blocks)
        for index, module in enumerate(denoiser.single_transformer_blocks):
            block = Block(first + index, f"single_transformer_blocks.{index}", module, width, level)
            attention = FluxStreamAttention(f"{block.name}.attn", module.attn, block, level)
            sites += [FluxParallel(block.name, module, block, level, attention), attention]
        what = "a ControlNet's residuals"
        refused = {"controlnet_block_samples": what, "controlnet_single_block_samples": what}
        blocks = [(module, False) for module in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks)]
        return Layout(sites, [level], [], [FluxStack("transformer_blocks", blocks, level, sites, refused)])

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [(height // 2, width // 2)]  # pipelines pack 2 x 2 latents into a token

    def size(self, layout: Layout, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """From the positions. They are read (which waits for the device) once: pipelines pass the same all through."""
        ids = inputs["img_ids"]
        known = layout.notes.get("ids")
        if known is None or known[0]() is not ids:
            picture = ids.reshape(-1, ids.shape[-1])[: self.latent(inputs).shape[1]]
            picture = picture[picture[:, 0] == picture[0, 0]]  # without Kontext's reference pictures
            rows, columns = (int(axis.max() - axis.min()) + 1 for axis in picture[:, 1:3].unbind(1))
            layout.notes["ids"] = known = weakref.ref(ids), (2 * rows, 2 * columns)
        height, width = known[1]
        return height, width

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        super().observe(layout, denoiser, inputs)
        layout.levels[0].start = self.text(denoiser, inputs)

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        return 512 if isinstance(pipe, nn.Module) else super().prompt(denoiser, pipe)

    def sigmas(self, pipe: Any, steps: int) -> list[float] | None:
        return even_sigmas(steps)

    def guided(self, denoiser: Any, pipe: Any) -> bool:
        return False  # true guidance is asked for, with a negative prompt

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.x_embedder, h * w
        yield denoiser.time_text_embed, 1
        yield denoiser.context_embedder, text
        for block in denoiser.transformer_blocks:
            yield block.norm1, 1
            yield block.norm1_context, 1
            yield block.ff_context, text
        for block in denoiser.single_transformer_blocks:
            yield block.norm, 1
        yield denoiser.norm_out, 1
        yield denoiser.proj_out, h * w

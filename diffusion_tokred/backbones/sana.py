"""SanaTransformer2DModel: Sana, Sana 1.5, Sana Sprint.

Self-attention is linear: it has no attention matrix, so that fewer tokens make its projections cheaper and no more.
The feed-forward looks at neighbouring tokens. There are no positions in the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..runtime.rows import KV, Attended, Cache, Out
from ..runtime.site import Block, Call, Level, Site
from ..runtime.work import Weights, macs
from .attention import CrossAttention
from .base import Backbone, Layout, register_backbone

_LINEAR = "self-attention is linear here: "


class SanaLinearAttention(Site):
    """`attn1`: keys and values are summed up in one small matrix a head, which all queries read."""

    offers = frozenset({"at"})
    lacks = {
        "kv": f"{_LINEAR}its cost does not grow with queries times keys, so fewer keys save next to nothing",
        "kv_select": f"{_LINEAR}its cost does not grow with queries times keys, so fewer keys save next to nothing",
        "cache": f"{_LINEAR}it does not keep keys and values apart by token",
        "watch": f"{_LINEAR}no query meets a key, so there are no attention weights to see",
    }

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        return Out(call.module(x))

    def weights(self) -> Weights:
        a = self.module
        d = a.inner_dim // a.heads
        state = a.heads * (d + 1) * d  # a head's matrix: keys against values, and against 1 for the norm
        return Weights(query=macs(a.to_q, a.to_out) + state, key=macs(a.to_k, a.to_v) + state)


class SanaConvFeedForward(Site):
    """`ff`: two layers with a 3 x 3 convolution between them, on the tokens as a picture (B, C, h, w)."""

    kind = "feed_forward"
    lacks = {"at": "the feed-forward convolves neighbouring tokens here: it needs all of them, in their places"}

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        picture: Tensor = super().read(args, kwargs)
        return picture.flatten(2).transpose(1, 2)

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        return Out(call.module(_picture(call, x)).flatten(2).transpose(1, 2))

    def write(self, call: Call, out: Out) -> Tensor:
        return _picture(call, out.x)

    def weights(self) -> Weights:
        return Weights(query=macs(self.module))


def _picture(call: Call, x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, call.grid)


@register_backbone
class Sana(Backbone):
    name = "sana"
    models = ("SanaTransformer2DModel",)
    sites = (SanaLinearAttention, CrossAttention, SanaConvFeedForward)

    def layout(self, denoiser: Any) -> Layout:
        level, sites = Level(0), list[Site]()
        width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        for index, module in enumerate(denoiser.transformer_blocks):
            block = Block(index, f"transformer_blocks.{index}", module, width, level)
            sites.append(SanaLinearAttention(f"{block.name}.attn1", module.attn1, block, level))
            sites.append(CrossAttention(f"{block.name}.attn2", module.attn2, block, level))
            sites.append(SanaConvFeedForward(f"{block.name}.ff", module.ff, block, level))
        return Layout(sites, [level], [])

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.patch_embed.proj, h * w
        yield denoiser.time_embed, 1
        yield denoiser.caption_projection, text
        yield denoiser.proj_out, h * w

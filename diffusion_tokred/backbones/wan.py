"""WanTransformer3DModel: Wan 2.1 and 2.2, from text and from pictures. A video's frames lie one below another.

Positions are rotary, of width, height and time. Wan 2.2's second expert is a denoiser of its own (`transformer_2`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..runtime.rows import KV, Attended, Cache, Out
from ..runtime.site import Block, Call, Level, Site
from ..runtime.stack import StackSite
from ..runtime.work import Weights, macs
from .attention import CrossAttention, FeedForwardSite, TappedSite, take
from .base import Backbone, Layout, default_of, register_backbone

_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")


class WanSelfAttention(TappedSite):
    """`attn1`: rotary tables (1, S, 1, D), or one a sample."""

    table = "rotary_emb"
    offers = frozenset({"at", "kv_select", "cache", "watch"})
    lacks = {"kv": "rotary keys can be chosen, not averaged: use mode='nearest'"}

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        call.kwargs = dict(zip(_ARGUMENTS, call.args, strict=False)) | call.kwargs  # blocks call it by position
        call.args = ()
        return Out(self.attend(call, x, at, kv, watch))

    def pick(self, table: Tensor, rows: Tensor) -> Tensor:
        chosen = take(table[0], rows)
        return chosen if chosen.ndim == 4 else chosen[None]

    def weights(self) -> Weights:
        a = self.module  # all rows handed in are projected: keys and values are chosen after it
        return Weights(query=macs(a.to_q, a.to_k, a.to_v, a.to_out), core=2 * a.inner_dim)


class WanCrossAttention(CrossAttention):
    """`attn2`: keys are the prompt's and, from pictures, theirs, through projections of their own, as large."""


class WanFeedForward(FeedForwardSite):
    """`ffn`."""


class WanStack(StackSite):
    """All blocks; text stands aside."""

    def follow(self, kwargs: dict[str, Any], x: Tensor, rows: Tensor, at: Tensor) -> dict[str, Any]:
        """Wan 2.2 TI2V modulates each token by a time of its own: (B, N, 6, C)."""
        found, temb = super().follow(kwargs, x, rows, at), kwargs["temb"]
        if temb.ndim == 4:
            found["temb"] = take(temb.flatten(2), at, 1).unflatten(2, temb.shape[2:])
        return found


@register_backbone
class Wan(Backbone):
    name = "wan"
    models = ("WanTransformer3DModel",)
    sites = (WanStack, WanSelfAttention, WanCrossAttention, WanFeedForward)

    def layout(self, denoiser: Any) -> Layout:
        level, sites = Level(0), list[Site]()
        width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        for index, module in enumerate(denoiser.blocks):
            block = Block(index, f"blocks.{index}", module, width)
            sites.append(WanSelfAttention(f"{block.name}.attn1", module.attn1, block, level))
            sites.append(WanCrossAttention(f"{block.name}.attn2", module.attn2, block, level))
            sites.append(WanFeedForward(f"{block.name}.ffn", module.ffn, block, level))
        blocks = [(module, False) for module in denoiser.blocks]
        layout = Layout(sites, [level], [], [WanStack("blocks", blocks, level, sites)])
        layout.notes["patch"] = denoiser.config.patch_size
        return layout

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        _, patch_height, patch_width = denoiser.config.patch_size
        return [(height // patch_height, width // patch_width)]

    def size(self, layout: Layout, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Height: the rows of all frames, without those that fill no patch."""
        patch_frames, patch_height, _ = layout.notes["patch"]
        frames, height, width = self.latent(inputs).shape[-3:]
        return frames // patch_frames * (height - height % patch_height), int(width)

    def stacked(self, layout: Layout, inputs: Mapping[str, Any]) -> int:
        return int(self.latent(inputs).shape[-3] // layout.notes["patch"][0])

    def text(self, denoiser: Any, inputs: Mapping[str, Any]) -> int:
        """With the tokens of pictures, which stand beside the prompt's in cross-attention."""
        image, batch = inputs.get("encoder_hidden_states_image"), len(inputs["encoder_hidden_states"])
        return super().text(denoiser, inputs) + (0 if image is None else image.shape[0] * image.shape[1] // batch)

    def frames(self, pipe: Any, num_frames: int | None) -> int:
        if isinstance(pipe, nn.Module):
            return num_frames or 1
        count = num_frames or default_of(pipe, "num_frames") or 81
        return int((count - 1) // getattr(pipe, "vae_scale_factor_temporal", 4) + 1)

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        return 512

    def beside(self, denoiser: Any, tokens: int, height: int, width: int) -> int:
        pictures = _pictures(denoiser)
        return 512 + pictures if pictures else tokens  # the model itself counts on 512 where there are pictures

    # Wan 2.2 TI2V embeds a time for each token: counted once here, which leaves out about 2 % of a call.
    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        embed = denoiser.condition_embedder
        pictures = text - 512 if embed.image_embedder is not None and text > 512 else 0
        yield denoiser.patch_embedding, h * w
        yield embed.time_embedder, 1
        yield embed.time_proj, 1
        yield embed.text_embedder, text - pictures
        if pictures:
            yield embed.image_embedder, pictures
        yield denoiser.proj_out, h * w


def _pictures(denoiser: Any) -> int:
    """Tokens of the pictures that a model starts from: CLIP's, of one, or as many as it has positions for."""
    if denoiser.condition_embedder.image_embedder is None:
        return 0
    return denoiser.config.pos_embed_seq_len or 257

"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5, with the dual attention of 3.5-medium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..runtime.site import KV, Block, Cache, Call, Level, Out, Site
from ..runtime.work import Weights, macs
from .base import Backbone, FeedForwardSite, Layout, TappedSite, register_backbone


class JointAttention(TappedSite):
    """`attn` of a JointTransformerBlock: image and text attend to both. Keys and values come after the projection."""

    kind = "attention"
    offers = frozenset({"at", "kv", "kv_select", "cache", "watch"})

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return kwargs["hidden_states"]

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | None, watch: Any) -> Out:
        text = call.kwargs.get("encoder_hidden_states")
        out = self.attend(call, {**call.kwargs, "hidden_states": x}, 0 if text is None else text.shape[1], kv, watch)
        return Out(out[0], tuple(out[1:])) if isinstance(out, tuple) else Out(out)

    def weights(self) -> Weights:
        a = self.module
        text = macs(*(getattr(a, name, None) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")))
        # All rows handed in are projected, whatever is attended to: keys and values are reduced after it.
        return Weights(
            query=macs(a.to_q, a.to_k, a.to_v, a.to_out),
            text=text,
            core=2 * a.inner_dim,
            text_is="joined" if text else "absent",
        )


@register_backbone
class SD3(Backbone):
    name = "sd3"
    models = ("SD3Transformer2DModel",)
    sites = (JointAttention, FeedForwardSite)

    def layout(self, denoiser: Any) -> Layout:
        level = Level(0)
        sites: list[Site] = []
        for index, module in enumerate(denoiser.transformer_blocks):
            block = Block(index, f"transformer_blocks.{index}", module, denoiser.inner_dim)
            sites.append(JointAttention(f"{block.name}.attn", module.attn, block, level))
            if module.attn2 is not None:
                sites.append(JointAttention(f"{block.name}.attn2", module.attn2, block, level))
            sites.append(FeedForwardSite(f"{block.name}.ff", module.ff, block, level))
        return Layout(sites, [level], [])

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        patch = denoiser.config.patch_size
        return [(height // patch, width // patch)]

    def observe(self, layout: Layout, denoiser: Any, sample: Tensor) -> None:
        (layout.levels[0].grid,) = self.grids(denoiser, sample.shape[-2], sample.shape[-1])

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

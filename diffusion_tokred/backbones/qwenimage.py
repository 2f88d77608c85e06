"""QwenImageTransformer2DModel: Qwen-Image, its edit models (reference pictures) and its layered one.

Image and text have rotary tables of their own, complex numbers, shared by the batch; prompts may be masked, pictures
never are. Layers are taken as frames: one below another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..runtime.site import Block, Level, Site
from ..runtime.stack import StackSite
from .attention import FeedForwardSite, JointAttention, take
from .base import Backbone, Layout, even_sigmas, register_backbone


class QwenJointAttention(JointAttention):
    """`attn`: the image table alone follows the tokens; the text's stays as it is."""

    text_first, extras, masks_text = True, True, True
    table, rotary = "image_rotary_emb", "apply_rotary_emb_qwen"
    offers = frozenset({"at", "kv_select", "cache", "watch"})
    lacks = {"kv": "rotary keys can be chosen, not averaged: use mode='nearest'"}

    def place(self, call: Any, at: Tensor, start: int, text: int) -> dict[str, Any]:
        tables = call.kwargs.get(self.table)
        if tables is None:
            return {}
        n = call.x.shape[1]
        image, words = tables
        return {str(self.table): (self.tables(image, self.rows(at, 0, call.rows.shape[1] - n, n)), words)}


class QwenFeedForward(FeedForwardSite):
    """`img_mlp`."""

    extras = True


class QwenStack(StackSite):
    separate = True

    def follow(self, kwargs: dict[str, Any], x: Tensor, rows: Tensor, at: Tensor) -> dict[str, Any]:
        """Reference pictures are modulated as clean: each row says whether it is one."""
        found = super().follow(kwargs, x, rows, at)
        if (clean := kwargs.get("modulate_index")) is not None:
            n = x.shape[1]
            found["modulate_index"] = take(clean, self.attentions[0].rows(at, 0, rows.shape[1] - n, n), 1)
        return found


@register_backbone
class QwenImage(Backbone):
    name = "qwenimage"
    models = ("QwenImageTransformer2DModel",)
    sites = (QwenStack, QwenJointAttention, QwenFeedForward)

    def layout(self, denoiser: Any) -> Layout:
        level, sites = Level(0), list[Site]()
        for index, module in enumerate(denoiser.transformer_blocks):
            block = Block(index, f"transformer_blocks.{index}", module, denoiser.inner_dim, level)
            sites.append(QwenJointAttention(f"{block.name}.attn", module.attn, block, level))
            sites.append(QwenFeedForward(f"{block.name}.img_mlp", module.img_mlp, block, level))
        blocks = [(module, False) for module in denoiser.transformer_blocks]
        refused = {"controlnet_block_samples": "a ControlNet's residuals"}
        layout = Layout(sites, [level], [], [QwenStack("transformer_blocks", blocks, level, sites, refused)])
        layout.notes["layered"] = bool(denoiser.config.get("use_layer3d_rope"))
        return layout

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [(height // 2, width // 2)]  # pipelines pack 2 x 2 latents into a token

    def size(self, layout: Layout, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Of the picture, or of its layers one below another, without what is only looked at: references."""
        shapes = inputs["img_shapes"]
        if shapes is None:
            raise UnsupportedError("token reduction needs img_shapes, which say how the tokens lie")
        shapes = shapes[0] if isinstance(shapes[0], list) else shapes[:1]  # of the first sample: all have the same
        # In the layered model the last picture is the one to take apart.
        frames, height, width = shapes[0]
        if layout.notes["layered"]:
            frames *= max(len(shapes) - 1, 1)
        return 2 * frames * height, 2 * width

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        return 512 if isinstance(pipe, nn.Module) else super().prompt(denoiser, pipe)

    def sigmas(self, pipe: Any, steps: int) -> list[float] | None:
        return even_sigmas(steps)

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        times = 2 if denoiser.zero_cond_t else 1  # reference pictures are modulated as clean
        yield denoiser.img_in, h * w
        yield denoiser.txt_in, text
        yield denoiser.time_text_embed, times
        for block in denoiser.transformer_blocks:
            yield block.img_mod, times
            yield block.txt_mod, 1
            yield block.txt_mlp, text
        yield denoiser.norm_out, 1
        yield denoiser.proj_out, h * w

"""Flux2Transformer2DModel: FLUX.2-dev and klein, pictures to edit included.

As FLUX.1, but in the single blocks text and image are one sequence, and attention and MLP are one layer: `attn` is
both. So what runs on fewer tokens takes the block whole (`parallel`); keys and values alone are reached inside `attn`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..runtime.site import Block, Level, Site
from ..runtime.work import Weights, macs
from .base import Layout, register_backbone
from .flux import Flux, FluxFeedForward, FluxJointAttention, FluxParallel, FluxStack, FluxStreamAttention

_KV_CACHE = (
    "FLUX.2 klein's own cache of reference keys and values puts the references first and attends in two parts: "
    "use Flux2KleinPipeline instead of Flux2KleinKVPipeline"
)


def _refusal(block: Block) -> str | None:
    """Why nothing in a block can be reduced: another layout of the sequence, which its processor stands for."""
    module: Any = block.module
    kind = type(module.attn.processor).__name__
    return f"the installed processor is {kind}: {_KV_CACHE}" if kind.startswith("Flux2KV") else None


class Flux2JointAttention(FluxJointAttention):
    """`attn` of a double block."""

    def refusal(self, needs: frozenset[str]) -> str | None:
        return _refusal(self.block) or super().refusal(needs)


class Flux2FeedForward(FluxFeedForward):
    """`ff` of a double block."""

    def refusal(self, needs: frozenset[str]) -> str | None:
        return _refusal(self.block)


class Flux2StreamAttention(FluxStreamAttention):
    """The attention in `attn` of a single block; that module is the MLP, too."""

    offers = frozenset({"kv_select", "cache", "watch"})
    lacks = {
        "at": "attention and MLP are one layer here: what runs on fewer tokens takes the whole block",
        **FluxStreamAttention.lacks,
    }

    def refusal(self, needs: frozenset[str]) -> str | None:
        return _refusal(self.block) or super().refusal(needs)

    def weights(self) -> Weights:
        a = self.module
        cost = a.inner_dim * (3 * a.query_dim + a.out_dim)
        return Weights(query=cost, text=cost, core=2 * a.inner_dim, text_is="joined")


class Flux2Parallel(FluxParallel):
    """A single block."""

    joint = True

    def weights(self) -> Weights:
        (attention,) = self.inner
        cost = macs(self.module) - attention.weights().query
        return Weights(query=cost, text=cost)


class Flux2Stack(FluxStack):
    """The double blocks, then the single ones, which are handed one sequence."""


@register_backbone
class Flux2(Flux):
    name = "flux2"
    models = ("Flux2Transformer2DModel",)
    sites = (Flux2Stack, Flux2JointAttention, Flux2StreamAttention, Flux2FeedForward, Flux2Parallel)

    def layout(self, denoiser: Any) -> Layout:
        level, sites, width = Level(0), list[Site](), denoiser.inner_dim
        for index, module in enumerate(denoiser.transformer_blocks):
            block = Block(index, f"transformer_blocks.{index}", module, width, level)
            sites.append(Flux2JointAttention(f"{block.name}.attn", module.attn, block, level))
            sites.append(Flux2FeedForward(f"{block.name}.ff", module.ff, block, level))
        first = len(denoiser.transformer_blocks)
        for index, module in enumerate(denoiser.single_transformer_blocks):
            block = Block(first + index, f"single_transformer_blocks.{index}", module, width, level, joint=True)
            attention = Flux2StreamAttention(f"{block.name}.attn", module.attn, block, level)
            sites += [Flux2Parallel(block.name, module, block, level, attention), attention]
        blocks = [(module, False) for module in denoiser.transformer_blocks]
        blocks += [(module, True) for module in denoiser.single_transformer_blocks]
        return Layout(sites, [level], [], [Flux2Stack("transformer_blocks", blocks, level, sites)])

    def size(self, layout: Layout, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """From the positions, read once a run. With pictures to edit, pipelines put them together anew at each step:
        then as many of them beside the same prompt are the same."""
        ids, prompt, rows = inputs["img_ids"], inputs["txt_ids"], self.latent(inputs).shape[1]
        ids_seen, run = layout.notes.get("ids"), layout.notes.get("run")
        if ids_seen is not None and ids_seen[0]() is ids:
            return super().size(layout, inputs)
        if ids.device.type != "cpu" and run is not None and run[0]() is prompt and run[1] == rows:
            layout.notes["ids"] = weakref.ref(ids), run[2]
        size = super().size(layout, inputs)
        edits = rows > (size[0] // 2) * (size[1] // 2)
        layout.notes["run"] = (weakref.ref(prompt), rows, size) if edits else None
        return size

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        if inputs.get("kv_cache_mode") is not None:
            raise UnsupportedError(_KV_CACHE)
        super().observe(layout, denoiser, inputs)

    def guided(self, denoiser: Any, pipe: Any) -> bool:
        distilled = not isinstance(pipe, nn.Module) and pipe.config.get("is_distilled", False)
        return not (denoiser.config.guidance_embeds or distilled)

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.x_embedder, h * w
        yield denoiser.context_embedder, text
        yield denoiser.time_guidance_embed, 1
        yield denoiser.double_stream_modulation_img, 1
        yield denoiser.double_stream_modulation_txt, 1
        yield denoiser.single_stream_modulation, 1
        for block in denoiser.transformer_blocks:
            yield block.ff_context, text
        yield denoiser.norm_out, 1
        yield denoiser.proj_out, h * w

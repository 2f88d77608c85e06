"""Lumina2Transformer2DModel: Lumina-Image 2.0.

`noise_refiner` sees the picture alone, `layers` see [text, picture] as one sequence, where the text has as many rows
as the prompt has tokens: padding is left out. Positions are rotary, complex numbers, with a table for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UnsupportedError
from ..runtime.site import Block, Call, Level, Site
from ..runtime.work import Weights, macs
from .attention import FeedForwardSite, StreamAttention, take
from .base import Backbone, Layout, attention_core, even_sigmas, register_backbone


class Lumina2Attention(StreamAttention):
    """`attn` of a layer: one sequence, text first; it is handed in twice, for queries and for keys."""

    table = "image_rotary_emb"
    offers = frozenset({"at", "kv_select", "cache", "watch"})
    lacks = {"kv": "rotary keys can be chosen, not averaged: use mode='nearest'"}

    def fill(self, call: Call, x: Tensor) -> Tensor:
        rows = super().fill(call, x)
        call.kwargs = {**call.kwargs, "encoder_hidden_states": rows}
        return rows

    def pick(self, table: Tensor, rows: Tensor) -> Tensor:
        return take(table, rows, 1)


class Lumina2FeedForward(FeedForwardSite):
    """`feed_forward` of a layer."""

    joint = True
    argument = "x"


class Lumina2RefinerAttention(Lumina2Attention):
    """`attn` of a noise refiner: the picture alone."""

    joint = False

    def weights(self) -> Weights:
        a = self.module
        return Weights(query=macs(a.to_q, a.to_k, a.to_v, a.to_out), core=2 * a.inner_dim)


class Lumina2RefinerFeedForward(Lumina2FeedForward):
    """`feed_forward` of a noise refiner."""

    joint = False


class Caption(int):
    """Tokens of a prompt, in `layers`; `padded`: rows that it comes in, of which the context refiner works on all."""

    padded: int

    def __new__(cls, tokens: int, padded: int) -> Caption:
        made = super().__new__(cls, tokens)
        made.padded = padded
        return made

    def __reduce__(self) -> tuple[Any, ...]:  # for copies
        return Caption, (int(self), self.padded)

    def __eq__(self, other: object) -> bool:
        return int(self) == other and self.padded == getattr(other, "padded", other)

    def __hash__(self) -> int:
        return hash((int(self), self.padded))


@register_backbone
class Lumina2(Backbone):
    name = "lumina2"
    models = ("Lumina2Transformer2DModel",)
    sites = (Lumina2RefinerAttention, Lumina2RefinerFeedForward, Lumina2Attention, Lumina2FeedForward)

    def __init__(self) -> None:
        self._tokens: Any = WeakIdKeyDictionary()  # mask -> tokens of the prompt

    def layout(self, denoiser: Any) -> Layout:
        level, sites, width = Level(0), list[Site](), denoiser.config.hidden_size
        for index, module in enumerate(denoiser.noise_refiner):
            block = Block(index, f"noise_refiner.{index}", module, width, level)
            sites.append(Lumina2RefinerAttention(f"{block.name}.attn", module.attn, block, level))
            sites.append(Lumina2RefinerFeedForward(f"{block.name}.feed_forward", module.feed_forward, block, level))
        first = len(denoiser.noise_refiner)
        for index, module in enumerate(denoiser.layers):
            block = Block(first + index, f"layers.{index}", module, width, level, joint=True)
            sites.append(Lumina2Attention(f"{block.name}.attn", module.attn, block, level))
            sites.append(Lumina2FeedForward(f"{block.name}.feed_forward", module.feed_forward, block, level))
        return Layout(sites, [level], [])

    def text(self, denoiser: Any, inputs: Mapping[str, Any]) -> Caption:
        mask = inputs["encoder_attention_mask"]
        return Caption(self._tokens[mask] if mask in self._tokens else self._read(mask), mask.shape[1])

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        super().observe(layout, denoiser, inputs)
        layout.levels[0].start = self._read(inputs["encoder_attention_mask"])

    def _read(self, mask: Tensor) -> int:
        """Tokens of the prompt. It waits for the device, as the model does in each call, for the same numbers."""
        lengths = [int(length) for length in mask.sum(1).tolist()]
        if len(set(lengths)) > 1:
            raise UnsupportedError(
                f"the prompts of this batch have {', '.join(map(str, dict.fromkeys(lengths)))} tokens, so their "
                "pictures begin at different rows: give prompts of one length, or call the pipeline once a prompt"
            )
        self._tokens[mask] = lengths[0]
        return lengths[0]

    def sigmas(self, pipe: Any, steps: int) -> list[float] | None:
        return even_sigmas(steps)

    def timesteps(self, pipe: Any, scheduler: Any, steps: int, tokens: int) -> None:
        """The pipeline takes the latents' channels for their tokens."""
        super().timesteps(pipe, scheduler, steps, pipe.transformer.config.in_channels)

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        padded = text.padded if isinstance(text, Caption) else text
        yield denoiser.x_embedder, h * w
        yield denoiser.time_caption_embed.timestep_embedder, 1
        yield denoiser.time_caption_embed.caption_embedder, padded
        for block in denoiser.context_refiner:
            yield block.attn, padded
            yield block.feed_forward, padded
            yield attention_core(block.attn, padded), padded
        for block in [*denoiser.noise_refiner, *denoiser.layers]:
            yield block.norm1, 1
        yield denoiser.norm_out.linear_1, 1
        yield denoiser.norm_out.linear_2, h * w + int(text)

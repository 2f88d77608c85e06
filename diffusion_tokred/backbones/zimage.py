"""ZImageTransformer2DModel: Z-Image and Z-Image-Turbo, ControlNets included; not the Omni models.

`noise_refiner` sees the picture alone, `layers` see [picture, padding, text, padding] as one sequence, each part
padded to a multiple of 32. Positions are rotary, complex numbers, with a table for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..runtime.site import Block, Call, Level, Site
from ..runtime.work import Weights, Work
from .attention import FeedForwardSite, StreamAttention, take
from .base import Backbone, Layout, attention_core, helper_of, register_backbone

_MULTIPLE = 32  # parts of the sequence are padded to multiples of it


class ZImageAttention(StreamAttention):
    """`attention` of a layer: one sequence, the picture first."""

    extras, masks_text = True, True
    table = "freqs_cis"
    offers = frozenset({"at", "kv_select", "cache", "watch"})
    lacks = {"kv": "rotary keys can be chosen, not averaged: use mode='nearest'"}

    def place(self, call: Call, at: Tensor, start: int, text: int) -> dict[str, Any]:
        changes, mask = super().place(call, at, start, text), call.kwargs.get("attention_mask")
        if mask is not None:  # it hides padding after shorter texts, never the picture
            rest = mask[:, start + call.x.shape[1] :]
            changes["attention_mask"] = torch.cat([mask[:, : start + at.shape[-1]], rest], 1)
        return changes

    def pick(self, table: Tensor, rows: Tensor) -> Tensor:
        return take(table, rows, 1)


class ZImageFeedForward(FeedForwardSite):
    """`feed_forward` of a layer."""

    joint, extras = True, True
    argument = "x"


class _Padded(Weights):
    """The cost where the only rows beside the picture's are its padding: see `ZImage.beside`."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.query, weights.key, weights.text, weights.core, weights.text_is)

    def flops(self, work: Work, batch: int, text: int) -> int:
        return super().flops(work, batch, text % _MULTIPLE)


class ZImageRefinerAttention(ZImageAttention):
    """`attention` of a noise refiner: the picture and its padding."""

    def weights(self) -> Weights:
        return _Padded(super().weights())


class ZImageRefinerFeedForward(ZImageFeedForward):
    """`feed_forward` of a noise refiner."""

    def weights(self) -> Weights:
        return _Padded(super().weights())


@register_backbone
class ZImage(Backbone):
    name = "zimage"
    models = ("ZImageTransformer2DModel",)
    sites = (ZImageRefinerAttention, ZImageRefinerFeedForward, ZImageAttention, ZImageFeedForward)
    sample = "x"
    native = 1024

    def layout(self, denoiser: Any) -> Layout:
        level, sites = Level(0), list[Site]()
        first = len(denoiser.noise_refiner)
        for index, module in enumerate([*denoiser.noise_refiner, *denoiser.layers]):
            refines = index < first
            name = f"noise_refiner.{index}" if refines else f"layers.{index - first}"
            block = Block(index, name, module, denoiser.dim, level, joint=True)
            block.argument = "x"
            attention, mlp = (
                (ZImageRefinerAttention, ZImageRefinerFeedForward) if refines else (ZImageAttention, ZImageFeedForward)
            )
            sites.append(attention(f"{name}.attention", module.attention, block, level))
            sites.append(mlp(f"{name}.feed_forward", module.feed_forward, block, level))
        return Layout(sites, [level], [])

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [(height // 2, width // 2)]

    def size(self, layout: Layout, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Two for each token, whatever the patch size; frames lie one below another."""
        rows, columns = self._tokens(inputs)
        return 2 * rows, 2 * columns

    def stacked(self, layout: Layout, inputs: Mapping[str, Any]) -> int:
        return int(self.latent(inputs).shape[-3] // inputs.get("f_patch_size", 1))

    def _tokens(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        frames, height, width = self.latent(inputs).shape[-3:]
        patch = inputs.get("patch_size", 2)
        return (frames // inputs.get("f_patch_size", 1)) * (height // patch), width // patch

    def text(self, denoiser: Any, inputs: Mapping[str, Any]) -> int:
        rows, columns = self._tokens(inputs)
        return self.beside(denoiser, max(len(text) for text in inputs["cap_feats"]), 2 * rows, 2 * columns)

    def beside(self, denoiser: Any, tokens: int, height: int, width: int) -> int:
        """Rows beside the picture's in a layer: the longest prompt's, padded (a multiple of 32), and the picture's
        padding (fewer than 32)."""
        ((h, w),) = self.grids(denoiser, height, width)
        return _padded(tokens) + _padded(h * w) - h * w

    def sigmas(self, pipe: Any, steps: int) -> list[float] | None:
        own = helper_of(pipe, "get_default_z_image_sigmas")
        return None if own is None else list(own(steps))

    def timesteps(self, pipe: Any, scheduler: Any, steps: int, tokens: int) -> None:
        scheduler.sigma_min = 0.0  # for pipelines without `sigmas`: they do the same
        super().timesteps(pipe, scheduler, steps, tokens)

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        pictures = inputs[self.sample]
        if isinstance(pictures[0], list):
            raise UnsupportedError(
                "Z-Image Omni lays several pictures, noisy and clean ones, into one sequence: token reduction knows "
                "one picture a sample. Unpatch for such calls"
            )
        sizes = [tuple(picture.shape[-3:]) for picture in pictures]
        if len(set(sizes)) > 1:
            found = ", ".join("x".join(map(str, size)) for size in dict.fromkeys(sizes))
            raise UnsupportedError(
                f"the latents of this batch have different sizes ({found}), so their tokens have no common grid: "
                "give pictures of one size, or call the pipeline once a size"
            )
        super().observe(layout, denoiser, inputs)

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        prompt = text - text % _MULTIPLE
        yield next(iter(denoiser.all_x_embedder.values())), h * w + text % _MULTIPLE
        yield denoiser.t_embedder, 1
        yield denoiser.cap_embedder, prompt
        for block in denoiser.context_refiner:
            yield block.attention, prompt
            yield block.feed_forward, prompt
            yield attention_core(block.attention, prompt), prompt
        for block in [*denoiser.noise_refiner, *denoiser.layers]:
            yield block.adaLN_modulation, 1
        final = next(iter(denoiser.all_final_layer.values()))
        yield final.adaLN_modulation, 1
        yield final.linear, h * w + text


def _padded(rows: int) -> int:
    return -(-rows // _MULTIPLE) * _MULTIPLE

"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x and XL, with img2img, inpainting, ControlNet and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from ..runtime.deep import Cut, DeepSite
from ..runtime.site import Block, Level, Site
from .attention import CrossAttention, FeedForwardSite, SelfAttention, basic_sites
from .base import Backbone, Layout, register_backbone


@register_backbone
class UNet(Backbone):
    name = "unet"
    models = ("UNet2DConditionModel",)
    sites = (DeepSite, SelfAttention, CrossAttention, FeedForwardSite)
    sample = "sample"

    def layout(self, denoiser: Any) -> Layout:
        names = {module: name for name, module in denoiser.named_modules()}
        stages = list(_stages(denoiser))
        top = min((depth for depth, stage in stages if _transformers(stage)), default=0)
        levels = [Level(i) for i in range(max(depth for depth, _ in stages) - top + 1)]
        sites: list[Site] = []
        images = []
        index = 0
        for depth, stage in stages:
            for transformer in _transformers(stage):
                level = levels[depth - top]
                images.append((transformer, level))
                for module in transformer.transformer_blocks:
                    sites += basic_sites(Block(index, names[module], module, module.dim), level)
                    index += 1
        used = {site.level.index for site in sites}
        pairs = []
        if sites and (cuts := _cuts(denoiser, top)):
            pairs.append(DeepSite(names[cuts[-1].modules[0]], cuts, levels[0], sites, denoiser.up_blocks))
        return Layout(sites, [level for level in levels if level.index in used], images, pairs)

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        sizes = _sizes(denoiser, height, width)
        return [sizes[depth] for depth in sorted({depth for depth, stage in _stages(denoiser) if _transformers(stage)})]

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        """By the arithmetic of the downsampling layers; seen, each time, at the transformers' input images."""
        size = self.size(layout, inputs)
        if layout.notes.get("size") != size:
            layout.notes = {"size": size, "grids": self.grids(denoiser, *size)}
        for level, grid in zip(layout.levels, layout.notes["grids"], strict=True):
            level.grid = grid

    def guided(self, denoiser: Any, pipe: Any) -> bool:
        return denoiser.config.get("time_cond_proj_dim") is None  # as LCMs have it, for the scale of the guidance

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        sizes = [h * w for h, w in _sizes(denoiser, height, width)]
        yield denoiser.conv_in, sizes[0]
        yield denoiser.conv_out, sizes[0]
        for name in ("time_embedding", "add_embedding", "class_embedding"):
            if isinstance(embedding := getattr(denoiser, name, None), nn.Module):
                yield embedding, 1
        last = len(sizes) - 1
        for depth, stage in _stages(denoiser):
            pixels = sizes[depth]
            for resnet in stage.resnets:
                for layer in resnet.children():
                    yield layer, 1 if isinstance(layer, nn.Linear) else pixels
            for transformer in _transformers(stage):
                yield transformer.proj_in, pixels
                yield transformer.proj_out, pixels
            for sampler in getattr(stage, "downsamplers", None) or ():
                yield sampler, sizes[min(depth + 1, last)]
            for sampler in getattr(stage, "upsamplers", None) or ():
                yield sampler, sizes[depth - 1]


def _stages(unet: Any) -> Iterator[tuple[int, Any]]:
    """(number of downsamplings before it, block) in the order of execution."""
    depth = 0
    for block in unet.down_blocks:
        yield depth, block
        depth += len(getattr(block, "downsamplers", None) or ())
    if unet.mid_block is not None:
        yield depth, unet.mid_block
    for block in unet.up_blocks:
        yield depth, block
        depth -= len(getattr(block, "upsamplers", None) or ())


class _Layer(NamedTuple):
    """What lies between two skips of a UNet, or what uses one of them: resnet and attention, a sampler."""

    stage: Any
    modules: list[nn.Module]
    depth: int  # of what it returns


def _cuts(unet: Any, top: int) -> list[Cut]:
    """The ways to divide a UNet; `top` is the depth of level 0.

    Skip 0 comes from `conv_in`, skip i from the i-th layer of the way down, downsamplers counted; each is used by one
    layer of the way up. Branch b leaves out all layers between skip b and its user.
    """
    down, up = list[_Layer](), list[_Layer]()
    middle = unet.mid_block
    for depth, stage in _stages(unet):
        if stage is middle:
            continue
        if type(stage).__name__.startswith(("K", "Skip", "AttnSkip")):
            return []  # skips of another kind
        layers = down if any(stage is block for block in unet.down_blocks) else up
        attentions = getattr(stage, "attentions", None) or [None] * len(stage.resnets)
        for resnet, attention in zip(stage.resnets, attentions, strict=True):
            layers.append(_Layer(stage, [resnet, attention] if attention is not None else [resnet], depth))
        if samplers := getattr(stage, "downsamplers", None):
            down.append(_Layer(stage, [*samplers], depth + 1))
        if samplers := getattr(stage, "upsamplers", None):  # after a block's last layer, without a skip
            up[-1] = _Layer(stage, [*up[-1].modules, *samplers], depth - 1)
    cuts = []
    for branch in range(len(down) + (middle is not None)):
        above = up[: len(down) - branch]
        modules = _joined(down[branch:], down) + ([middle] if middle is not None else []) + _joined(above, up)
        last = above[-1].stage if above else middle
        depth = above[-1].depth if above else down[-1].depth
        cuts.append(Cut(tuple(modules), last.resnets[-1].out_channels, 2.0 ** (top - depth)))
    return cuts


def _joined(inside: Sequence[_Layer], every: Sequence[_Layer]) -> list[nn.Module]:
    """Modules of layers; of a block that is inside with all of its layers, the block."""
    found: list[nn.Module] = []
    for _, group in groupby(inside, key=lambda layer: id(layer.stage)):
        layers = list(group)
        whole = len(layers) == sum(layer.stage is layers[0].stage for layer in every)
        found += [layers[0].stage] if whole else [module for layer in layers for module in layer.modules]
    return found


def _sizes(unet: Any, height: int, width: int) -> list[tuple[int, int]]:
    """(h, w) at each depth, by the arithmetic of the downsampling convolutions that are there."""
    sizes = [(height, width)]
    for block in unet.down_blocks:
        for sampler in getattr(block, "downsamplers", None) or ():
            conv = sampler.conv
            kernel, stride = (conv.kernel_size[0], conv.stride[0]) if isinstance(conv, nn.Conv2d) else (2, 2)
            # Downsample2D with padding 0 pads one row and one column itself.
            padding = 2 * sampler.padding if getattr(sampler, "padding", 0) else kernel - stride
            sizes.append(tuple((side + padding - kernel) // stride + 1 for side in sizes[-1]))  # type: ignore[arg-type]
    return sizes


def _transformers(stage: Any) -> list[Any]:
    return [a for a in getattr(stage, "attentions", None) or () if hasattr(a, "transformer_blocks")]

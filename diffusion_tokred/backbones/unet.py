"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x and XL, with img2img, inpainting, ControlNet and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..runtime.site import KV, Block, Cache, Call, Level, Out, Site
from ..runtime.work import Weights, macs
from .base import Backbone, FeedForwardSite, Layout, TappedSite, register_backbone, without


class SelfAttention(TappedSite):
    """`attn1` of a BasicTransformerBlock."""

    kind = "attention"
    offers = frozenset({"at", "kv", "kv_select", "cache", "watch"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | None, watch: Any) -> Out:
        kwargs = {**call.kwargs, "hidden_states": x}
        mask = kwargs.get("attention_mask")
        if mask is not None and at is not None and mask.shape[-1] != x.shape[1]:
            kwargs["attention_mask"] = mask.gather(
                -1, at.expand(mask.shape[0], -1)[:, None].expand(-1, mask.shape[1], -1)
            )
        if isinstance(kv, KV) and watch is None and not _fused(self.module):
            # The processor takes separate keys and values here: reduce before they are projected.
            kwargs["encoder_hidden_states"] = kv.reduce(call.x)
            if mask is not None:
                if kv.at is None:
                    raise UnsupportedError("keys and values under a mask can be chosen, not averaged")
                kwargs["attention_mask"] = mask.index_select(-1, kv.at)
            return Out(call.base(**kwargs))
        return Out(self.attend(call, kwargs, 0, kv, watch))

    def needs_tap(self, needs: frozenset[str]) -> bool:
        # Fused projections have no keys and values of their own to call: those are reduced after the projection.
        return bool(needs & {"cache", "watch"}) or (bool(needs & {"kv", "kv_select"}) and _fused(self.module))

    def weights(self) -> Weights:
        a = self.module
        if _fused(a):  # all rows handed in are projected, whatever is attended to
            return Weights(query=macs(a.to_q, a.to_k, a.to_v, a.to_out), core=2 * a.inner_dim)
        return Weights(query=macs(a.to_q, a.to_out), key=macs(a.to_k, a.to_v), core=2 * a.inner_dim)


class CrossAttention(Site):
    """`attn2` of a BasicTransformerBlock: image tokens ask, the prompt answers."""

    kind = "cross_attention"
    offers = frozenset({"at"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | None, watch: Any) -> Out:
        if call.kwargs.get("ip_adapter_masks") is not None:
            # An adapter's mask is an image, resized to the number of queries: it needs them all, in their places.
            out = call.base(**{**call.kwargs, "hidden_states": x if at is None else _put(call.x, at, x)})
            return Out(out if at is None else _take(out, at))
        return Out(call.base(x, *call.args[1:], **without(call.kwargs, "hidden_states")))

    def weights(self) -> Weights:
        a = self.module
        return Weights(query=macs(a.to_q, a.to_out), text=macs(a.to_k, a.to_v), core=2 * a.inner_dim, text_is="keys")


@register_backbone
class UNet(Backbone):
    name = "unet"
    models = ("UNet2DConditionModel",)
    sites = (SelfAttention, CrossAttention, FeedForwardSite)

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
                    block = Block(index, names[module], module, module.dim)
                    index += 1
                    sites += [
                        kind(f"{block.name}.{attribute}", getattr(module, attribute), block, level)
                        for attribute, kind in _parts(module)
                    ]
        used = {site.level.index for site in sites}
        return Layout(sites, [level for level in levels if level.index in used], images)

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        sizes = _sizes(denoiser, height, width)
        top = min((depth for depth, stage in _stages(denoiser) if _transformers(stage)), default=0)
        return [sizes[top + level.index] for level in self.layout(denoiser).levels]

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


def _parts(block: Any) -> Iterator[tuple[str, type[Site]]]:
    if not block.only_cross_attention:
        yield "attn1", SelfAttention
    else:
        yield "attn1", CrossAttention
    if block.attn2 is not None:
        yield "attn2", CrossAttention if block.attn2.is_cross_attention else SelfAttention
    yield "ff", FeedForwardSite


def _fused(attention: Any) -> bool:
    return bool(getattr(attention, "fused_projections", False))


def _put(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """x (B, N, C) with `rows` (B, M, C) in the places `at` (M,) or (B, M)."""
    return x.scatter(1, at.expand(rows.shape[:2])[:, :, None].expand_as(rows), rows)


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (M,) or (B, M) of x (B, N, C)."""
    if at.ndim == 1:
        return x.index_select(1, at)
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))

"""Pipelines of real models' widths with random weights: what a step costs does not depend on the weights.

Only the denoiser and a scheduler are there: prompts are random embeddings, and latents come out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """A pipeline and how it is called.

    Attributes:
        name: such as "sd3-1024".
        pipe: it.
        call: keyword arguments of it, all but the number of steps.
        depth: blocks, and of how many, if these are fewer than the real model's; else None.
        rows: of a denoiser call.
    """

    name: str
    pipe: Any
    call: Mapping[str, Any]
    depth: str | None
    rows: int


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        model, pipe, scheduler: diffusers' class names.
        config: of the real model, without its depth.
        depth: the option that says how many blocks there are, with its real value; of one with several, the largest.
        tiny: what replaces it for trying things out.
        text: shape of the prompt's embeddings (tokens, width); of the tiny model the width is 32, and 7 tokens.
        pooled: width of the pooled embedding, 0 if there is none.
        patch: pixels that a token is wide.
        guided: takes guidance as a second half of the batch.
    """

    model: str
    pipe: str
    scheduler: str
    config: Mapping[str, Any]
    depth: Mapping[str, Any]
    tiny: Mapping[str, Any]
    text: tuple[int, int]
    pooled: int = 0
    patch: int = 16
    guided: bool = True


_DOWN, _UP = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
FAMILIES: dict[str, Family] = {
    "sd15": Family(
        "UNet2DConditionModel", "StableDiffusionPipeline", "DDIMScheduler",
        dict(cross_attention_dim=768, attention_head_dim=8), {"layers_per_block": 2},
        dict(
            cross_attention_dim=32, attention_head_dim=2, block_out_channels=(32, 32, 64, 64), norm_num_groups=8,
            layers_per_block=1,
        ),
        (77, 768), patch=8,
    ),
    "sdxl": Family(
        "UNet2DConditionModel", "StableDiffusionXLPipeline", "DDIMScheduler",
        dict(
            block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", *_DOWN * 2),
            up_block_types=(*_UP * 2, "UpBlock2D"), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        {"transformer_layers_per_block": (1, 2, 10)},
        dict(
            block_out_channels=(32, 32, 64), norm_num_groups=8, attention_head_dim=(1, 2, 4), cross_attention_dim=32,
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        ),
        (77, 2048), pooled=1280, patch=16,
    ),
    "pixart": Family(
        "PixArtTransformer2DModel", "PixArtSigmaPipeline", "DDIMScheduler",
        dict(
            num_attention_heads=16, attention_head_dim=72, cross_attention_dim=1152, caption_channels=4096,
            use_additional_conditions=False, norm_type="ada_norm_single", in_channels=4, out_channels=8, patch_size=2,
        ),
        {"num_layers": 28},
        dict(num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, caption_channels=32),
        (300, 4096),
    ),
    "sd3": Family(
        "SD3Transformer2DModel", "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler",
        dict(
            num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, in_channels=16, out_channels=16, pos_embed_max_size=192,
        ),
        {"num_layers": 24},
        dict(
            num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=32, pos_embed_max_size=32,
        ),
        (333, 4096), pooled=2048,
    ),
    "flux": Family(
        "FluxTransformer2DModel", "FluxPipeline", "FlowMatchEulerDiscreteScheduler",
        dict(
            num_attention_heads=24, attention_head_dim=128, joint_attention_dim=4096, pooled_projection_dim=768,
            in_channels=64, patch_size=1, guidance_embeds=True,
        ),
        {"num_layers": 19, "num_single_layers": 38},
        dict(
            num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8), in_channels=16,
        ),
        (512, 4096), pooled=768, guided=False,
    ),
}  # fmt: skip
# Blocks on a CPU, where the whole model would take minutes a step or more memory than there is.
CPU_DEPTH = {"pixart": 4, "sd3": 4, "flux": 2}


def shape(
    name: str,
    *,
    depth: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    guidance: bool = False,
) -> Shape:
    """A pipeline by family and side of the picture in pixels: "sd15-512", "sdxl-1024", "pixart-1024", "flux-1024", ...

    Args:
        name: with "tiny-" before it, a small model of that family, to try things out: its times mean nothing.
        depth: blocks (of FLUX: double ones, with twice as many single ones; of SDXL: at most so many in a row). By
            default all, but on a CPU `CPU_DEPTH`.
        guidance: two rows a call, the prompt's and the empty one's. FLUX's guidance is embedded: one row.

    Raises:
        ConfigError: an unknown family, or a size that its tokens do not fit.
    """
    import diffusers

    found = re.fullmatch(r"(tiny-)?([a-z0-9]+)-(\d+)", name)
    if found is None or found[2] not in FAMILIES:
        raise ConfigError(
            f"a shape is FAMILY-PIXELS with a family of {', '.join(FAMILIES)}, such as sd3-1024, got {name!r}"
        )
    tiny, family, pixels = found[1] is not None, FAMILIES[found[2]], int(found[3])
    multiple = 64 if family.model.startswith("UNet") else family.patch
    if not pixels or pixels % multiple:
        raise ConfigError(f"{name}: the side is a multiple of {multiple} pixels")
    cpu = torch.device(device).type == "cpu"
    most = 2 if tiny else CPU_DEPTH.get(found[2]) if cpu else None
    blocks, said = _depth(family, depth or most)
    config = {**family.config, **blocks, **(family.tiny if tiny else {})}
    if family.model != "FluxTransformer2DModel":
        config["sample_size"] = pixels // 8
    if "pos_embed_max_size" in config:
        config["pos_embed_max_size"] = max(config["pos_embed_max_size"], pixels // family.patch)
    model = _random(getattr(diffusers, family.model), config, dtype, device)
    pipe = _pipe(family, model)
    tokens, width = (7, 32) if tiny else family.text
    draws = torch.Generator().manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draws).to(device, dtype)

    guided = guidance and family.guided
    call: dict[str, Any] = dict(
        height=pixels, width=pixels, output_type="latent", prompt_embeds=noise(1, tokens, width)
    )
    call["guidance_scale"] = 4.0 if guided or not family.guided else 1.0
    pooled = 32 if tiny and family.pooled else family.pooled
    if pooled:
        call["pooled_prompt_embeds"] = noise(1, pooled)
    if "PixArt" in family.pipe:
        call |= dict(
            prompt_attention_mask=torch.ones(1, tokens, dtype=torch.long, device=device),
            negative_prompt=None, use_resolution_binning=False,
        )  # fmt: skip
    if guided:
        for key in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"):
            if key in call:
                call[f"negative_{key}"] = call[key] if "mask" in key else noise(*call[key].shape)
    return Shape(name, pipe, call, said, 2 if guided else 1)


def twin(pipe: Any, name: str) -> Any:
    """The pipeline again with a denoiser of its own, which has the same weights, not copies of them, and a scheduler of
    its own: what is done to one leaves the other as it is. `name`: of the denoiser, "unet" or "transformer"."""
    model = getattr(pipe, name)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.copy(pipe)
    setattr(other, name, copy.deepcopy(model, shared))
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other


def _depth(family: Family, most: int | None) -> tuple[dict[str, Any], str | None]:
    """The options that say how many blocks there are, and what is to be said of it."""
    if most is None or (family.model == "UNet2DConditionModel" and "transformer_layers_per_block" not in family.depth):
        return dict(family.depth), None
    found: dict[str, Any] = {}
    for place, (key, real) in enumerate(family.depth.items()):
        at_most = most * (1 + place)  # FLUX has twice as many single blocks
        found[key] = tuple(min(n, at_most) for n in real) if isinstance(real, tuple) else min(real, at_most)
    if found == dict(family.depth):
        return found, None
    return found, ", ".join(f"{key} {found[key]} of {real}" for key, real in family.depth.items())


def _random(kind: Callable[..., nn.Module], config: dict[str, Any], dtype: torch.dtype, device: Any) -> nn.Module:
    """A model with random weights, always the same on a kind of device, made in its type and place at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
        with torch.device(device), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return nn.Module.to(kind(**config).eval(), dtype)  # diffusers' own `to` warns
    finally:
        torch.set_default_dtype(before)


def _pipe(family: Family, model: nn.Module) -> Any:
    """The family's pipeline with nothing but a denoiser and a scheduler."""
    import inspect

    import diffusers

    kind = getattr(diffusers, family.pipe)
    options: dict[str, Any] = (
        dict(clip_sample=False, steps_offset=1) if family.scheduler == "DDIMScheduler" else dict(shift=3.0)
    )
    parts: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    }
    parts["unet" if "unet" in parts else "transformer"] = model
    parts["scheduler"] = getattr(diffusers, family.scheduler)(**options)
    if "requires_safety_checker" in inspect.signature(kind.__init__).parameters:
        parts["requires_safety_checker"] = False
    if "add_watermarker" in inspect.signature(kind.__init__).parameters:
        parts["add_watermarker"] = False
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""Tiny random-weight diffusers pipelines, offline, for tests. Nothing is cached; the same seed gives
the same weights.

Builders, all `(seed=0, scheduler=None) -> DiffusionPipeline` in float32 (`pipe.to(torch.float64)` works for all of
them):

    sd          UNet2DConditionModel shaped like SD1.5: attention at levels 0, 1, 2 and in the middle (level 3)
    sdxl        UNet shaped like SDXL: none at the outermost level, then 1 transformer block a site, then 2
    sd3         SD3Transformer2DModel, 3 joint blocks; `sd3(dual=(0, 1), qk_norm="rms_norm")` is SD3.5-medium's kind
    pixart      PixArtTransformer2DModel (Sigma), 3 blocks
    flux        FluxTransformer2DModel, 2 double and 2 single blocks; `flux(guidance_embeds=True)` is FLUX-dev's kind
    dit         DiTTransformer2DModel, 3 blocks, class labels; has no latent output, so `run` returns its pictures
    img2img(pipe), inpaint(pipe), controlnet(pipe, seed=0): other pipelines around the *same* components

`testing.families` has more builders (flux2, qwenimage, wan, ...); everything below works on what they build too.

Calling them:

    run(pipe, steps=3, seed=0, batch=1, guidance=4, **kw) -> Tensor   latents (packed for FLUX); depends on these only
    inputs(pipe, seed=0, batch=1, ...) -> dict                        the embeddings and pictures that `run` passes
    denoiser(pipe) -> nn.Module                                       `pipe.unet` or `pipe.transformer`
    BUILDERS: dict name -> builder

The default picture is 32x32 pixels = 16x16 latents (the tiny VAE has a factor of 2); `height=` and `width=` are in
pixels. Conditional and unconditional embeddings differ in every value, and samples of a batch differ, so that mixing
them up shows. `guidance <= 1` turns CFG off; FLUX takes it as `true_cfg_scale`: two separate passes, "cond" then
"uncond".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

TEXT, POOLED = 32, 32  # widths of the prompt embeddings in every pipeline here
# What a family's pipeline wants otherwise than `inputs` has it: from those keywords to the ones that replace them or
# come on top. By the denoiser's class name; `families` adds its own.
INPUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def _vae(latent_channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    """A two-level VAE: factor 2, so that 32x32 pixels are 16x16 latents and decoding costs nothing."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        shift_factor=shift,
    ).eval()


def _unet_config(kind: str) -> dict[str, Any]:
    """What UNet and ControlNet have in common."""
    common = dict(cross_attention_dim=TEXT, norm_num_groups=8, layers_per_block=1, in_channels=4)
    if kind == "sd":
        return common | dict(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            attention_head_dim=2,  # diffusers' old misnomer: the number of heads
        )
    return common | dict(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
    )


def _unet(kind: str) -> UNet2DConditionModel:
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3 if kind == "sd" else ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",)
    return UNet2DConditionModel(sample_size=16, out_channels=4, up_block_types=up, **_unet_config(kind)).eval()


_SD3: dict[str, Any] = dict(  # what SD3's transformer and ControlNet have in common
    sample_size=16, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=TEXT, caption_projection_dim=32, pooled_projection_dim=POOLED, pos_embed_max_size=32,
)  # fmt: skip


def sd(seed: int = 0, scheduler: Any = None) -> StableDiffusionPipeline:
    """SD1.5's shape. Tokens a level at 32x32 pixels: 256, 64, 16, 4."""
    torch.manual_seed(seed)
    return _quiet(
        StableDiffusionPipeline(
            vae=_vae(), unet=_unet("sd"), scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
            text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, image_encoder=None,
            requires_safety_checker=False,
        )
    )  # fmt: skip


def sdxl(seed: int = 0, scheduler: Any = None) -> StableDiffusionXLPipeline:
    """SDXL's shape. Tokens at the two attention levels at 32x32 pixels: 64 and 16."""
    torch.manual_seed(seed)
    return _quiet(
        StableDiffusionXLPipeline(
            vae=_vae(), unet=_unet("sdxl"), scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
            text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
        )
    )  # fmt: skip


def sd3(
    seed: int = 0, scheduler: Any = None, dual: tuple[int, ...] = (), qk_norm: str | None = None
) -> StableDiffusion3Pipeline:
    """SD3's shape: 64 image tokens and 7 text tokens at 32x32 pixels; the last block is context-pre-only."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(num_layers=3, dual_attention_layers=dual, qk_norm=qk_norm, **_SD3).eval()
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer, vae=_vae(latent_channels=16, shift=0.05),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
            text_encoder_3=None, tokenizer_3=None,
        )
    )  # fmt: skip


def pixart(seed: int = 0, scheduler: Any = None) -> PixArtSigmaPipeline:
    """PixArt-Sigma's shape: 64 image tokens at 32x32 pixels, cross-attention to 7 text tokens, the last one masked."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, cross_attention_dim=32, caption_channels=TEXT, use_additional_conditions=False,
        norm_type="ada_norm_single",
    ).eval()  # fmt: skip
    return _quiet(
        PixArtSigmaPipeline(
            transformer=transformer, vae=_vae(), scheduler=scheduler or DDIMScheduler(clip_sample=False),
            text_encoder=None, tokenizer=None,
        )
    )  # fmt: skip


def flux(seed: int = 0, scheduler: Any = None, guidance_embeds: bool = False) -> FluxPipeline:
    """FLUX's shape: 64 image tokens at 32x32 pixels after packing, rotary positions on three axes."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()  # fmt: skip
    return _quiet(
        FluxPipeline(
            transformer=transformer, vae=_vae(shift=0.05),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        )
    )  # fmt: skip


def dit(seed: int = 0, scheduler: Any = None) -> DiTPipeline:
    """DiT's shape: 64 image tokens, class labels instead of text; always 32x32 pixels."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return _quiet(
        DiTPipeline(transformer=transformer, vae=_vae(), scheduler=scheduler or DDIMScheduler(clip_sample=False))
    )


BUILDERS = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "pixart": pixart, "flux": flux, "dit": dit}


def img2img(pipe: Any) -> Any:
    """The img2img pipeline over the components of an sd, sdxl, sd3 or flux pipeline (the same objects). `run`
    supplies a picture.
    """
    return _around(
        pipe,
        {
            "StableDiffusionPipeline": StableDiffusionImg2ImgPipeline,
            "StableDiffusionXLPipeline": StableDiffusionXLImg2ImgPipeline,
            "StableDiffusion3Pipeline": StableDiffusion3Img2ImgPipeline,
            "FluxPipeline": FluxImg2ImgPipeline,
        },
    )


def inpaint(pipe: Any) -> Any:
    """The inpainting pipeline over the components of an sd, sdxl, sd3 or flux pipeline; `run` supplies picture and
    mask.
    """
    return _around(
        pipe,
        {
            "StableDiffusionPipeline": StableDiffusionInpaintPipeline,
            "StableDiffusionXLPipeline": StableDiffusionXLInpaintPipeline,
            "StableDiffusion3Pipeline": StableDiffusion3InpaintPipeline,
            "FluxPipeline": FluxInpaintPipeline,
        },
    )


def controlnet(pipe: Any, seed: int = 0) -> Any:
    """The ControlNet pipeline over the components of an sd, sdxl or sd3 pipeline, with a ControlNet whose outputs are
    not zero.
    """
    classes = {
        "StableDiffusionPipeline": StableDiffusionControlNetPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLControlNetPipeline,
        "StableDiffusion3Pipeline": StableDiffusion3ControlNetPipeline,
    }
    torch.manual_seed(seed + 1)
    if classes.get(type(pipe).__name__) is StableDiffusion3ControlNetPipeline:
        net: torch.nn.Module = SD3ControlNetModel(num_layers=2, qk_norm=pipe.transformer.config.qk_norm, **_SD3)
    else:
        kind = "sdxl" if "XL" in type(pipe).__name__ else "sd"
        net = ControlNetModel(conditioning_embedding_out_channels=(8, 16), **_unet_config(kind))
    for name, p in net.named_parameters():  # the "zero convolutions" start at zero: then a ControlNet changes nothing
        if ("controlnet_" in name or "pos_embed_input" in name) and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return _around(pipe, classes, controlnet=net.eval())


def _around(pipe: Any, classes: dict[str, Any], **more: Any) -> Any:
    cls = classes.get(type(pipe).__name__)
    if cls is None:
        raise ValueError(f"no such variant of {type(pipe).__name__}; there is one of {', '.join(classes)}")
    accepted = inspect.signature(cls.__init__).parameters
    components = {k: v for k, v in (pipe.components | more).items() if k in accepted}
    if "requires_safety_checker" in accepted:
        components["requires_safety_checker"] = False
    return _quiet(cls(**components))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> torch.nn.Module:
    """`pipe.unet` or `pipe.transformer`, inside of `torch.compile`'s wrapper if there is one."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return getattr(model, "_orig_mod", model)


def inputs(
    pipe: Any, seed: int = 0, batch: int = 1, guidance: float = 4.0, height: int = 32, width: int = 32
) -> dict[str, Any]:
    """Keyword arguments for `pipe(...)`: embeddings (and pictures) that depend on seed and place in the batch only.

    Row `i` of a batch is the single sample of `batch=1` with seed `seed + i`.
    """
    model: Any = denoiser(pipe)
    kind, dtype, device = type(model).__name__, model.dtype, model.device

    def rows(salt: int, *shape: int, sampler: Any = torch.randn) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(1000 * salt + seed + i) for i in range(batch)]
        return torch.cat([sampler(1, *shape, generator=g, dtype=torch.float32) for g in generators]).to(device, dtype)

    if kind == "DiTTransformer2DModel":
        return dict(class_labels=[(207 + 11 * (seed + i)) % 1000 for i in range(batch)], guidance_scale=guidance)

    cfg, is_flux = guidance > 1, kind == "FluxTransformer2DModel"
    kw: dict[str, Any] = dict(height=height, width=width, prompt_embeds=rows(1, 7, TEXT))
    kw["true_cfg_scale" if is_flux else "guidance_scale"] = guidance
    if cfg:
        kw["negative_prompt_embeds"] = rows(2, 7, TEXT) + 0.5
    if kind == "PixArtTransformer2DModel":
        mask = torch.ones(batch, 7, dtype=torch.long, device=device)
        mask[:, -1] = 0
        kw |= dict(prompt_attention_mask=mask, negative_prompt=None, use_resolution_binning=False)
        if cfg:
            kw["negative_prompt_attention_mask"] = mask.clone()
    elif is_flux or kind == "SD3Transformer2DModel" or "XL" in type(pipe).__name__:
        kw["pooled_prompt_embeds"] = rows(3, POOLED)
        if cfg:
            kw["negative_pooled_prompt_embeds"] = rows(4, POOLED) + 0.5
    elif kind in INPUTS:
        kw |= INPUTS[kind](kw)

    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in {"image", "control_image"} & parameters.keys() - kw.keys():
        kw[name] = rows(5, 3, height, width, sampler=torch.rand)
    if "mask_image" in parameters:
        kw["mask_image"] = (rows(6, 1, height, width, sampler=torch.rand) > 0.5).to(dtype)
    return {k: v for k, v in kw.items() if k in parameters}


@torch.no_grad()
def run(pipe: Any, steps: int = 3, seed: int = 0, batch: int = 1, guidance: float = 4.0, **kw: Any) -> torch.Tensor:
    """Call the pipeline and return its latents (DiT: pictures). `kw` goes to the pipeline and wins over what `inputs`
    supplies.
    """
    size = {k: kw.pop(k) for k in ("height", "width") if k in kw}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    call = inputs(pipe, seed, batch, guidance, **size) | dict(generator=generators, num_inference_steps=steps)
    call["output_type"] = "pt" if isinstance(pipe, DiTPipeline) else "latent"
    # This one encodes its control picture with the process's random numbers, whatever generators it is given.
    draws, device = isinstance(pipe, StableDiffusion3ControlNetPipeline), denoiser(pipe).device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=draws):
        if draws:
            torch.manual_seed(seed)
        return pipe(**(call | kw))[0]

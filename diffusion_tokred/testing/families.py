"""More tiny pipelines for `testing.tiny`, under the same promises: transformer families that came after FLUX.

Builders, all `(seed=0, scheduler=None) -> DiffusionPipeline` in float32, for 32x32 pixels and 7 text tokens unless
told otherwise:

    flux2        Flux2Transformer2DModel, 2 double and 2 single blocks, guidance embedded: one call a step
    flux2_klein  the same without guidance embedding; CFG in two calls, "cond" then "uncond"; latents come unpacked
    qwenimage    QwenImageTransformer2DModel, 3 joint blocks; CFG in two calls, "cond" then "uncond"
    zimage       ZImageTransformer2DModel, 2 + 2 refiner blocks and 3; CFG in one call, (cond, uncond), on lists
    sana         SanaTransformer2DModel, 3 blocks, linear attention; CFG in one call, (uncond, cond)
    lumina2      Lumina2Transformer2DModel, 2 + 2 refiner blocks and 3; CFG in two calls, cond then uncond
    wan          WanTransformer3DModel, 3 blocks, 5 frames = 3 latent frames; CFG in two calls, "cond" then "uncond"
    auraflow     AuraFlowTransformer2DModel, 2 joint and 2 single blocks; CFG in one call, (uncond, cond)

`tiny.run`, `tiny.inputs` and `tiny.denoiser` work on all of them. Where a pipeline takes text masks (qwenimage, sana,
lumina2), the last token of the conditional text is masked and none of the unconditional one, so that the two differ in
length too.

`pipe.to(torch.float64)` works for all of them, and a sample is then the same in a batch and alone to 1e-8. It is no
more exact than float32 for that: diffusers applies rotary positions in float32, computes most of a Wan block in it,
and keeps the latents of Z-Image and Sana in it, so that those two return float32.

Sizes: multiples of 4 pixels, but of 16 for wan and of 32 for sana (their pipelines insist).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor

from diffusion_tokred.testing import tiny
from diffusion_tokred.testing.tiny import TEXT

_NO_TEXT: dict[str, Any] = dict(text_encoder=None, tokenizer=None)


def _awake(model: Any) -> Any:
    """For use: parameters that training starts at zero (pad tokens, some biases) get values, so that they show."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def _flow(scheduler: Any, **config: Any) -> Any:
    return scheduler or FlowMatchEulerDiscreteScheduler(**config)


# --- FLUX.2 ----------------------------------------------------------------------------------------------------------


def _flux2(cls: Any, seed: int, scheduler: Any, guidance_embeds: bool) -> Any:
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=32,
    )  # fmt: skip
    scheduler = _flow(scheduler, use_dynamic_shifting=True)
    return tiny._quiet(cls(transformer=_awake(transformer), vae=vae.eval(), scheduler=scheduler, **_NO_TEXT))


def flux2(seed: int = 0, scheduler: Any = None) -> Flux2Pipeline:
    """FLUX.2-dev's shape: 64 image tokens, positions on four axes. `guidance` is embedded: it never turns CFG on."""
    return _flux2(Flux2Pipeline, seed, scheduler, guidance_embeds=True)


def flux2_klein(seed: int = 0, scheduler: Any = None) -> Flux2KleinPipeline:
    """FLUX.2-klein-base's shape: flux2 with true CFG; its latents are (B, 4, 16, 16), not packed."""
    return _flux2(Flux2KleinPipeline, seed, scheduler, guidance_embeds=False)


# --- Qwen-Image ------------------------------------------------------------------------------------------------------


def qwenimage(seed: int = 0, scheduler: Any = None) -> QwenImagePipeline:
    """Qwen-Image's shape: 64 image tokens after packing, rotary positions centred on the picture."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = _flow(scheduler, use_dynamic_shifting=True)
    return tiny._quiet(
        QwenImagePipeline(transformer=_awake(transformer), vae=vae.eval(), scheduler=scheduler, **_NO_TEXT)
    )


def _qwenimage_inputs(kw: dict[str, Any]) -> dict[str, Any]:
    return _masks(kw, "{}_embeds_mask") | dict(true_cfg_scale=kw["guidance_scale"], guidance_scale=None)


# --- Z-Image ---------------------------------------------------------------------------------------------------------


def zimage(seed: int = 0, scheduler: Any = None) -> ZImagePipeline:
    """Z-Image's shape: 64 image tokens, and 7 text tokens padded to 32."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
    )  # fmt: skip
    vae, scheduler = tiny._vae(shift=0.05), _flow(scheduler, shift=3.0)
    return tiny._quiet(ZImagePipeline(transformer=_awake(transformer), vae=vae, scheduler=scheduler, **_NO_TEXT))


def _zimage_inputs(kw: dict[str, Any]) -> dict[str, Any]:
    lists = {name: list(embeds) for name, embeds in kw.items() if name.endswith("prompt_embeds")}
    return lists | dict(guidance_scale=max(kw["guidance_scale"] - 1, 0))  # the pipeline counts from 0, not from 1


# --- Sana ------------------------------------------------------------------------------------------------------------


def sana(seed: int = 0, scheduler: Any = None) -> SanaPipeline:
    """Sana's shape: 256 image tokens (a patch is one latent), no positions; ReLU-linear self-attention in 4 heads,
    cross-attention in 2, a convolution in the feed-forward.
    """
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, cross_attention_head_dim=16, num_cross_attention_heads=2, cross_attention_dim=32,
        caption_channels=TEXT,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    scheduler = scheduler or DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return tiny._quiet(SanaPipeline(transformer=_awake(transformer), vae=vae.eval(), scheduler=scheduler, **_NO_TEXT))


def _sana_inputs(kw: dict[str, Any]) -> dict[str, Any]:
    return _masks(kw, "{}_attention_mask") | dict(negative_prompt=None, use_resolution_binning=False)


# --- Lumina 2 --------------------------------------------------------------------------------------------------------


def lumina2(seed: int = 0, scheduler: Any = None) -> Lumina2Pipeline:
    """Lumina-Image-2.0's shape: 64 image tokens, 4 heads over 2 key-value heads."""
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=64, num_layers=3, num_refiner_layers=2,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT,
    )  # fmt: skip
    vae, scheduler = tiny._vae(shift=0.05), _flow(scheduler, shift=6.0)
    pipe = Lumina2Pipeline(transformer=_awake(transformer), vae=vae, scheduler=scheduler, **_NO_TEXT)
    pipe.vae_scale_factor = 2  # the pipeline has 8 there, whatever its VAE
    pipe.image_processor = VaeImageProcessor(vae_scale_factor=4)
    return tiny._quiet(pipe)


# --- Wan -------------------------------------------------------------------------------------------------------------


def wan(seed: int = 0, scheduler: Any = None) -> WanPipeline:
    """Wan 2.1's shape: 3 x 8 x 8 video tokens for 5 frames; heights and widths are multiples of 16 pixels."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, text_dim=TEXT,
        freq_dim=32, ffn_dim=64, rope_max_seq_len=64,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], scale_factor_temporal=2,
        scale_factor_spatial=2, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = _flow(scheduler, shift=3.0)
    return tiny._quiet(WanPipeline(transformer=_awake(transformer), vae=vae.eval(), scheduler=scheduler, **_NO_TEXT))


# --- AuraFlow --------------------------------------------------------------------------------------------------------


def auraflow(seed: int = 0, scheduler: Any = None) -> AuraFlowPipeline:
    """AuraFlow's shape: 64 image tokens with learned positions, 8 register tokens before the text. Its pipeline takes
    text masks, and passes none on: they are all ones here.
    """
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=32,
        pos_embed_max_size=256,
    )  # fmt: skip
    with torch.no_grad():  # the modulation has no biases: its gates would let next to nothing through
        for name, p in transformer.named_parameters():
            if "norm1" in name:
                p *= 6
    vae, scheduler = tiny._vae(), _flow(scheduler, shift=1.73)
    return tiny._quiet(AuraFlowPipeline(transformer=_awake(transformer), vae=vae, scheduler=scheduler, **_NO_TEXT))


def _auraflow_inputs(kw: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.ones_like(mask) for name, mask in _masks(kw, "{}_attention_mask").items()}


def _masks(kw: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    """The masks of the embeddings in `kw`, under `name.format("prompt")` and `name.format("negative_prompt")`."""
    masks = {}
    for prompt in ("prompt", "negative_prompt"):
        if (embeds := kw.get(f"{prompt}_embeds")) is not None:
            masks[name.format(prompt)] = mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            mask[:, -1] = int(prompt == "negative_prompt")
    return masks


tiny.INPUTS |= {
    "Flux2Transformer2DModel": lambda kw: dict(image=None),  # it could take pictures to edit
    "QwenImageTransformer2DModel": _qwenimage_inputs,
    "ZImageTransformer2DModel": _zimage_inputs,
    "SanaTransformer2DModel": _sana_inputs,
    "Lumina2Transformer2DModel": lambda kw: _masks(kw, "{}_attention_mask"),
    "WanTransformer3DModel": lambda kw: dict(num_frames=5),
    "AuraFlowTransformer2DModel": _auraflow_inputs,
}

BUILDERS = {
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "qwenimage": qwenimage,
    "zimage": zimage,
    "sana": sana,
    "lumina2": lumina2,
    "wan": wan,
    "auraflow": auraflow,
}

"""Our FLOPs are torch's: `FlopCounterMode` counts what runs, under maths attention (CPU flash attention it leaves out).

Models of real widths run on fake tensors, where sizes cost nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred.backbones import backbone_of
from diffusion_tokred.measure.flops import Flops
from diffusion_tokred.testing import tiny

CONFIGS = {
    "dense": None,
    "tome": tokred.ToMeConfig(levels=(0, 1)),
    "tome-all": tokred.ToMeConfig(ratio=0.7, merge_cross_attn=True, merge_ff=True),
    "tome-ff": tokred.ToMeConfig(merge_attn=False, merge_ff=True, sx=3, sy=2),
    "tome-reuse": tokred.ToMeConfig(reuse_every=2),
    "todo": tokred.ToDoConfig(factor=3, levels=(0, 1)),
    "todo-area": tokred.ToDoConfig(mode="area"),
}
MODELS = {
    "sd": tiny.sd,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "sd3-dual": lambda: tiny.sd3(dual=(0, 1), qk_norm="rms_norm"),
    "dit": tiny.dit,
    "pixart": tiny.pixart,
    "flux": tiny.flux,
    "flux-guided": lambda: tiny.flux(guidance_embeds=True),
}
SD15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SDXL = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SD3 = dict(
    sample_size=128, num_layers=3, attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536,
    pos_embed_max_size=192, dual_attention_layers=(0, 1), qk_norm="rms_norm",
)  # fmt: skip


def forward(model: nn.Module, height: int, width: int, batch: int, text: int = 7) -> None:
    """One call of a denoiser."""
    c = model.config
    sample, time = torch.zeros(batch, c.in_channels, height, width), torch.full((batch,), 5)
    if isinstance(model, DiTTransformer2DModel):
        model(sample, time, torch.zeros(batch, dtype=torch.int64))
        return
    if isinstance(model, PixArtTransformer2DModel):
        added = {"resolution": None, "aspect_ratio": None}
        if c.use_additional_conditions or (c.use_additional_conditions is None and c.sample_size == 128):
            added = dict(resolution=torch.ones(batch, 2), aspect_ratio=torch.ones(batch, 1))
        model(sample, torch.zeros(batch, text, c.caption_channels), time, added)
        return
    if isinstance(model, FluxTransformer2DModel):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(height / 2), torch.arange(width / 2))
        model(
            torch.zeros(batch, len(ids), c.in_channels), torch.zeros(batch, text, c.joint_attention_dim),
            torch.zeros(batch, c.pooled_projection_dim), torch.ones(batch), ids, torch.zeros(text, 3),
            guidance=torch.ones(batch) if c.guidance_embeds else None,
        )  # fmt: skip
        return
    kw: dict[str, Any] = dict(
        encoder_hidden_states=torch.zeros(batch, text, c.get("cross_attention_dim") or c.joint_attention_dim),
        timestep=torch.full((batch,), 5),
    )
    if isinstance(model, SD3Transformer2DModel):
        kw["pooled_projections"] = torch.zeros(batch, c.pooled_projection_dim)
    elif c.addition_embed_type:
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        kw["added_cond_kwargs"] = dict(text_embeds=torch.zeros(batch, pooled), time_ids=torch.zeros(batch, 6))
    model(torch.zeros(batch, c.in_channels, height, width), **kw)


@torch.no_grad()
def counted(model: nn.Module, *size: int) -> dict[str, int]:
    """Torch's FLOPs of one call, by module name ("" is all)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, *size)
    name = type(model).__name__
    counts = {key: sum(value.values()) for key, value in counter.get_flop_counts().items()}
    return {"": counter.get_total_flops()} | {key.removeprefix(f"{name}."): n for key, n in counts.items()}


def patched(model: nn.Module, name: str) -> nn.Module:
    config: Any = CONFIGS[name]
    if config is None:
        return tokred.patch(model, method="todo", policy=0.0)
    if not isinstance(model, UNet2DConditionModel):  # one level; cross-attention in PixArt only; rotary keys in FLUX
        config = dataclasses.replace(config, levels=(0,))
        if name == "tome-all" and not isinstance(model, PixArtTransformer2DModel):
            config = dataclasses.replace(config, merge_cross_attn=False)
        if name == "todo-area" and isinstance(model, FluxTransformer2DModel):
            config = tokred.ToMeConfig(merge_parallel=False)
    return tokred.patch(model, config)


def ours(model: nn.Module) -> int:
    """What the driver recorded of the last call (the run is still on)."""
    return model._tokred.report.steps[-1].flops


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_call(name: str, config: str) -> None:
    height, width = {"dit": (16, 16)}.get(name, (17, 23) if name in ("sd", "sdxl") else (18, 26))
    model = patched(tiny.denoiser(MODELS[name]()), config)
    with torch.no_grad():
        forward(model, 16, 16, 1)  # another run before, at another size mostly
    model._tokred.end_run()
    assert counted(model, height, width, 2)[""] == ours(model)


@pytest.mark.parametrize("size", [(16, 16, 1), (32, 16, 1), (16, 24, 2)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_sites(name: str, size: tuple[int, int, int]) -> None:
    if name == "dit" and size[0] != size[1]:
        pytest.skip("square pictures only")
    model = tiny.denoiser(MODELS[name]())
    found = counted(model, *size)
    backbone = backbone_of(model)
    layout = backbone.layout(model)
    grids = {level.index: grid for level, grid in zip(layout.levels, backbone.grids(model, *size[:2]), strict=True)}
    parts = Flops(backbone, model, layout.sites).parts(*size, 7, grids)
    expected = {kind: 0 for kind in parts}
    for site in layout.sites:
        expected[site.kind] += found[site.name] - sum(found[inner.name] for inner in site.inner)
        if site.kind == "parallel":  # the block's modulation is not the site's
            expected[site.kind] -= found[f"{site.name}.norm"]
    expected["rest"] = found[""] - sum(expected.values())
    assert parts == expected


@pytest.mark.parametrize("config", ["dense", "tome-all", "todo"])
@pytest.mark.parametrize(
    "model, settings, size",
    [
        (UNet2DConditionModel, SD15, (64, 96, 2)),
        (UNet2DConditionModel, SDXL, (128, 120, 1)),
        (SD3Transformer2DModel, SD3, (128, 128, 1)),
        (PixArtTransformer2DModel, dict(sample_size=128, num_layers=2, caption_channels=4096), (128, 96, 2)),
        (DiTTransformer2DModel, dict(num_layers=2), (32, 32, 2)),
    ],  # FLUX's grid is read from its positions, which fake tensors do not have
    ids=["sd15", "sdxl", "sd3", "pixart", "dit"],
)
def test_real_shapes(model: type[nn.Module], settings: dict[str, Any], size: tuple[int, int, int], config: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = patched(model(**settings), config)
        assert counted(denoiser, *size, 77)[""] == ours(denoiser)


def test_sd15_is_the_known_number() -> None:
    """0.803 TFLOP a sample at 64x64 latents (spec/performance.md §1, counted by torch)."""
    with FakeTensorMode():
        unet = UNet2DConditionModel(**SD15)
    backbone = backbone_of(unet)
    layout = backbone.layout(unet)
    grids = {level.index: grid for level, grid in zip(layout.levels, backbone.grids(unet, 64, 64), strict=True)}
    assert Flops(backbone, unet, layout.sites).call(64, 64, 1, 77, grids) == pytest.approx(0.803e12, rel=1e-3)


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("fused", ["fused", "lora"])
def test_changed_projections(name: str, fused: str) -> None:
    model = tiny.denoiser(MODELS[name]())
    if fused == "fused":
        model.fuse_qkv_projections()
    else:
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    tokred.patch(model, method="todo")
    assert counted(model, 16, 16, 2)[""] == ours(model)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "flux-guided"])
@pytest.mark.parametrize("config", ["tome-reuse", "todo"])
def test_report_of_a_run(name: str, config: str) -> None:
    pipe = MODELS[name]()
    patched(tiny.denoiser(pipe), config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tiny.run(pipe, steps=3, **({"true_cfg_scale": 1.0} if "flux" in name else {}))
    report = tokred.report(pipe)
    assert len(report.steps) == 3
    assert report.flops == counter.get_total_flops()
    matched = [step.flops for step in report.steps]
    assert matched[0] == matched[2]
    assert matched[0] > matched[1] if config == "tome-reuse" else matched[0] == matched[1]

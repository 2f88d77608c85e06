"""The contract's matrix, methods x backbones, and what its tests share."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from diffusion_tokred.testing.contract import Snapshot as Snapshot


def _flux(*args: Any, **kwargs: Any) -> Any:
    """diffusers' `cache_context` leaves a registry on the model when first used: it is there from the start."""
    pipe = tiny.flux(*args, **kwargs)
    with pipe.transformer.cache_context("cond"):
        return pipe


PIPES = {
    "sd": tiny.sd,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "sd3-dual": functools.partial(tiny.sd3, dual=(0, 1), qk_norm="rms_norm"),
    "dit": tiny.dit,
    "pixart": tiny.pixart,
    "flux": _flux,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tome": dict(method="tome"),
    "tome-all": dict(method="tome", levels=(0, 1), merge_cross_attn=True, merge_ff=True),
    # At level 0 the level's first block comes before any cross-attention: what it sees, both passes have in common.
    "tome-reuse": dict(method="tome", levels=(0, 1), reuse_every=2),
    "tome-share": dict(method="tome", levels=(0, 1), reuse_every=1, share_cfg=True, ratio=0.6),
    "todo": dict(method="todo"),
    "todo-area": dict(method="todo", mode="area"),
}
# Transformers have one level; SD3, DiT and FLUX have no cross-attention; rotary keys cannot be averaged.
_ONE_LEVEL = {
    "tome-all": dict(method="tome", merge_ff=True),
    "tome-reuse": dict(method="tome", reuse_every=2),
    "tome-share": dict(method="tome", reuse_every=1, share_cfg=True, ratio=0.6),
}
_OPTIONS = {
    "sd": {},
    "sdxl": {},
    "pixart": _ONE_LEVEL | {"tome-all": dict(method="tome", merge_cross_attn=True, merge_ff=True)},
    "flux": _ONE_LEVEL | {"todo-area": dict(method="tome", merge_parallel=False, reuse_every=1)},
}
MATRIX = [(pipe, config) for pipe in PIPES for config in CONFIGS]
# One of each family: for tests of what does not depend on details of a config.
SMALL = [
    ("sd", "tome-all"), ("sdxl", "todo"), ("sd3-dual", "tome-reuse"), ("sd3", "todo-area"), ("pixart", "tome-all"),
    ("flux", "tome-all"), ("flux", "todo"),
]  # fmt: skip
each = pytest.mark.parametrize("kind, config", MATRIX)
some = pytest.mark.parametrize("kind, config", SMALL)


def options(kind: str, config: str) -> dict[str, Any]:
    """Keywords of `patch` for a cell of the matrix."""
    return dict((CONFIGS | _OPTIONS.get(kind, _ONE_LEVEL))[config])


def patch(pipe: Any, kind: str, config: str, **more: Any) -> Any:
    return tokred.patch(pipe, **options(kind, config) | more)


@functools.cache
def dense(kind: str, **run: Any) -> torch.Tensor:
    """What an untouched pipeline gives."""
    return tiny.run(PIPES[kind](), **{"steps": 2} | run)


@functools.cache
def reduced(kind: str, config: str, **run: Any) -> torch.Tensor:
    """What a fresh pipeline gives, patched and run once."""
    return tiny.run(patch(PIPES[kind](), kind, config), **{"steps": 2} | run)


def run(pipe: Any, **more: Any) -> torch.Tensor:
    return tiny.run(pipe, **{"steps": 2} | more)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit-equal, and finite."""
    return bool(torch.isfinite(a).all()) and torch.equal(a, b)


def near(a: torch.Tensor, b: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def leaves(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The self-attention modules."""
    return [m for n, m in denoiser.named_modules() if n.endswith(("attn1", ".attn"))]


def private_modules() -> list[str]:
    """Modules that taps have put into `sys.modules`."""
    return [name for name in sys.modules if name.startswith("diffusion_tokred.runtime.tap.")]


@torch.no_grad()
def loop(
    pipe: Any, order: tuple[str, ...] = ("both",), steps: int = 4, guidance: float = 4.0, size: int = 32
) -> torch.Tensor:
    """A denoising loop written by hand. `order` names the passes of a step: ("both",) is one batched call, ("cond",
    "uncond") two calls of batch 1, ("cond",) is without guidance.
    """
    model, scheduler = tiny.denoiser(pipe), pipe.scheduler
    data = tiny.inputs(pipe, height=size, width=size)
    if scheduler.config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(steps, mu=0.8)
    else:
        scheduler.set_timesteps(steps)
    channels = model.config.in_channels // (4 if type(model).__name__ == "FluxTransformer2DModel" else 1)  # packed
    noise = torch.randn(1, channels, size // 2, size // 2, generator=torch.Generator().manual_seed(0))
    latents = noise.to(model.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)

    def call(names: tuple[str, ...], t: torch.Tensor) -> torch.Tensor:
        def stack(key: str) -> torch.Tensor:
            return torch.cat([data[{"cond": "", "uncond": "negative_"}[name] + key] for name in names])

        sample, kind = torch.cat([latents] * len(names)), model.config.get("_class_name", type(model).__name__)
        time = t.expand(len(names))
        if kind == "DiTTransformer2DModel":
            labels = torch.tensor([{"cond": data["class_labels"][0], "uncond": 1000}[name] for name in names])
            return model(sample, time, labels, return_dict=False)[0].chunk(2, 1)[0]
        text = stack("prompt_embeds")
        if kind == "PixArtTransformer2DModel":
            added = {"resolution": None, "aspect_ratio": None}
            mask = stack("prompt_attention_mask")
            out = model(sample, text, time, added, encoder_attention_mask=mask, return_dict=False)[0]
            return out.chunk(2, 1)[0]
        if kind == "FluxTransformer2DModel":
            b, c, h, w = sample.shape
            packed = sample.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
            ids = torch.zeros(h // 2, w // 2, 3)
            ids[..., 1], ids[..., 2] = torch.arange(h // 2)[:, None], torch.arange(w // 2)
            out = model(
                packed, text, stack("pooled_prompt_embeds"), (time / 1000).to(sample.dtype), ids.reshape(-1, 3),
                torch.zeros(text.shape[1], 3), return_dict=False,
            )[0]  # fmt: skip
            return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(sample.shape)
        if kind == "SD3Transformer2DModel":
            return model(sample, text, stack("pooled_prompt_embeds"), time, return_dict=False)[0]
        more = {}
        if "pooled_prompt_embeds" in data:
            ids = torch.tensor([[size, size, 0, 0, size, size]] * len(names), dtype=model.dtype)
            more["added_cond_kwargs"] = dict(text_embeds=stack("pooled_prompt_embeds"), time_ids=ids)
        sample = scheduler.scale_model_input(sample, t)
        return model(sample, t, encoder_hidden_states=text, return_dict=False, **more)[0]

    for t in scheduler.timesteps:
        if order == ("both",):
            uncond, cond = call(("uncond", "cond"), t).chunk(2)
        else:
            out = {name: call((name,), t) for name in order}
            cond, uncond = out["cond"], out.get("uncond", out["cond"])
        latents = scheduler.step(uncond + guidance * (cond - uncond), t, latents, return_dict=False)[0]
    return latents

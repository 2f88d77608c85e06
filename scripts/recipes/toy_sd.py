"""toy-sd: a StableDiffusionPipeline of 128 px, 1,024 attention tokens at the top level, v-prediction.

The top level costs most of the time and decides nothing of the layout. So the inner levels learn first, on what the
first two convolutions hand them (`inner`: the top level's blocks are left out and a small head replaces them); then the
whole UNet without the top level's attention (`convolutions`), then all of it (`full`).
"""

import random
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusion_tokred.zoo import scenes
from recipes.base import Denoiser
from recipes.text import reader, tokenizer

CHANNELS = (32, 64, 128)


class _Skip(nn.Module):
    """In place of an attention block: adds nothing."""

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (hidden,)


class ToySD(Denoiser):
    """UNet of 4.3 M parameters with attention at all three levels; a T5 encoder in the text slot."""

    lr = 1e-3
    native = "full"
    stages = (
        (0.36, {"inner": 16, "inner 256 px": 4}),
        (0.06, {"convolutions": 12, "inner 256 px": 4}),
        (0.58, {"full": 8}),
    )

    def __init__(self, vae: Path, text: Path) -> None:
        self.unet = UNet2DConditionModel(
            sample_size=32,
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            block_out_channels=CHANNELS,
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=128,
            attention_head_dim=(2, 4, 4),  # diffusers' name for the number of heads
        )
        self.scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )
        u = self.unet
        self.blocks = (list(u.down_blocks), list(u.up_blocks), u.conv_in, u.conv_norm_out, u.conv_out)
        self.top = [*u.down_blocks[0].attentions, *u.up_blocks[-1].attentions]
        self.upsamplers = u.up_blocks[-2].upsamplers
        self.attentions = (u.down_blocks[0].attentions, u.up_blocks[-1].attentions)
        for block in self.top:  # adds nothing until it has learnt to
            nn.init.zeros_(block.proj_out.weight)
            nn.init.zeros_(block.proj_out.bias)
        head = nn.ModuleDict({"norm": nn.GroupNorm(4, CHANNELS[1]), "out": nn.Conv2d(CHANNELS[1], 4 * 4, 3, padding=1)})
        self.head = nn.Sequential(head["out"], nn.PixelShuffle(2))
        none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        parts = dict(unet=self.unet, text_encoder=reader(text), tokenizer=tokenizer(), scheduler=self.scheduler)
        self.assemble(diffusers.StableDiffusionPipeline, vae, head, **parts, **none)

    def variant(self, what: str) -> None:
        u, (down, up, conv_in, norm, out) = self.unet, self.blocks
        inner = what.startswith("inner")
        u.down_blocks, u.up_blocks = nn.ModuleList(down[inner:]), nn.ModuleList(up[: len(up) - inner])
        u.conv_in = nn.Sequential(conv_in, down[0].downsamplers[0]) if inner else conv_in
        u.conv_norm_out, u.conv_out = (self.scaffold["norm"], self.head) if inner else (norm, out)
        up[-2].upsamplers = None if inner else self.upsamplers
        for block, attentions in zip((down[0], up[-1]), self.attentions, strict=True):
            block.attentions = attentions if what == "full" else nn.ModuleList(_Skip() for _ in attentions)

    def grow(self, old: str, new: str) -> None:
        """Nothing is to be handed over: the stages share their blocks."""

    def loss(self, batch: list[scenes.Scene], what: str, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        size = 256 if what.endswith("256 px") else 128
        self.variant(what)
        x = self.latents(batch, size)
        # Layout is decided at high noise, and more pixels need more of it: times are shifted as in flow matching.
        u, shift = torch.rand(len(x), generator=noise), 2.0 * (size / 64) ** 0.5
        steps = (1000 * shift * u / (1 + (shift - 1) * u)).long().clamp(max=999).to(x.device)
        eps = torch.randn(x.shape, generator=noise).to(x.device)
        velocity = self.unet(self.scheduler.add_noise(x, eps, steps), steps, self.read(self.ids(batch, rng))).sample
        sigma = (1 - self.scheduler.alphas_cumprod.to(x.device)[steps]).sqrt()
        return self.error(velocity, self.scheduler.get_velocity(x, eps, steps), sigma, batch)

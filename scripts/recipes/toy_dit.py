"""toy-dit: a StableDiffusion3Pipeline of 128 px, 1,024 image tokens, flow matching.

With patches of one latent pixel a picture costs seventeen times one with patches of four. So it learns with patches
of 4, then 2, then 1: only the first and the last layer change, positions stay where they are, and a large patch weighs
in the attention as much as the small ones that will take its place (proportional attention, as for merged tokens).
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusion_tokred.zoo import scenes
from recipes.base import Denoiser
from recipes.text import LENGTH, clip, reader, tokenizer

WIDTH, GRID = 128, 64  # of the transformer; of its table of positions


class _Proportional(TorchFunctionMode):
    """Adds log(weight) to the attention logits of the first `tokens` keys."""

    def __init__(self, tokens: int, weight: int) -> None:
        super().__init__()
        self.tokens, self.bias = tokens, math.log(weight)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.bias and func is F.scaled_dot_product_attention and args[1].shape[-2] > self.tokens:
            mask = args[0].new_zeros(1, 1, 1, args[1].shape[-2])
            mask[..., : self.tokens] = self.bias
            kwargs = kwargs | dict(attn_mask=mask)
        return func(*args, **kwargs)


class ToyDiT(Denoiser):
    """MMDiT of 2.9 M parameters, 5 layers of width 128; T5 does the reading, two small CLIPs fill the slots."""

    lr = 1e-3
    native = 1  # latent pixels a patch
    reader = "text_encoder_3"
    stages = ((0.24, {4: 24}), (0.15, {2: 12}), (0.61, {1: 4}))
    options = Denoiser.options | dict(max_sequence_length=LENGTH)

    def __init__(self, vae: Path, text: Path) -> None:
        self.transformer = SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=5,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_projection_dim=WIDTH,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=GRID,
            qk_norm="rms_norm",
        )
        patches = {}
        for p in (4, 2):
            patches[f"in{p}"] = nn.Conv2d(4, WIDTH, p, p)
            patches[f"out{p}"] = nn.Linear(WIDTH, p * p * 4)
        ends = {p: (patches[f"in{p}"], patches[f"out{p}"]) for p in (4, 2)}
        self.ends = ends | {1: (self.transformer.pos_embed.proj, self.transformer.proj_out)}
        parts = dict(
            transformer=self.transformer, text_encoder=clip(), text_encoder_2=clip(), text_encoder_3=reader(text)
        )
        words = dict(tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=tokenizer())
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scaffold = nn.ModuleDict(patches)
        self.assemble(diffusers.StableDiffusion3Pipeline, vae, scaffold, scheduler=scheduler, **parts, **words)
        self.table = self.transformer.pos_embed.pos_embed.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2).clone()

    def variant(self, what: int) -> None:
        model, embed = self.transformer, self.transformer.pos_embed
        embed.proj, model.proj_out = self.ends[what]
        table = F.avg_pool2d(self.table, what)  # a patch lies in the middle of the small ones it stands for
        embed.pos_embed = table.flatten(2).transpose(1, 2).to(self.device)
        embed.pos_embed_max_size = GRID // what
        embed.patch_size = what
        model.register_to_config(patch_size=what)

    @torch.no_grad()
    def grow(self, old: int, new: int) -> None:
        """Small patches begin as if all that make up a large one were alike."""
        (first, last), (small, out) = self.ends[old], self.ends[new]
        k = old // new
        small.weight.copy_(first.weight.unflatten(2, (k, new)).unflatten(4, (k, new)).sum((2, 4)))
        small.bias.copy_(first.bias)
        for new_value, old_value in ((out.weight, last.weight), (out.bias, last.bias)):
            parts = old_value.reshape(k, new, k, new, 4, -1).mean((0, 2))
            new_value.copy_(parts.reshape(new_value.shape))

    @contextmanager
    def weighed(self, what: int, side: int) -> Iterator[None]:
        with _Proportional((side // what) ** 2, what * what):
            yield

    def loss(self, batch: list[scenes.Scene], what: int, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        x = self.latents(batch, 128)
        self.variant(what)
        # Large patches learn the layout, which is decided in much noise; the small ones are there for the outlines.
        toward_noise = 1.2 if what > 1 else 0.7
        sigma = torch.sigmoid(torch.randn(len(x), generator=noise) + toward_noise).to(x.device)
        eps = torch.randn(x.shape, generator=noise).to(x.device)
        ids = self.ids(batch, rng)
        # The pipeline pads T5 to 256 tokens unless told otherwise, and has no mask: the model must know both lengths.
        padding = 256 - LENGTH if rng.random() < 0.05 else 0
        clips = [self.modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        words = torch.cat([c.hidden_states[-2] for c in clips], -1)
        text = torch.cat((words, self.read(F.pad(ids, (0, padding)))), 1)
        w, pooled = sigma[:, None, None, None], torch.cat([c.text_embeds for c in clips], -1)
        with self.weighed(what, x.shape[-1]):
            flow = self.transformer((1 - w) * x + w * eps, text, pooled, 1000 * sigma).sample
        return self.error(flow, eps - x, sigma, batch)

    def sheet(self, what: int) -> torch.Tensor:
        with self.weighed(what, 32):
            return super().sheet(what)

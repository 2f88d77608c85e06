"""The autoencoder that both pipelines share."""

import copy
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from diffusion_tokred.zoo import scenes


class VAE:
    """AutoencoderKL, 0.65 M parameters: 4 latent channels at a quarter of the picture's size."""

    lr = 2e-3
    stages = ((0.5, {32: 8, 64: 4}), (0.5, {64: 4, 32: 8, 128: 1}))

    def __init__(self) -> None:
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            latent_channels=4,
            norm_num_groups=1,  # small groups would take the colour out of flat pictures
            sample_size=128,
            scaling_factor=1.0,
            shift_factor=0.0,
            mid_block_add_attention=False,
        )
        self.modules = nn.ModuleDict({"vae": self.vae})

    def grow(self, old: Any, new: Any) -> None:
        """The stages differ in the size of the pictures only."""

    def loss(self, batch: list[scenes.Scene], what: int, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        pixels = scenes.render(batch, what, self.vae.device) * 2 - 1
        posterior = self.vae.encode(pixels).latent_dist
        error = self.vae.decode(posterior.sample(noise)).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        # Three channels lean on the small picture: colours are found at once, and latents look like what they mean.
        hint = (posterior.mean[:, :3] - 2 * F.avg_pool2d(pixels, 4)).square().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-4 * kl + 0.1 * hint

    @torch.no_grad()
    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """With the latents' mean and spread folded into the 1x1 convolutions: scale 1 and shift 0 are then right."""
        vae = copy.deepcopy(self.vae).cpu()
        pixels = scenes.render([scenes.sample_scene(random.Random(f"statistics-{i}")) for i in range(512)], 64) * 2 - 1
        z = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])
        mean, std, n = z.mean((0, 2, 3)), z.std((0, 2, 3)), z.shape[1]
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
        vae.quant_conv.weight[:n] /= std[:, None, None, None]
        vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - mean) / std
        vae.quant_conv.bias[n:] -= 2 * std.log()
        vae.to(dtype).save_pretrained(folder / "vae")

    def load(self, folder: Path) -> None:
        self.vae.load_state_dict(AutoencoderKL.from_pretrained(folder / "vae").float().state_dict())

    @torch.no_grad()
    def sheet(self, what: int) -> torch.Tensor:
        """Scenes and, beside them, what comes back: `(B, 3, H, W)` in [0, 1]."""
        pixels = scenes.render(scenes.evaluation_scenes(16), what, self.vae.device)
        again = (self.vae(pixels * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
        error = (again - pixels).square().mean((1, 2, 3))
        print(f"PSNR at {what} px: {-10 * error.log10().mean():.2f} dB", flush=True)
        return torch.stack((pixels, again), 1).flatten(0, 1)

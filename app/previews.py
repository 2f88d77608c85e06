"""Pictures of unfinished latents: decoded where that is cheap, else through a linear map to RGB, fitted to the VAE."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .models import Model

CHEAP = 2e9  # parameters of the VAE times positions of the latents: below it each preview is decoded
SIDE = 256  # of the picture that the map is fitted on
PATCH = 32  # pixels of its patches of one colour


@torch.no_grad()
def preview(model: Model, latents: torch.Tensor, width: int, height: int) -> Image.Image | None:
    """The first sample of latents `(B, C, h, w)`, or FLUX's packed ones, as a picture; None for what is neither."""
    z = _unpacked(model.pipe, latents, width, height)
    vae = getattr(model.pipe, "vae", None)
    if z is None or vae is None or z.shape[1] != getattr(vae.config, "latent_channels", None):
        return None
    z = z[:1].detach()
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError):  # a VAE of another kind: no preview
        if sum(p.numel() for p in vae.parameters()) * z.shape[2] * z.shape[3] < CHEAP:
            scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
            rgb = vae.decode((z / scale + shift).to(vae.dtype), return_dict=False)[0]
        else:
            weight, bias = _map_of(model)
            rgb = torch.einsum("rc,bchw->brhw", weight, z.float().cpu()) + bias[:, None, None]
            rgb = F.interpolate(rgb, size=(min(height, 512), min(width, 512)), mode="bilinear")
        values = ((rgb[0].float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(values.permute(1, 2, 0).numpy())
    return None


def _unpacked(pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor | None:
    if latents.ndim == 4:
        return latents
    if latents.ndim == 3 and hasattr(pipe, "_unpack_latents"):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            found = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
            return found[:, :, 0] if found.ndim == 5 else found
    return None


def _map_of(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(3, C)` and bias `(3,)` from scaled latents to RGB in [-1, 1]: least squares over one-colour patches."""
    if "rgb" not in model.scratch:
        vae, count = model.pipe.vae, SIDE // PATCH
        colours = torch.rand(1, 3, count, count, generator=torch.Generator().manual_seed(0)) * 2 - 1
        picture = F.interpolate(colours, scale_factor=PATCH, mode="nearest")
        z = vae.encode(picture.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
        z = (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        x = z[0].flatten(1).T
        y = F.interpolate(picture, size=z.shape[2:], mode="area")[0].flatten(1).T
        found = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
        model.scratch["rgb"] = found[:-1].T.contiguous(), found[-1]
    return model.scratch["rgb"]

"""Floor 3: architectures. One file a family says where attention and feed-forward sit, and what each site can do."""

from . import auraflow, dit, flux, flux2, lumina2, pixart, qwenimage, sana, sd3, unet, wan, zimage
from .base import BACKBONES, Backbone, Layout, backbone_of, register_backbone

__all__ = [
    "BACKBONES", "Backbone", "Layout", "auraflow", "backbone_of", "dit", "flux", "flux2", "lumina2", "pixart",
    "qwenimage", "register_backbone", "sana", "sd3", "unet", "wan", "zimage",
]  # fmt: skip

"""The A/B app, in the wheel as `diffusion_tokred.app`: one prompt, two ways to compute it, side by side.

It needs the `app` extra: `pip install "diffusion-tokred[app]"`, then `tokred app`.
"""

from .page import build
from .serving import serve

__all__ = ["build", "serve"]

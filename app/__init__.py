"""The A/B app, in the wheel as `diffusion_tokred.app`: one prompt, without and with a method, side by side.

It needs the `app` extra: `pip install "diffusion-tokred[app]"`, then `python -m diffusion_tokred.app --help`.
"""

from .page import build

__all__ = ["build"]

"""`python -m diffusion_tokred.app`: start the A/B app."""

from __future__ import annotations

import sys

import typer


def main(model: str = "toy-dit", device: str = "", port: int = 7860, share: bool = False) -> None:
    """Start the A/B app on a model: a zoo name, a local folder or a hub id."""
    try:
        from . import build
    except ImportError as error:
        sys.exit(f'the app needs gradio ({error}): pip install "diffusion-tokred[app]"')
    build(model, device or None).launch(server_port=port, share=share)


if __name__ == "__main__":
    typer.run(main)

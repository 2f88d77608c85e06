"""The server: who may come in, by which port, and how many may wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffusion_tokred import ConfigError

from .limits import MASK_SIDE
from .look import CSS, HEAD, theme
from .models import Models
from .page import build

UPLOAD = "5mb"


def serve(
    names: Sequence[str] = ("toy-dit", "toy-sd"),
    *,
    device: str | None = None,
    dtype: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: str | None = None,
    queue_size: int = 16,
    block: bool = True,
) -> Any:
    """Start the app; the first model begins to load at once, behind the page.

    Args:
        names: models that may be chosen: embedded pipelines, folders, hub ids.
        device, dtype: as in `tokred compare`.
        port: None takes the first free one from 7860 on.
        share: a public link through gradio's servers; needs `auth`.
        auth: "user:password".
        queue_size: runs that may wait; who comes then is told to come back.
        block: False returns at once, for tests and notebooks.

    Returns:
        gradio's Blocks, running: `.local_url`, `.close()`.

    Raises:
        ConfigError: a shared link without a password, or an auth that is none.
        OSError: the port is taken.
    """
    Image.MAX_IMAGE_PIXELS = MASK_SIDE**2  # whatever gradio opens for us: twice as many are refused, before decoding
    user = _auth(auth)
    if share and user is None:
        raise ConfigError("--share makes the app public: give it a password with --auth user:password")
    if queue_size < 1:
        raise ConfigError(f"queue size must be at least 1, got {queue_size}")
    models = Models(names, device, dtype)
    page = build(models)
    page.queue(default_concurrency_limit=2, max_size=queue_size)
    models.start(models.names[0])
    page.launch(
        server_name=host, server_port=port, share=share, auth=user, theme=theme(), css=CSS, head=HEAD, show_error=True,
        max_file_size=UPLOAD, footer_links=["api", "settings"], prevent_thread_lock=not block, quiet=not block,
        state_session_capacity=32, enable_monitoring=False, ssr_mode=False,
    )  # fmt: skip
    return page


def _auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError("--auth is written user:password")
    return user, password

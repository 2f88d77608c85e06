"""Whatever goes wrong becomes a message for the person; what nobody expected also goes to the server's log."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from diffusion_tokred import ConfigError, StateError, UnsupportedError

log = logging.getLogger("diffusion_tokred.app")


def message(error: BaseException) -> gr.Error:
    """As gradio shows it: never a trace."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, (ConfigError, UnsupportedError, StateError)):
        text = str(error)
    elif type(error).__name__ == "OutOfMemoryError":
        text = "out of memory: choose a smaller size"
    else:
        log.error("unexpected", exc_info=error)
        text = f"this failed inside ({type(error).__name__}): the server's log has the details"
    return gr.Error(html.escape(text[:600], quote=False), print_exception=False)


def answered(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a handler, plain or a generator: errors leave it as messages."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise message(error) from None

        return stream

    @functools.wraps(handler)
    def once(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise message(error) from None

    return once

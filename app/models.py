"""The models that the app offers: loaded in the background, one run at a time."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import options

QUEUE = "tokred-model"  # gradio's name of the line before the models: one run at a time
LARGEST, LARGEST_EMBEDDED = 2048, 512  # pixels of a picture's side
log = logging.getLogger("diffusion_tokred.app")


@dataclass(frozen=True)
class Model:
    """A pipeline at hand. `usual`: steps, guidance and size (width, height) that suit it, `call`: more arguments for
    it; `works`: the methods that it can be patched with, `refused`: why not with the others."""

    name: str
    pipe: Any
    usual: dict[str, Any]
    call: dict[str, Any]
    works: tuple[str, ...]
    refused: dict[str, str]
    embedded: bool
    text_tokens: int | None = None  # of a prompt, if the pipeline does not know
    scratch: dict[str, Any] = field(default_factory=dict)  # what is found out once, such as the colours of latents

    @property
    def largest(self) -> int:
        return LARGEST_EMBEDDED if self.embedded else LARGEST

    @property
    def denoiser(self) -> Any:
        found = getattr(self.pipe, "transformer", None)
        return self.pipe.unet if found is None else found


class Models:
    """The names that may be chosen, each loaded when it is first wanted, and kept."""

    def __init__(self, names: Sequence[str], device: str | None = None, dtype: str | None = None) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.device, self.dtype = device, dtype
        self.lock = threading.Lock()  # one run at a time: models, cores and memory are shared
        self._guard = threading.Lock()
        self._loading = threading.Lock()  # one after the other
        self._found: dict[str, Future[Model]] = {}
        self._began: dict[str, float] = {}

    def start(self, name: str) -> Future[Model]:
        """Begin to load, unless that has begun."""
        if name not in self.names:
            raise ConfigError(f"no model {str(name)[:80]!r} here: there is {', '.join(self.names)}")
        with self._guard:
            failed = name in self._found and self._found[name].done() and self._found[name].exception() is not None
            if name not in self._found or failed:
                self._began[name] = time.monotonic()
                found: Future[Model] = Future()
                self._found[name] = found
                # A daemon: who stops the server does not wait for a model.
                threading.Thread(target=self._load, args=(name, found), name="tokred-load", daemon=True).start()
            return self._found[name]

    def _load(self, name: str, found: Future[Model]) -> None:
        with self._loading:
            try:
                found.set_result(_load(name, self.device, self.dtype))
            except BaseException as error:
                found.set_exception(error)

    def get(self, name: str) -> Model:
        """The model; waits until it is loaded.

        Raises:
            ConfigError, UnsupportedError: it cannot be loaded.
        """
        return self.start(name).result()

    def ready(self, name: str) -> Model | None:
        """The model if it is at hand."""
        found = self._found.get(name)
        return found.result() if found is not None and found.done() and found.exception() is None else None

    def state(self, name: str) -> tuple[str, str]:
        """("waiting" | "loading" | "ready" | "failed", in words)."""
        found = self._found.get(name)
        if found is None:
            return "waiting", f"{name} is not loaded yet"
        if not found.done():
            return "loading", f"loading {name}: {time.monotonic() - self._began[name]:.0f} s"
        if (error := found.exception()) is not None:
            known = isinstance(error, (ConfigError, UnsupportedError))
            return "failed", str(error) if known else f"{name} cannot be loaded: {type(error).__name__}"
        model = found.result()
        kind = "embedded, a toy world of coloured shapes" if model.embedded else type(model.pipe).__name__
        return "ready", f"{name} is ready ({kind}, on {model.pipe._execution_device})"


def usual_of(name: str) -> dict[str, Any]:
    """What suits a model as far as its name tells: steps, guidance, size (width, height)."""
    from diffusion_tokred.evaluation.models import defaults

    return {"steps": 20, "guidance": 3.0, "size": (512, 512)} | defaults(name)


def _load(name: str, device: str | None, dtype: str | None) -> Model:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from diffusion_tokred.evaluation.models import defaults, load_model

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        options.load_plugins()
        pipe = load_model(name, dtype, device)
    except Exception as error:
        if not isinstance(error, (ConfigError, UnsupportedError)):
            log.exception("loading %s", name)
        raise
    pipe.set_progress_bar_config(disable=True)
    own = defaults(name)
    usual: dict[str, Any] = {**_own(pipe), **{key: own[key] for key in ("steps", "guidance", "size") if key in own}}
    works: list[str] = []
    refused: dict[str, str] = {}
    for info in tokred.methods():
        try:
            tokred.explain(pipe, method=info.name, width=usual["size"][0], height=usual["size"][1])
            works.append(info.name)
        except (ConfigError, UnsupportedError, StateError) as error:
            refused[info.name] = str(error)
    return Model(
        name, pipe, usual, own.get("call", {}), tuple(works), refused, name in tokred.zoo.NAMES, own.get("text_tokens")
    )


def _own(pipe: Any) -> dict[str, Any]:
    """Steps, guidance and size that a pipeline has itself."""
    known = inspect.signature(type(pipe).__call__).parameters

    def default(name: str, other: Any) -> Any:
        value = known[name].default if name in known else None
        return value if isinstance(value, (int, float)) else other

    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        config = getattr(getattr(pipe, "transformer", None) or getattr(pipe, "unet", None), "config", {})
        side = config.get("sample_size") or 64
    sides = [side[0], side[-1]] if isinstance(side, (tuple, list)) else [side, side]
    scale = getattr(pipe, "vae_scale_factor", 8)
    return {
        "steps": int(default("num_inference_steps", 20)),
        "guidance": float(default("guidance_scale", 5.0)),
        "size": (int(default("width", sides[1] * scale)), int(default("height", sides[0] * scale))),
    }

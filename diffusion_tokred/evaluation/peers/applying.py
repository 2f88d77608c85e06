"""A peer put on a pipeline, and taken off with all that it did."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, StateError, UnsupportedError
from ...patching import denoisers
from ...runtime.tracker import Tracker
from .base import PeerConfig


@contextlib.contextmanager
def applied(pipe: Any, peer: PeerConfig, seed: int = 0) -> Iterator[Any]:
    """The pipeline with another library's cache on; after that, all is as it was, bit for bit.

    Args:
        pipe: with one denoiser, without a patch of ours.
        peer: which, and its options.
        seed: of its random draws.

    Raises:
        ConfigError: its package is not installed.
        UnsupportedError: it does not run on this pipeline, in its own words: here, or in a call of the pipeline.
        StateError: the pipeline is patched.
    """
    if importlib.util.find_spec(peer.module) is None:
        raise ConfigError(f"{peer.name} needs {peer.package}, which is not here: pip install {peer.package}")
    model, *more = denoisers(pipe)
    if more:
        raise UnsupportedError(f"{peer.name} is measured on one denoiser only, {type(pipe).__name__} has two")
    if "_tokred" in vars(model):
        raise StateError(f"{peer.name} cannot be put on what is patched: unpatch the pipeline first")
    kept = _Kept(pipe, model)
    try:
        with _refusing(peer):
            around = peer.attach(pipe, model, seed)
        kept.note()
        if not kept.hooked:
            raise UnsupportedError(f"{peer.name} does not run: it finds nothing to act on in {type(model).__name__}")
        inner, tracker = model.forward, Tracker(model)

        @functools.partial(torch.compiler.disable, recursive=False)  # what it calls is compiled
        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _refusing(peer), around(tracker.step(args, kwargs)):
                return inner(*args, **kwargs)

        model.forward = forward
        yield pipe
    finally:
        kept.restore()


@contextlib.contextmanager
def _refusing(peer: PeerConfig) -> Iterator[None]:
    """What a peer raises is an UnsupportedError with its words."""
    try:
        yield
    except (ConfigError, UnsupportedError, StateError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"{peer.name} does not run: {type(error).__name__}: {text}") from error


class _Kept:
    """What a peer may change: attributes, hooks and classes of modules, diffusers' hook registries, and the class of
    the pipeline. (Their own undoing leaves attributes behind, and `HookRegistry.remove_hook` corrupts a chain.)"""

    def __init__(self, pipe: Any, model: nn.Module) -> None:
        self.model, self.pipe, self.pipe_had = model, pipe, set(vars(pipe))
        registries = [found for m in model.modules() if (found := vars(m).get("_diffusers_hook")) is not None]
        self.objects = [(owner, type(owner), dict(vars(owner))) for owner in (*model.modules(), *registries)]
        self.containers = [
            (value, copy.copy(value))
            for _, _, values in self.objects
            for name, value in values.items()
            if type(value) in (dict, OrderedDict, list) and name not in ("_parameters", "_buffers")
        ]
        self.kind, self.of_kind = type(pipe), dict(vars(type(pipe)))
        self.added: set[str] = set()

    def note(self) -> None:
        """See what the pipeline has now that it did not have: that goes away again, and nothing that a run adds."""
        self.added = set(vars(self.pipe)) - self.pipe_had

    @property
    def hooked(self) -> bool:
        """Whether any module runs other code than before."""
        return any(
            type(owner) is not kind or vars(owner).get("forward") is not values.get("forward")
            for owner, kind, values in self.objects
        )

    def restore(self) -> None:
        for owner, kind, values in self.objects:
            if type(owner) is not kind:
                owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(values)
        for container, content in self.containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for name in self.added:
            vars(self.pipe).pop(name, None)
        for name, value in dict(vars(self.kind)).items():
            if name not in self.of_kind:
                delattr(self.kind, name)
            elif value is not self.of_kind[name]:
                setattr(self.kind, name, self.of_kind[name])

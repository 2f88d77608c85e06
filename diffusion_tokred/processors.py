"""Drop-in attention processors: methods as diffusers' users install them, with `set_attn_processor`.

A processor of ours is an instance of a class made for the processor it goes around: a subclass of both, sharing the
other's `__dict__`. So whatever diffusers asks of a processor has the answer it had before: `isinstance`, the signature
(by which keyword arguments are let through), attention backend, registered weights and their names, `type(p)()`.

What it does at a step is decided by `tokred.steps`; during that, each attention module has a `Place`.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from .errors import ConfigError, StateError, UnsupportedError
from .methods import CATConfig, MethodConfig, ToCaConfig, ToDoConfig, ToMeConfig
from .patching import denoisers
from .runtime.rows import Out
from .runtime.site import Call, Site

PLACE = "_tokred_place"  # the attribute of an attention module that holds its place
_FRESH = "_tokred_inner"
_BARE = {"_attention_backend": None, "_parallel_config": None}  # what diffusers sets on processors that have it
# (our class, config, class gone around) -> the class of both, as long as it is used.
_KINDS: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()
# Processor of ours -> attention module -> its place. A place refers to neither, outside of a block.
_PLACES: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[nn.Module, Place]] = weakref.WeakKeyDictionary()


class AttnReducer:
    """Base of the processors. A subclass names its config class, and how a config is restricted to attention.

    Args:
        config: of the method; its defaults when None.
        inner: the processor that does the attention. When None: each module's own default.

    Raises:
        ConfigError: a config of another method, or an option that a processor cannot do.
        UnsupportedError: `inner` cannot be gone around.

    Attributes:
        tokred_config: the config, restricted to attention.
    """

    config_type: ClassVar[type[MethodConfig]]
    fixed: ClassVar[dict[str, Any]] = {}  # options that it always has, whatever the config says
    refused: ClassVar[dict[str, str]] = {}  # options that must be off -> why
    tokred_config: ClassVar[Any] = None
    _tokred_kind: ClassVar[type | None] = None
    _tokred_names: ClassVar[tuple[str, ...]] = ()  # positional arguments of the inner call, after the module

    def __new__(cls, config: MethodConfig | None = None, inner: Any = None, *args: Any, **kwargs: Any) -> Any:
        if cls.tokred_config is not None:  # diffusers, which makes another of the kind by `type(p)()`
            return object.__new__(cls)
        if isinstance(inner, AttnReducer):
            inner = inner.tokred_inner
        if isinstance(inner, type) or not (inner is None or callable(inner)):
            raise ConfigError(f"inner must be a processor, such as AttnProcessor2_0(), got {inner!r}")
        kind = _around(cls, cls.restrict(config), None if inner is None else type(inner))
        result: Any = object.__new__(kind)
        result.__dict__[_FRESH] = inner  # for `__init__`, which Python calls now
        return result

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _FRESH not in self.__dict__:
            super().__init__(*args, **kwargs)
        elif (inner := self.__dict__.pop(_FRESH)) is not None:
            object.__setattr__(self, "__dict__", inner.__dict__)

    @classmethod
    def around(cls, target: Any, config: MethodConfig | None = None) -> dict[str, Any]:
        """Processors around all that are installed in a denoiser (or a pipeline with one), by their names: ready for
        `set_attn_processor`, or for `get_submodule(name.removesuffix(".processor")).processor = ...`."""
        found = denoisers(target)
        if len(found) > 1:
            raise ConfigError(f"{type(target).__name__} has {len(found)} denoisers: pass one of them")
        return {name: cls(config, processor) for name, processor in installed(found[0]).items()}

    @classmethod
    def restrict(cls, config: MethodConfig | None) -> MethodConfig:
        """The config as a processor can do it.

        Raises:
            ConfigError: it cannot.
        """
        config = cls.config_type() if config is None else config
        if not isinstance(config, cls.config_type):
            raise ConfigError(f"{cls.__name__} takes a {cls.config_type.__name__}, got {config!r}")
        for name, reason in cls.refused.items():
            if getattr(config, name):
                raise ConfigError(f"{cls.__name__} cannot do {name}: {reason}; tokred.patch can")
        return replace(config, **cls.fixed)

    __eq__, __hash__ = object.__eq__, object.__hash__  # a dataclass's would not do as a key

    @property
    def tokred_inner(self) -> Any:
        """The processor that this one goes around, live: they share their attributes. None if there is none yet."""
        if self._tokred_kind is None:
            return None
        inner: Any = object.__new__(self._tokred_kind)
        object.__setattr__(inner, "__dict__", self.__dict__)
        return inner

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call(self, attn, args, kwargs)


class ToMeAttnProcessor(AttnReducer):
    """ToMe-SD around self-attention, and around cross-attention with `merge_cross_attn`. In FLUX's single blocks it
    acts in the attention, as `merge_parallel=False` does. Runs inside of `with tokred.steps(pipe)`."""

    config_type = ToMeConfig
    fixed = {"merge_parallel": False}
    refused = {"merge_ff": "an attention processor does not reach the feed-forward"}


class ToDoAttnProcessor(AttnReducer):
    """ToDo in self-attention. Runs inside of `with tokred.steps(pipe)`."""

    config_type = ToDoConfig


class TokenCacheAttnProcessor(AttnReducer):
    """ToCa in attention, as published: between full steps self-attention is reused whole, and cross-attention runs on
    chosen tokens. Runs inside of `with tokred.steps(pipe)`."""

    config_type = ToCaConfig
    fixed = {"mode": "faithful"}


class ClusterPruneAttnProcessor(AttnReducer):
    """CAT Pruning in attention, as published: between full steps it runs on chosen tokens, against kept keys and values
    of all. Runs inside of `with tokred.steps(pipe)`."""

    config_type = CATConfig
    fixed = {"mode": "faithful"}


class Place:
    """An attention module inside of `steps`: what the processor of ours does there.

    Between the blocks it is kept, without what refers to the model, for a compiled model to find the same again.

    Attributes:
        made: the processor of ours, if `steps` has put it around the default; None if it was installed.
        processor: the one it goes around, or its tapped copy, while a `Tap` is needed.
        owner: the processor of ours, inside of the block.
        site: None where the method does nothing.
    """

    def __init__(self, owner: Any, made: bool) -> None:
        self.made = owner if made else None
        self.processor, self.names = owner.tokred_inner, owner._tokred_names
        self.tapping: Any = None
        self.owner: Any = None
        self.site: Site | None = None
        self.apply: Callable[[Call], Out] | None = None

    def enter(self, owner: Any) -> None:
        """A block begins."""
        self.owner = self.made or owner

    def use(self, site: Site, apply: Callable[[Call], Out]) -> None:
        """A method acts here, in this block."""
        self.site, self.apply = site, apply
        site.holder = self
        if self.tapping is not None:
            site.tapping = self.tapping

    def leave(self) -> None:
        """The block ends."""
        if self.site is not None:
            self.tapping = self.site.tapping
        self.owner = self.site = self.apply = None

    def run(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = self.site
        if site is None or self.apply is None or site.plan.idle or not site.level.running:
            return self.processor(attn, *args, **kwargs)
        named = dict(zip(self.names[1:], args[1:], strict=False))  # sites look for arguments by name
        call = Call(site, partial(self.processor, attn), args[:1], {**named, **kwargs})
        return site.write(call, self.apply(call))


def installed(denoiser: Any) -> dict[str, Any]:
    """Path + ".processor" -> the processor of each attention module, ours or not."""
    if hasattr(denoiser, "set_attn_processor"):
        return dict(denoiser.attn_processors)
    owners = ((name, module) for name, module in denoiser.named_modules() if hasattr(module, "processor"))
    return {f"{name}.processor": module.processor for name, module in owners}


def ours(denoiser: nn.Module) -> dict[str, Any]:
    """Path -> attention module whose processor is one of ours."""
    return {n: m for n, m in denoiser.named_modules() if isinstance(getattr(m, "processor", None), AttnReducer)}


def places(denoiser: Any, modules: dict[str, Any]) -> dict[str, Place]:
    """Path -> place of each module that has a processor of ours. One around nothing yet is put around the default,
    which is what a new model of this class has there. The model is not changed.

    Raises:
        UnsupportedError: the default cannot be known.
    """
    result: dict[str, Place] = {}
    fresh = None
    for name, module in modules.items():
        mine = module.processor
        kept = _PLACES.setdefault(mine, weakref.WeakKeyDictionary())
        if module not in kept:
            owner = mine
            if mine._tokred_kind is None:
                default = getattr(module, "_default_processor_cls", None)
                if default is None:
                    fresh = _fresh(denoiser) if fresh is None else fresh
                    default = fresh.get(f"{name}.processor")
                if default is None:
                    family = mine._tokred_family.__name__
                    raise UnsupportedError(
                        f"which processor {name} has by default cannot be known: use {family}.around(model, config), "
                        "which goes around those that are installed"
                    )
                owner = mine._tokred_family(mine.tokred_config, default())
            kept[module] = Place(owner, made=owner is not mine)
        place = kept[module]
        if place.made is not None:
            for key in _BARE.keys() & mine.__dict__.keys():  # set by diffusers, now or since
                if hasattr(place.made, key):
                    setattr(place.made, key, mine.__dict__[key])
        result[name] = place
    return result


def _fresh(denoiser: Any) -> dict[str, type]:
    """The processor classes of a new model with this config, built without memory. Empty if it cannot be."""
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return {n: type(p) for n, p in installed(type(denoiser).from_config(dict(denoiser.config))).items()}
    return {}


def _call(self: Any, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    place = getattr(attn, PLACE, None)
    if place is None or place.owner is not self:
        raise StateError(
            f"{type(self)._tokred_family.__name__} must be told the step. Install it first, then call the pipeline "
            "inside of `with tokred.steps(pipe): ...`; to go on without it, set back the processors that were there"
        )
    return place.run(attn, args, kwargs)


def _around(cls: Any, config: MethodConfig, kind: type | None) -> type:
    """The class of a processor of ours around one of class `kind`, or around none yet."""
    key = (cls, config, kind)
    if (made := _KINDS.get(key)) is not None:
        return made
    space: dict[str, Any] = {"tokred_config": config, "_tokred_family": cls, "_tokred_kind": kind}
    space |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if kind is None:
        made = type(cls.__name__, (cls,), {**space, **_BARE})
    else:

        def __call__(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _call(self, attn, args, kwargs)

        inner: Any = kind.__call__
        signature = inspect.signature(inner)
        vars(__call__)["__wrapped__"] = inner  # so `inspect.signature` shows it, under Dynamo too
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = tuple(p.name for p in signature.parameters.values() if p.kind not in variable)
        space |= {"__call__": __call__, "_tokred_names": names[2:]}
        try:
            made = type(f"{cls.__name__}[{kind.__name__}]", (cls, kind), space)
            if not hasattr(object.__new__(made), "__dict__") or not kind.__dictoffset__:
                raise TypeError("it has no attributes")
        except TypeError as error:
            raise UnsupportedError(f"{cls.__name__} cannot go around a {kind.__name__}: {error}") from None
        _register(kind, made)
    _KINDS[key] = made
    return made


def _register(kind: type, made: type) -> None:
    """diffusers' guiders that skip layers look processors up by their exact class."""
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        from diffusers.hooks._helpers import AttentionProcessorRegistry

        AttentionProcessorRegistry.register(made, AttentionProcessorRegistry.get(kind))

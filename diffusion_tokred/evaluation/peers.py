"""Other libraries' caches as settings of a pipeline, so that an evaluation measures them beside ours.

Each is put on as its own documentation says, with its own defaults. What a user would have to do beside that is done
here: a cache context around each denoiser call, its state cleared before each picture, its random numbers seeded. And
whatever it did to the pipeline is undone: none of them undoes all of it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..errors import ConfigError, StateError, UnsupportedError
from ..methods.base import MethodConfig, option
from ..patching import denoisers
from ..runtime.tracker import StepInfo, Tracker
from .options import limits

# What is entered around each call of the denoiser.
Around = Callable[[StepInfo], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class PeerConfig(MethodConfig):
    """Options of another library's cache: checked and recorded as those of our methods.

    Attributes:
        package, module: its names for pip and for `import`.
    """

    package: ClassVar[str] = ""
    module: ClassVar[str] = ""

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        """Put it on, as its documentation says. `seed`: of its random draws.

        Returns:
            What its state needs around each call of the denoiser.
        """
        raise NotImplementedError


PEERS: dict[str, type[PeerConfig]] = {}
_P = TypeVar("_P", bound=type[PeerConfig])


def _register(name: str, package: str, module: str) -> Callable[[_P], _P]:
    def register(kind: _P) -> _P:
        kind.name, kind.package, kind.module = name, package, module
        PEERS[name] = kind
        return kind

    return register


@_register("diffusers-firstblock", "diffusers", "diffusers")
@dataclass(frozen=True)
class DiffusersFirstBlock(PeerConfig):
    """diffusers' First Block Cache."""

    threshold: float = option(
        0.05, "relative change of the first block's residual up to which the other blocks are left out; 0 is dense",
        low=0.0, high=100.0,
    )  # fmt: skip

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        return _with_contexts(model, apply_first_block_cache, FirstBlockCacheConfig(threshold=self.threshold))


@_register("diffusers-taylorseer", "diffusers", "diffusers")
@dataclass(frozen=True)
class DiffusersTaylorSeer(PeerConfig):
    """diffusers' TaylorSeer."""

    interval: int = option(5, "a full step every so many steps after the warm-up; 1 is dense", low=1, high=1000)
    warmup: int = option(3, "first steps of a run, which are full (disable_cache_before_step)", low=1, high=1000)
    order: int = option(1, "order of the forecast (max_order)", low=0, high=4)
    what: str = option(
        "attention", "what is forecast: its default patterns; attention and feed-forward, by cache_identifiers; or its "
        "lite mode", choices=("attention", "modules", "lite"),
    )  # fmt: skip
    dtype: str = option("bfloat16", "what factors are kept in", choices=("bfloat16", "float16", "float32"))

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=getattr(torch, self.dtype),
            cache_identifiers=[r".*blocks\.\d+\.(attn\d?|ff|ff_context)"] if self.what == "modules" else None,
            use_lite_mode=self.what == "lite",
        )
        return _with_contexts(model, apply_taylorseer_cache, config)


@_register("diffusers-magcache", "diffusers", "diffusers")
@dataclass(frozen=True)
class DiffusersMagCache(PeerConfig):
    """diffusers' MagCache."""

    threshold: float = option(0.06, "accumulated error below which a step is left out", low=0.0, high=100.0)
    max_skip_steps: int = option(3, "steps that are left out one after another, at most", low=1, high=1000)
    retention: float = option(0.2, "share of the steps, the first ones, that are full (retention_ratio)", low=0.0,
                              high=1.0)  # fmt: skip
    steps: int = option(28, "of the run (num_inference_steps)", low=1, high=1000)
    ratios: str = option("flux", "magnitude ratios, which belong to a checkpoint: FLUX's, or all 1",
                         choices=("flux", "ones"))  # fmt: skip

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip_steps,
            retention_ratio=self.retention,
            num_inference_steps=self.steps,
            mag_ratios=FLUX_MAG_RATIOS if self.ratios == "flux" else [1.0] * self.steps,
        )
        return _with_contexts(model, apply_mag_cache, config)


@_register("cache-dit", "cache-dit", "cache_dit")
@dataclass(frozen=True)
class CacheDiT(PeerConfig):
    """cache-dit's DBCache, alone or with its TaylorSeer calibrator."""

    threshold: float = option(
        0.08, "relative change of the first blocks' residual below which the middle ones are left out; 0 is dense",
        low=0.0, high=100.0,
    )  # fmt: skip
    fn: int = option(8, "first blocks that run at every step (Fn_compute_blocks)", low=1, high=1000)
    bn: int = option(0, "last blocks that run at every step (Bn_compute_blocks)", low=0, high=1000)
    warmup: int = option(8, "first steps of a run, which are full (max_warmup_steps)", low=0, high=1000)
    max_continuous: int = option(-1, "cached steps one after another, at most; -1: any number", low=-1, high=1000)
    taylor: int = option(0, "order of its TaylorSeer calibrator; 0: without", low=0, high=4)
    taylor_text: bool = option(True, "calibrate the text tokens too (enable_encoder_calibrator)")

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise UnsupportedError(
                "cache-dit takes the processes of a run for parts of one model, and waits for all of them at each "
                "step: use it in one process"
            )
        import cache_dit

        config = cache_dit.DBCacheConfig(
            residual_diff_threshold=self.threshold,
            Fn_compute_blocks=self.fn,
            Bn_compute_blocks=self.bn,
            max_warmup_steps=self.warmup,
            max_continuous_cached_steps=self.max_continuous,
        )
        calibrator = None
        if self.taylor:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(
                taylorseer_order=self.taylor, enable_encoder_calibrator=self.taylor_text
            )
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it says a dozen lines, each time
        try:
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        finally:
            logging.disable(before)
        return contextlib.nullcontext  # it begins anew with each call of the pipeline


@_register("peer-deepcache", "DeepCache", "DeepCache")
@dataclass(frozen=True)
class PeerDeepCache(PeerConfig):
    """DeepCache, by its authors' package."""

    interval: int = option(3, "a full step every so many steps; 1 is dense", low=1, high=1000)
    branch: int = option(0, "which skip connection is the last to run (cache_branch_id)", low=0, high=100)

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=self.interval, cache_branch_id=self.branch)
        helper.enable()

        def around(step: StepInfo) -> contextlib.AbstractContextManager[Any]:
            if step.new_run:
                helper.start_timestep = None
                helper.cached_output.clear()
            return contextlib.nullcontext()

        return around


@_register("tomesd", "tomesd", "tomesd")
@dataclass(frozen=True)
class ToMeSD(PeerConfig):
    """ToMe, by its authors' package."""

    ratio: float = option(0.5, "share of tokens merged away; it caps at 0.75", low=0.0, high=0.75)
    max_downsample: int = option(1, "merge at levels downsampled at most so often", choices=(1, 2, 4, 8))
    use_rand: bool = option(True, "draw the destinations anew at each call")
    merge_crossattn: bool = option(False, "merge around cross-attention")
    merge_mlp: bool = option(False, "merge around the feed-forward")

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        import tomesd

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        tomesd.apply_patch(pipe, **options)
        info: Any = model._tome_info

        def around(step: StepInfo) -> contextlib.AbstractContextManager[Any]:
            if step.new_run:  # its own generator comes from torch's global one, and goes on from picture to picture
                device = next(model.parameters()).device
                info["args"]["generator"] = torch.Generator(device).manual_seed(seed)
            return contextlib.nullcontext()

        return around


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


def make_peer(name: str, options: Mapping[str, Any]) -> PeerConfig:
    """A peer's options by name. Raises ConfigError for an unknown one, with the nearest, or for a wrong value."""
    if name not in PEERS:
        raise ConfigError(f"no cache of another library is called {name!r}: there is {', '.join(sorted(PEERS))}")
    known = [field.name for field in fields(PEERS[name])]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"no option {key}{hint}; {name} has {', '.join(known)}")
    return PEERS[name](**options)


def parse_peer(name: str, words: Sequence[str]) -> PeerConfig:
    """A peer with options as they are typed: `threshold=0.1`, `use_rand`, `no_use_rand`. Raises as `make_peer`."""
    known = {field.name: field for field in fields(PEERS[name])}
    options: dict[str, Any] = {}
    for word in words:
        key, given, text = (part.strip() for part in word.partition("="))
        switch = key.removeprefix("no_")
        if not given and switch in known and isinstance(known[switch].default, bool):
            options[switch] = switch == key
        elif key not in known:
            options[key] = text  # an error that says what there is
        elif not given:
            raise ConfigError(f"{key} needs a value: {limits(known[key])}")
        else:
            options[key] = _value(known[key], text)
    return make_peer(name, options)


def peer_from_dict(data: Mapping[str, Any]) -> PeerConfig:
    """The inverse of a peer's `to_dict`. Raises ConfigError for what this library does not know."""
    values = {key: value for key, value in data.items() if not key.startswith("_")}
    peer = make_peer(str(data.get("_type")), values)
    if (version := data.get("_version")) != peer.to_dict()["_version"]:
        raise ConfigError(f"options of {peer.name} in version {version!r} cannot be read")
    return peer


def _value(field: Field[Any], text: str) -> Any:
    kind: Any = type(field.default)
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{field.name} takes {limits(field)}, got {text!r}") from None


def _with_contexts(model: nn.Module, apply: Callable[[nn.Module, Any], None], config: Any) -> Around:
    """One of diffusers' caches: `enable_cache` is for models that have it, `apply_...` for the others. Its states are
    told apart by a context's name, which not all pipelines give: here each pass of a step has its own."""
    from diffusers import CacheMixin
    from diffusers.hooks import HookRegistry

    if isinstance(model, CacheMixin):
        model.enable_cache(config)
    else:
        apply(model, config)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()  # an earlier context's, which knows none of the new hooks

    @contextlib.contextmanager
    def around(step: StepInfo) -> Iterator[None]:
        if step.new_run:
            registry.reset_stateful_hooks()
        with CacheMixin.cache_context(model, step.pass_key):
            yield

    return around


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

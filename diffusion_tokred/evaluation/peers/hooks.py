"""diffusers' own caches, which are hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...methods.base import option
from ...runtime.tracker import StepInfo
from .base import Around, PeerConfig, register


@register("diffusers-firstblock", "diffusers", "diffusers")
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


@register("diffusers-taylorseer", "diffusers", "diffusers")
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


@register("diffusers-magcache", "diffusers", "diffusers")
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

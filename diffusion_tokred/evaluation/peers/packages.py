"""cache-dit, DeepCache and tomesd, by their authors' packages."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ...methods.base import option
from ...runtime.tracker import StepInfo
from .base import Around, PeerConfig, register


@register("cache-dit", "cache-dit", "cache_dit")
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


@register("peer-deepcache", "DeepCache", "DeepCache")
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


@register("tomesd", "tomesd", "tomesd")
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

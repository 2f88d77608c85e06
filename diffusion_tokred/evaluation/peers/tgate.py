"""T-GATE, by its authors' package: attention that is kept and reused, and no guidance after a gate."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from ...methods.base import option
from ...runtime.tracker import StepInfo
from .base import Around, PeerConfig, register

MODELS = ("UNet2DConditionModel", "PixArtTransformer2DModel")  # of the pipelines that the package has loaders for
OFF = {"cache": False, "reuse": False}


@register("peer-tgate", "tgate", "tgate")
@dataclass(frozen=True)
class PeerTGate(PeerConfig):
    """T-GATE (arXiv 2404.02747), by its authors' package.

    The package gives a pipeline a second `__call__`, which sets each step's attention from its schedule, and runs the
    steps after the gate without guidance, on half of the batch. Here the schedule and the attention are the package's,
    and the half batch is made around the denoiser: its prediction is given for both halves, so that the pipeline's
    guidance changes nothing.
    """

    gate: int = option(10, "from here on cross-attention is reused, without guidance (gate_step)", low=1, high=1000)
    interval: int = option(
        5, "self-attention is computed every so many steps before it (sp_interval)", low=1, high=1000
    )
    later: int = option(1, "and every so many after it (fi_interval)", low=1, high=1000)
    warmup: int = option(2, "first steps, of which nothing is reused (warm_up)", low=0, high=1000)

    def kinds(self, steps: int) -> list[str]:
        """What each step of a run does, as the package's `tgate_scheduler` has it: "full" computes all attention, the
        others reuse what self-attention gave, or cross-attention ("reuse self", "reuse cross"), or both ("reuse")."""
        found = []
        for i in range(steps):
            if i == self.gate - 1 or (i < self.gate and (i <= self.warmup or i % self.interval == 0)):
                found.append("full")
            else:
                found.append("reuse self" if i < self.gate else "reuse" if i % self.later else "reuse cross")
        return found

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        if type(model).__name__ not in MODELS:
            raise UnsupportedError(
                f"peer-tgate does not run: its package is written for Stable Diffusion, SDXL and PixArt, not for "
                f"{type(model).__name__}"
            )
        from tgate.tgate_utils import register_forward, tgate_scheduler

        def put(cross: dict[str, bool], self_attention: dict[str, bool], whole: bool) -> None:
            register_forward(model, "Attention", ca_kward=cross, sa_kward=self_attention, keep_shape=whole)

        put(OFF, OFF, True)
        inner, halve = model.forward, False

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _on_half(inner, args, kwargs) if halve else inner(*args, **kwargs)

        model.forward = forward

        def around(step: StepInfo) -> contextlib.AbstractContextManager[Any]:
            nonlocal halve
            if step.new_run:
                for module in model.modules():
                    vars(module).pop("cache", None)
            guided = step.halves == 2
            halve = guided and step.index >= self.gate
            cross, self_attention, whole = tgate_scheduler(
                cur_step=step.index, gate_step=self.gate, sp_interval=self.interval, fi_interval=self.later,
                warm_up=self.warmup,
            )  # fmt: skip
            put(cross, self_attention, whole or not guided)
            return contextlib.nullcontext()

        return around


def _on_half(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call on the first half of the batch: tensors of (B, ...), also in dicts, go in as (B / 2, ...), and what comes
    out is given for both halves, (B, ...)."""
    rows = next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim > 2)

    def half(x: Any) -> Any:
        return x[: rows // 2] if isinstance(x, torch.Tensor) and x.ndim and len(x) == rows else x

    def both(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, torch.Tensor) else x

    args, kwargs = pytree.tree_map(half, (args, kwargs))
    found = inner(*args, **kwargs)
    if isinstance(found, tuple):
        return tuple(both(x) for x in found)
    return type(found)(**{name: both(x) for name, x in found.items()})

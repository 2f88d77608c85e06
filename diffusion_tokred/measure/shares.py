"""Where an unpatched model's time goes, site by site, and how much faster a plan could make it at best.

`S* = 1 / (1 - sum of share * (1 - FLOPs kept))`, where a site has two shares of the time of a call: its attention core
(the kernel of queries against keys), and its rows (projections and whatever else runs on each token). Matching, merging
and copies are taken as free. What a method realises of it is `(S - 1) / (S* - 1)`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, UnsupportedError
from ..runtime.site import Site
from ..runtime.work import Weights, Work
from .timing import synchronize

MIN_IDEAL = 1.2  # below it a realised fraction says nothing


@dataclass(frozen=True)
class Share:
    """Shares of a call's time that a site takes: `core` is the attention kernel, `rows` all else inside the site."""

    core: float
    rows: float


@dataclass(frozen=True)
class Shares:
    """The shares of all sites, by name; medians over the profiled calls. `seconds`: median of a profiled call."""

    sites: dict[str, Share]
    seconds: float

    def ideal(
        self, sites: Iterable[Site], works: Mapping[str, Work], grids: Mapping[int, tuple[int, int]], text: int
    ) -> float:
        """S*: how many times faster a call would be if each share shrank as its FLOPs do.

        Args:
            sites: those that the plan may touch.
            works: what they compute, by name (`Method.works`); a missing one is dense.
            grids: token grid (h, w) of each level.
            text: text tokens.
        """
        saved = 0.0
        for site in sites:
            if (work := works.get(site.name)) is not None:
                h, w = grids[site.level.index]
                core, rows = kept(site.weights(), work, h * w, text)
                share = self.sites[site.name]
                saved += share.core * (1 - core) + share.rows * (1 - rows)
        return 1 / (1 - saved)


def kept(weights: Weights, work: Work, tokens: int, text: int) -> tuple[float, float]:
    """Shares of a site's dense FLOPs that remain: of its attention core, and of its rows."""

    def parts(w: Work) -> tuple[int, int]:
        total = weights.flops(w, 1, text)
        rows = Weights(weights.query, weights.key, weights.text, 0, weights.text_is).flops(w, 1, text)
        return total - rows, rows

    core, rows = parts(work)
    dense_core, dense_rows = parts(Work(tokens))
    return core / dense_core if dense_core else 1.0, rows / dense_rows if dense_rows else 1.0


def realised(speedup: float, ideal: float) -> float | None:
    """phi = (S - 1) / (S* - 1); None where S* < 1.2, which leaves too little to tell from noise."""
    return None if ideal < MIN_IDEAL else (speedup - 1) / (ideal - 1)


def profile(
    sites: Iterable[Site],
    call: Callable[[], Any],
    rounds: int = 3,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> Shares:
    """Measure the shares in the unpatched model. `call` runs the denoiser once.

    Raises:
        ConfigError: no rounds.
        UnsupportedError: the attention kernel of a site was not seen: its processor does not call PyTorch's.
    """
    if rounds < 1:
        raise ConfigError(f"profiling needs at least one round, got {rounds}")
    sites, clock = list(sites), _Clock(torch.device(device))
    for _ in range(warmup):
        call()
    found: list[dict[str, Share]] = []
    totals = []
    for _ in range(rounds):
        spans: dict[str, list[tuple[Any, Any]]] = {}
        with _watching(sites, clock, spans):
            start = clock.mark()
            call()
            end = clock.mark()
        total = clock.seconds([(start, end)])
        totals.append(total)
        found.append({site.name: _share(site, spans, clock, total) for site in sites})
    shares = {
        site.name: Share(
            core=float(np.median([f[site.name].core for f in found])),
            rows=float(np.median([f[site.name].rows for f in found])),
        )
        for site in sites
    }
    return Shares(shares, float(np.median(totals)))


def _share(site: Site, spans: dict[str, list[tuple[Any, Any]]], clock: _Clock, total: float) -> Share:
    core = clock.seconds(spans.get(f"{site.name} core", []))
    whole = clock.seconds(spans.get(site.name, []))
    whole -= sum(clock.seconds(spans.get(inner.name, [])) for inner in site.inner)  # those have shares of their own
    if site.weights().core and not core and whole:
        processor = type(getattr(site.module, "processor", None)).__name__
        raise UnsupportedError(
            f"the attention of {site.name} does not call PyTorch's attention function ({processor}): its time cannot "
            "be told from that of the projections; use the default processor"
        )
    return Share(core / total, (whole - core) / total)


class _Clock:
    """Times between marks. On CUDA the marks are events, which do not hold the device up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def seconds(self, spans: list[tuple[Any, Any]]) -> float:
        """The sum of spans (start, end)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)


class _Attention(TorchFunctionMode):
    """Marks before and after each call of PyTorch's attention function, while a site is running."""

    def __init__(self, clock: _Clock, spans: dict[str, list[tuple[Any, Any]]]) -> None:
        super().__init__()
        self.clock, self.spans = clock, spans
        self.site: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self.site is None:
            return func(*args, **(kwargs or {}))
        start = self.clock.mark()
        result = func(*args, **(kwargs or {}))
        self.spans.setdefault(f"{self.site} core", []).append((start, self.clock.mark()))
        return result


@contextlib.contextmanager
def _watching(sites: list[Site], clock: _Clock, spans: dict[str, list[tuple[Any, Any]]]) -> Iterator[None]:
    """With hooks on the sites' modules that mark when each begins and ends."""
    attention = _Attention(clock, spans)
    starts: dict[str, Any] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            attention.site, starts[name] = name, clock.mark()

        return hook

    def finish(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spans.setdefault(name, []).append((starts.pop(name), clock.mark()))
            attention.site = None

        return hook

    handles = []
    try:
        for site in sites:
            handles.append(site.module.register_forward_pre_hook(begin(site.name)))
            handles.append(site.module.register_forward_hook(finish(site.name)))
        with attention:
            yield
    finally:
        for handle in handles:
            handle.remove()

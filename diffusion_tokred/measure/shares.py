"""Where an unpatched model's time goes, module by module, and how much faster a step could be at best.

Each module's own time (without that of the modules inside it), and that of each attention core, is a share of a call of
the unpatched model. A reduced step works on less: a linear layer on fewer rows, an attention core on fewer queries and
keys, a module that is left out on nothing. `S*` is how much faster the call would be if each share shrank as its work
does. What a method does between the modules (matching, choosing, gathers and copies) is taken as free; what it realises
of S* is `phi = (S - 1) / (S* - 1)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from .kernels import KernelCounter
from .timing import synchronize

MIN_IDEAL = 1.2  # below it a realised fraction says nothing


@dataclass(frozen=True)
class Parts:
    """One call of a model, by the names of its modules; "NAME core" is the attention kernel inside of NAME.

    Attributes:
        seconds: of each module itself, without the modules and cores inside it. "" is the model.
        work: elements that a module was handed; of a core, those of its queries times the number of keys. What was
            called and did nothing, since no module inside of it ran, or no kernel if kernels are counted, is left out.
        kernels, flops: of the whole call, as `KernelCounter` counts them; 0 if it did not.
    """

    seconds: Mapping[str, float]
    work: Mapping[str, float]
    kernels: int = 0
    flops: int = 0

    @property
    def total(self) -> float:
        """Seconds of the call."""
        return sum(self.seconds.values())


def ideal(dense: Parts, reduced: Parts) -> float:
    """S*: how many times faster than `dense` a call with the work of `reduced` could be. `dense` has the times."""
    left = 0.0
    for name, seconds in dense.seconds.items():
        before = dense.work.get(name, 0.0)
        left += seconds * (reduced.work.get(name, 0.0) / before if before else 1.0)
    return dense.total / left if left else math.inf


def realised(speedup: float, ideal: float) -> float | None:
    """phi = (S - 1) / (S* - 1); None where S* < 1.2, which leaves too little to tell from noise."""
    return None if ideal < MIN_IDEAL else (speedup - 1) / (ideal - 1)


def profile(
    model: nn.Module, call: Callable[[], Any], rounds: int = 3, warmup: int = 1, device: torch.device | str = "cpu"
) -> Parts:
    """Times by module of the unpatched model: medians over calls. `call` calls the model, once or more.

    Raises:
        ConfigError: no rounds, or the model was never called.
    """
    if rounds < 1:
        raise ConfigError(f"profiling needs at least one round, got {rounds}")
    for _ in range(warmup):
        call()
    with Watch(model, device) as watch:
        for _ in range(rounds):
            call()
    if not watch.calls:
        raise ConfigError(f"nothing to profile: {type(model).__name__} was not called")
    names = dict.fromkeys(name for parts in watch.calls for name in parts.seconds)
    seconds = {name: float(np.median([parts.seconds.get(name, 0.0) for parts in watch.calls])) for name in names}
    return Parts(seconds, watch.calls[-1].work)


@dataclass
class _Running:
    """A module's call that is on."""

    name: str
    work: float
    start: Any
    kernels: int
    inner: list[tuple[Any, Any]] = field(default_factory=list)  # spans of the modules and cores in it
    works: bool = False  # itself, or a module or core in it


class Watch:
    """A block in which all calls of a model are taken apart. It changes nothing, and slows the calls down.

    Enter it before the model is patched: it knows the modules that are there then, wherever a patch puts them.

    Args:
        model: eager, not compiled.
        counter: entered by the caller; then each call has its kernels and FLOPs.

    Attributes:
        calls: one entry a call of the model.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str = "cpu", counter: KernelCounter | None = None
    ) -> None:
        self.model, self.clock, self.counter = model, _Clock(torch.device(device)), counter
        self.calls: list[Parts] = []
        self._stack: list[_Running] = []
        self._spans: list[tuple[str, Any, Any, list[tuple[Any, Any]]]] = []
        self._work: dict[str, float] = {}
        self._before = (0, 0)

    def __enter__(self) -> Watch:
        self._attention = _Attention(self)
        self._handles = []
        for name, module in self.model.named_modules():
            leaf = next(module.children(), None) is None
            begin, end = self._hooks(name, leaf, weights=leaf and next(module.parameters(), None) is not None)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(end))
        self._attention.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attention.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _hooks(self, name: str, leaf: bool, weights: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not name:
                self._stack.clear()  # an exception broke the last call off
                self._spans.clear()
                self._work.clear()
                self._before = self._counted()
            work, kernels = _elements((*args, *kwargs.values())), self._counted()[0]
            self._stack.append(_Running(name, work, self.clock.mark(), kernels, works=leaf))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            running = self._stack.pop()
            span = running.start, self.clock.mark()
            self._spans.append((name, *span, running.inner))
            if weights and self.counter is not None:  # it may be given what it made before
                running.works = self.counter.count > running.kernels
            if running.works:
                self._work[name] = self._work.get(name, 0.0) + running.work
            if self._stack:
                self._stack[-1].inner.append(span)
                self._stack[-1].works |= running.works
            else:
                self._finish()

        return begin, end

    def core(self, query: torch.Tensor, key: torch.Tensor, start: Any) -> None:
        """An attention kernel has run, inside of the module that is on."""
        if not self._stack:
            return
        running, span = self._stack[-1], (start, self.clock.mark())
        name = f"{running.name} core"
        self._spans.append((name, *span, []))
        self._work[name] = self._work.get(name, 0.0) + query.numel() * key.shape[-2]
        running.inner.append(span)
        running.works = True

    def _finish(self) -> None:
        seconds: dict[str, float] = {}
        for name, start, end, inner in self._spans:
            own = self.clock.seconds([(start, end)]) - self.clock.seconds(inner)
            seconds[name] = seconds.get(name, 0.0) + own
        kernels, flops = (now - then for now, then in zip(self._counted(), self._before, strict=True))
        self.calls.append(Parts(seconds, dict(self._work), kernels, flops))

    def _counted(self) -> tuple[int, int]:
        return (0, 0) if self.counter is None else (self.counter.count, self.counter.flops)


def _elements(values: Sequence[Any]) -> float:
    """Elements of the tokens and pictures among a module's arguments; of whatever tensors there are, if of none."""
    sizes = [(x.ndim, x.numel()) for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return float(sum(size for ndim, size in sizes if ndim >= 3) or sum(size for _, size in sizes))


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
    """Sees each call of PyTorch's attention function."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        start = self.watch.clock.mark()
        result = func(*args, **kwargs)
        named = dict(zip(("query", "key"), args, strict=False)) | kwargs
        self.watch.core(named["query"], named["key"], start)
        return result

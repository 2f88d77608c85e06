"""Guidance taken apart: a stand-in for a denoiser that makes one call of every pass, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cases import rows_of, sample_of


def pass_count(pipe: Any, run: Callable[..., Tensor]) -> tuple[int, int]:
    """(rows a denoiser call, denoiser calls a step) with a batch of 1: (2, 1) for batched guidance, (1, 2) apart."""
    watched: list[tuple[Any, Any]] = []
    model = _model(pipe)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: watched.append((len(sample_of(args, kwargs)), _time(args, kwargs))),
        with_kwargs=True,
    )
    run(pipe, steps=1)
    handle.remove()
    return watched[0][0], sum(bool(torch.equal(time, watched[0][1])) for _, time in watched)


class Passes(nn.Module):
    """Stands in the place of a pipeline's denoiser. Everything but the call is the denoiser's own.

    Args:
        pipe: the pipeline, changed.
        model: its denoiser, patched.
        order: a call with more rows than one (of a batch of 1) becomes one call for each row, in this order.
    """

    def __init__(self, pipe: Any, model: nn.Module, order: tuple[int, ...]) -> None:
        super().__init__()
        self._orig_mod, self.order = model, order  # the name that torch.compile's wrapper has for it
        self.outputs: list[list[tuple[int, Tensor]]] = [[]]  # of each run: (number of the pass in its step, output)
        self._step: tuple[Any, int] = (None, 0)
        name = next(name for name, part in pipe.components.items() if part is model)
        setattr(pipe, name, self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def disturb(self) -> None:
        """From now on all passes but the first of each step get other inputs; the pipeline sees the old outputs."""
        self.outputs.append([])

    def firsts(self) -> list[tuple[Tensor, Tensor]]:
        """Outputs of the first pass of each step: (disturbed run, run before)."""
        before, now = self.outputs
        return [(b, a) for (number, a), (_, b) in zip(before, now, strict=True) if number == 0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = len(sample_of(args, kwargs))
        if rows == 1:
            return _like(*self._call(args, kwargs))
        found = {
            row: self._call(
                tuple(_part(a, row, rows) for a in args), {k: _part(v, row, rows) for k, v in kwargs.items()}
            )
            for row in self.order
        }
        return _like(torch.cat([found[row][0] for row in sorted(found)]), found[0][1])

    def _call(self, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
        time = _time(args, kwargs).clone()
        last, number = self._step
        number = number + 1 if last is not None and torch.equal(time, last) else 0
        self._step = time, number
        disturbed = len(self.outputs) == 2
        if disturbed and number:
            args, kwargs = tuple(map(_other, args)), {k: _other(v) for k, v in kwargs.items()}
        out = self._orig_mod(*args, **kwargs)
        done = self.outputs[-1]
        done.append((number, rows_of(out[0])))
        # The loop goes on as before, so that the first passes of the next steps have the inputs they had.
        return (self.outputs[0][len(done) - 1][1] if disturbed else rows_of(out[0])), out


def _model(pipe: Any) -> nn.Module:
    from ..patching import denoisers

    return denoisers(pipe)[0]


def _like(first: Any, out: Any) -> Any:
    """`out` with another first entry: a tuple, or one of diffusers' output classes."""
    if isinstance(out[0], list):
        first = list(first)
    return (first, *out[1:]) if isinstance(out, tuple) else type(out)(first)


def _time(args: Any, kwargs: Any) -> Tensor:
    time = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return torch.as_tensor(time).flatten()[:1]


def _part(value: Any, row: int, rows: int) -> Any:
    """A row of everything that has one for each pass."""
    if isinstance(value, dict):
        return {k: _part(v, row, rows) for k, v in value.items()}
    if isinstance(value, list) and len(value) == rows:
        return value[row : row + 1]
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return value[row : row + 1]
    return value


def _other(value: Any) -> Any:
    """Another picture, another text; the same timestep, masks and positions."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [v * 1.5 + 0.3 for v in value]
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
        return value * 1.5 + 0.3
    return value

"""The tap: reach queries, keys and values inside an installed attention processor, without copying its code.

Joint and FLUX attention take no separate keys and values, and kept keys and values are already projected and rotated.
So a tapped processor is the *installed* one, running its own code object, in which the name of the attention function
(`F.scaled_dot_product_attention` or `dispatch_attention_fn`) means ours. Ours edits keys and values, and calls the
original. This is the one place that touches interpreter-wide state: the private globals live in a module in
`sys.modules`, because Dynamo looks guards up there by name; they leave it with the tap.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from .site import KV, Cache

_SDPA, _DISPATCH = "scaled_dot_product_attention", "dispatch_attention_fn"
_numbers = itertools.count()


class Tap:
    """What the attention function of one attention module shall do. Set before a call of the module, read inside it.

    Attributes:
        kv: where keys and values of the image come from, None to leave them.
        watch: called with (q, k, v), each (B, H, S, D), before any edit.
        tokens: image rows handed in; text: text rows; text_first: their order.
    """

    def __init__(self, text_first: bool = False) -> None:
        self.text_first = text_first
        self.clear()

    def clear(self) -> None:
        self.kv: KV | Cache | None = None
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.tokens = 0
        self.text = 0

    def attend(self, attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, dim: int, kwargs: Any) -> Tensor:
        """Call `attention` on edited keys and values. Tokens are on axis `dim`: (B, H, S, D) or (B, S, H, D)."""
        if k.shape[dim] != self.tokens + self.text:  # another attention in the same processor: an IP-Adapter's
            return attention(q, k, v, **kwargs)
        if self.watch is not None:
            self.watch(*((q, k, v) if dim == 2 else (t.transpose(1, 2) for t in (q, k, v))))
        if self.kv is not None:
            if kwargs.get("attn_mask") is not None:
                raise UnsupportedError("attention with a mask cannot have its keys and values reduced here")
            k, v = self._edit(k, dim), self._edit(v, dim)
        return attention(q, k, v, **kwargs)

    def _edit(self, x: Tensor, dim: int) -> Tensor:
        assert self.kv is not None
        x = x.transpose(1, 2) if dim == 2 else x  # (B, S, H, D)
        start = self.text if self.text_first else 0
        image = x.narrow(1, start, self.tokens)
        text = x.narrow(1, 0 if self.text_first else self.tokens, self.text)
        image = self.kv.rows(image.flatten(2)).unflatten(2, x.shape[2:])
        x = torch.cat([text, image] if self.text_first else [image, text], 1) if self.text else image
        return x.transpose(1, 2) if dim == 2 else x


def why_not(processor: Any) -> str | None:
    """Why a processor cannot be tapped; None if it can."""
    names = getattr(_function(processor), "__code__", None)
    if names is not None and not {_SDPA, _DISPATCH}.isdisjoint(names.co_names):
        return None
    return (
        f"the installed processor {type(processor).__name__} does not call PyTorch's attention function, so keys and "
        "values cannot be reached: disable attention slicing or xFormers (the default processor is as fast)"
    )


def tapped(processor: Any, tap: Tap) -> Any:
    """A copy of `processor` whose attention function goes through `tap`.

    The copy's class is a subclass of the processor's, with its name and signature; its attributes (and an adapter's
    weights) are the processor's own.

    Raises:
        UnsupportedError: the processor calls no attention function that can be reached.
    """
    reason = why_not(processor)
    if reason:
        raise UnsupportedError(reason)
    original = _function(processor)
    space = types.ModuleType(f"{__name__}.space{next(_numbers)}")
    space.__dict__.update({**original.__globals__, "__name__": space.__name__})
    if _DISPATCH in original.__code__.co_names:
        dispatch = original.__globals__[_DISPATCH]

        def attend_dispatch(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            return tap.attend(dispatch, query, key, value, 1, kwargs)

        setattr(space, _DISPATCH, attend_dispatch)
    else:
        functional = types.ModuleType(f"{space.__name__}.functional")
        functional.__dict__.update({**F.__dict__, "__name__": functional.__name__})

        def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            return tap.attend(F.scaled_dot_product_attention, query, key, value, 2, kwargs)

        setattr(functional, _SDPA, attend_sdpa)
        space.__dict__["F"] = functional
        sys.modules[functional.__name__] = functional
    sys.modules[space.__name__] = space

    call = types.FunctionType(
        original.__code__, space.__dict__, original.__name__, original.__defaults__, original.__closure__
    )
    call.__kwdefaults__ = original.__kwdefaults__
    call.__annotations__ = original.__annotations__

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return tapped(copy.deepcopy(processor, memo), copy.deepcopy(tap, memo))

    kind = type(processor)
    names = {"__call__": call, "__module__": kind.__module__, "__deepcopy__": deepcopy}
    result = copy.copy(processor)
    result.__class__ = type(kind.__name__, (kind,), names)
    for module in (space.__name__, f"{space.__name__}.functional"):
        weakref.finalize(result, sys.modules.pop, module, None)
    return result


def _function(processor: Any) -> Any:
    """The plain function behind a processor's call, past decorators such as deprecation wrappers."""
    function = type(processor).__call__
    if isinstance(processor, nn.Module) and function is nn.Module.__call__:
        function = type(processor).forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function

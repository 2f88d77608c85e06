"""The tap: reach queries, keys and values inside an installed attention processor, without copying its code.

Joint and FLUX attention take no separate keys and values, and kept keys and values are already projected and rotated.
So a tapped processor is the *installed* one, running its own code object, in which the name of the attention function
(`F.scaled_dot_product_attention` or `dispatch_attention_fn`) means ours. Ours edits keys and values, and calls the
original. This is the one place that touches interpreter-wide state: the private globals live in a module in
`sys.modules`, because Dynamo looks guards up there by name.

Which tap a call belongs to travels with it: in the `backend=` argument of `dispatch_attention_fn`. One private module
then serves all processors of a class, and `compile_repeated_blocks` makes one graph of all blocks. PyTorch's own
function has no argument to carry it, so there each tap has a module to itself, which leaves `sys.modules` with it.
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
from .rows import KV, Attended, Cache

_SDPA, _DISPATCH = "scaled_dot_product_attention", "dispatch_attention_fn"
_numbers = itertools.count()
# (processor class, its function, rotary) -> the class that runs this code with private globals, as long as it is used.
_KINDS: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()


class Tap:
    """What the attention function of one attention module shall do. Set before a call of the module, read inside it.

    Attributes:
        kv: where keys and values of the image come from, or all that attention returns; None to leave them.
        watch: called with (q, k, v), each (B, H, S, D), before any edit.
        start, tokens, length: the image's first row, its rows, and all rows of the attention's sequence.
        rows: which rows to keep, (M',) int64, if `kv` chooses; None if it averages, or keeps them all.
        masks_text: an attention mask hides text rows only, never the image's.
        backend: the processor's own.
    """

    def __init__(self) -> None:
        self.backend: Any = None
        self.clear()

    def clear(self) -> None:
        self.kv: KV | Cache | Attended | None = None
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.start = self.tokens = self.length = 0
        self.rows: Tensor | None = None
        self.masks_text = False

    def attend(self, attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, dim: int, kwargs: Any) -> Tensor:
        """Call `attention` on edited keys and values. Tokens are on axis `dim`: (B, H, S, D) or (B, S, H, D)."""
        if k.shape[dim] != self.length or q.shape[dim] != self.length:
            # Another attention in the same processor: an IP-Adapter's.
            return attention(q, k, v, **kwargs)
        if self.watch is not None:
            self.watch(*((q, k, v) if dim == 2 else (t.transpose(1, 2) for t in (q, k, v))))
        if isinstance(self.kv, Attended):
            if self.kv.at is not None:
                return self.kv.rows(self.start, self.length - self.start - self.tokens, dim)
            return self.kv.keep(attention(q, k, v, **kwargs), dim)
        if self.kv is not None:
            k, v = self._edit(k, dim), self._edit(v, dim)
            if kwargs.get("attn_mask") is not None:
                kwargs["attn_mask"] = self._columns(kwargs["attn_mask"], k.shape[dim])
        return attention(q, k, v, **kwargs)

    def _columns(self, mask: Tensor, length: int) -> Tensor:
        """The mask's columns for the `length` keys that are there."""
        if mask.shape[-1] == length:
            return mask
        if self.rows is not None:
            return mask.index_select(-1, self.rows)
        if not self.masks_text:
            raise UnsupportedError("under an attention mask, keys and values can be chosen, not averaged")
        end = self.start + self.tokens
        image = mask[..., self.start : self.start + 1].expand(*mask.shape[:-1], length - self.length + self.tokens)
        return torch.cat([mask[..., : self.start], image, mask[..., end:]], -1)

    def _edit(self, x: Tensor, dim: int) -> Tensor:
        assert self.kv is not None and not isinstance(self.kv, Attended)
        x = x.transpose(1, 2) if dim == 2 else x  # (B, S, H, D)
        if self.rows is not None:
            x = x.index_select(1, self.rows)
        else:
            end = self.start + self.tokens
            image = self.kv.rows(x[:, self.start : end].flatten(2)).unflatten(2, x.shape[2:])
            parts = [x[:, : self.start], image, x[:, end:]]
            x = torch.cat([part for part in parts if part.shape[1]], 1) if self.length > self.tokens else image
        return x.transpose(1, 2) if dim == 2 else x


def why_not(processor: Any, rotary: str | None = None) -> str | None:
    """Why a processor cannot be tapped; None if it can. `rotary`: a function that it must call by this name."""
    names = getattr(getattr(_function(processor), "__code__", None), "co_names", ())
    kind = type(processor).__name__
    if {_SDPA, _DISPATCH}.isdisjoint(names):
        return (
            f"the installed processor {kind} does not call PyTorch's attention function, so keys and "
            "values cannot be reached: disable attention slicing or xFormers (the default processor is as fast)"
        )
    if rotary is not None and rotary not in names:
        return f"the installed processor {kind} does not call {rotary}, so rotary positions cannot follow the tokens"
    return None


def tapped(processor: Any, tap: Tap, rotary: str | None = None) -> Any:
    """A copy of `processor` whose attention function goes through `tap`.

    The copy's class is a subclass of the processor's, with its name and signature; its attributes (and an adapter's
    weights) are the processor's own. See `follow`.

    Args:
        processor: the installed one.
        tap: what its attention function shall do.
        rotary: name of its function for rotary positions, if that takes one table for the batch: the copy's takes one
            a sample, (B, S, D), too.

    Raises:
        UnsupportedError: the processor calls no attention function that can be reached.
    """
    reason = why_not(processor, rotary)
    if reason:
        raise UnsupportedError(reason)
    original = _function(processor)
    result = copy.copy(processor)
    if _DISPATCH in original.__code__.co_names:
        key = (type(processor), original, rotary)
        if (kind := _KINDS.get(key)) is None:
            space = _space(original, rotary)
            setattr(space, _DISPATCH, _dispatch(original.__globals__))
            _KINDS[key] = kind = _subclass(processor, original, space)
            weakref.finalize(kind, sys.modules.pop, space.__name__, None)
        result.__class__ = kind
        follow(result, processor, tap)
        return result

    space = _space(original, rotary)
    functional = types.ModuleType(f"{space.__name__}.functional")
    functional.__dict__.update({**F.__dict__, "__name__": functional.__name__})
    setattr(functional, _SDPA, _sdpa(tap))
    space.__dict__["F"] = functional
    sys.modules[functional.__name__] = functional

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return tapped(copy.deepcopy(processor, memo), copy.deepcopy(tap, memo), rotary)

    result.__class__ = _subclass(processor, original, space, __deepcopy__=deepcopy)
    for module in (space.__name__, functional.__name__):
        weakref.finalize(result, sys.modules.pop, module, None)
    return result


def follow(result: Any, processor: Any, tap: Tap) -> None:
    """Take over what has been set on a tapped processor's original since, such as another attention backend."""
    result.__dict__.update(processor.__dict__)
    if _DISPATCH in _function(processor).__code__.co_names:
        tap.backend = getattr(processor, "_attention_backend", None)
        result.__dict__["_attention_backend"] = tap


def _dispatch(home: dict[str, Any]) -> Callable[..., Any]:
    """diffusers' attention function, as it is in its module now, which finds its tap in the place of the backend."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, backend: Any = None, **kwargs: Any) -> Tensor:
        dispatch = home[_DISPATCH]
        if not isinstance(backend, Tap):
            return dispatch(query, key, value, backend=backend, **kwargs)
        return backend.attend(dispatch, query, key, value, 1, {**kwargs, "backend": backend.backend})

    return attend


def _sdpa(tap: Tap) -> Callable[..., Any]:
    """PyTorch's attention function, through one tap."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return tap.attend(F.scaled_dot_product_attention, query, key, value, 2, kwargs)

    return attend


def _per_sample(rotate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that rotates rows (B, S, H, D) by one table (S, D), or a tuple of them, made to take one a sample.

    Rows are rotated each by itself, so a batch with tables of its own is one long sequence.
    """

    def apply(x: Tensor, tables: Any, *args: Any, **kwargs: Any) -> Tensor:
        single = tables if isinstance(tables, Tensor) else tables[0]
        if single.ndim < 3:
            return rotate(x, tables, *args, **kwargs)
        flat = tables.flatten(0, 1) if isinstance(tables, Tensor) else tuple(table.flatten(0, 1) for table in tables)
        return rotate(x.flatten(0, 1)[None], flat, *args, **kwargs).unflatten(1, x.shape[:2])[0]

    return apply


def _space(original: Any, rotary: str | None) -> types.ModuleType:
    """A module whose globals are those of a function, for us to change."""
    space = types.ModuleType(f"{__name__}.space{next(_numbers)}")
    space.__dict__.update({**original.__globals__, "__name__": space.__name__})
    if rotary is not None:
        setattr(space, rotary, _per_sample(original.__globals__[rotary]))
    sys.modules[space.__name__] = space
    return space


def _subclass(processor: Any, original: Any, space: types.ModuleType, **more: Any) -> type:
    """The processor's class, running its code with the globals of `space`."""
    call = types.FunctionType(
        original.__code__, space.__dict__, original.__name__, original.__defaults__, original.__closure__
    )
    call.__kwdefaults__ = original.__kwdefaults__
    call.__annotations__ = original.__annotations__
    kind = type(processor)
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, **more})


def _function(processor: Any) -> Any:
    """The plain function behind a processor's call, past decorators such as deprecation wrappers."""
    function = type(processor).__call__
    if isinstance(processor, nn.Module) and function is nn.Module.__call__:
        function = type(processor).forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function

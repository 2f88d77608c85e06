"""Rows of sequences (B, S, C) by an index, (M,) for all samples or (B, M) int64: taken out, or written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import on, operator


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at`, (M,), (1, M) or (B, M), of sequences (B, S, C): (B, M, C)."""
    at = _shared(at)
    return _OPS.take(x, at) if on(x) else take(x, at)


def norm_rows(x: Tensor, at: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Take rows, normalise and modulate them, as adaptive layer norms do: LayerNorm(x[at]) * (1 + scale) + shift.

    The kernel does it in one pass in float32, and rounds once.

    Args:
        x: (B, S, C).
        at: (M,), (1, M) or (B, M) int64.
        shift, scale: (B, C). The norm has no weights of its own.
        eps: added to the variance.

    Returns:
        (B, M, C) of `x`'s dtype.
    """
    at = _shared(at)
    return (_OPS.modulate if on(x) else modulate)(x, at, shift, scale, eps)


def scatter_rows(stored: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Overwrite the rows `at`, (M,), (1, M) or (B, M), of `stored` (B, S, C), in place, by `rows` (B, M, C).

    `rows` is cast to `stored`'s dtype. Each position at most once a sample. Returns `stored`.
    """
    (_OPS.put if on(stored) else put)(stored, _shared(at), rows)
    return stored


def add_rows(x: Tensor, at: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Gated residual of chosen rows, in place: x[at] += gate * y. Each position at most once a sample.

    Args:
        x: (B, S, C), changed.
        at: (M,), (1, M) or (B, M) int64.
        y: (B, M, C).
        gate: (B, C).

    Returns:
        `x`.
    """
    (_OPS.add if on(x) else add)(x, _shared(at), y, gate)
    return x


def _shared(at: Tensor) -> Tensor:
    """(1, M) -> (M,): indices for all samples."""
    return at[0] if at.ndim == 2 and at.shape[0] == 1 else at


# --- plain; `at` is (M,) or (B, M) ------------------------------------------------------------------------------------


def take(x: Tensor, at: Tensor) -> Tensor:
    return x.index_select(1, at) if at.ndim == 1 else x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))


def modulate(x: Tensor, at: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(take(x, at), x.shape[2:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def put(stored: Tensor, at: Tensor, rows: Tensor) -> None:
    rows = rows.to(stored.dtype)
    if at.ndim == 1:
        stored.index_copy_(1, at, rows)
    else:
        stored.scatter_(1, at[:, :, None].expand_as(rows), rows)


def add(x: Tensor, at: Tensor, y: Tensor, gate: Tensor) -> None:
    put(x, at, take(x, at) + gate[:, None] * y)


def _taken(x: Tensor, at: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], at.shape[-1], x.shape[2])


def _nothing(*_: object) -> None:
    return None


operator(take, _taken)
operator(modulate, _taken)
operator(put, _nothing, mutates=("stored",))
operator(add, _nothing, mutates=("x",))
_OPS = torch.ops.tokred

"""The kernels of `rows`. One program takes a tile of rows of one sample."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile, at least one row of a block of columns


def take(x: Tensor, at: Tensor) -> Tensor:
    m, c = at.shape[-1], x.shape[2]
    out = x.new_empty(x.shape[0], m, c)
    if out.numel():
        rows, columns = _tile(c)
        grid = (triton.cdiv(m, rows), triton.cdiv(c, columns), len(x))
        _take[grid](x, at, out, m, c, *x.stride(), *_stride(at), *out.stride(), ROWS=rows, COLUMNS=columns)
    return out


def modulate(x: Tensor, at: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    m, c = at.shape[-1], x.shape[2]
    out = x.new_empty(x.shape[0], m, c)
    if out.numel():
        columns = triton.next_power_of_2(c)  # whole rows
        rows = max(1, min(TILE // columns, 64))
        _modulate[(triton.cdiv(m, rows), 1, len(x))](
            x, at, shift, scale, out, m, c, eps, *x.stride(), *_stride(at), *shift.stride(), *scale.stride(),
            *out.stride(), ROWS=rows, COLUMNS=columns, num_warps=4 if columns <= TILE else 8,
        )  # fmt: skip
    return out


def put(stored: Tensor, at: Tensor, rows: Tensor) -> None:
    if rows.numel():
        m, c = at.shape[-1], rows.shape[2]
        height, columns = _tile(c)
        grid = (triton.cdiv(m, height), triton.cdiv(c, columns), len(rows))
        _put[grid](stored, at, rows, m, c, *stored.stride(), *_stride(at), *rows.stride(), ROWS=height, COLUMNS=columns)


def add(x: Tensor, at: Tensor, y: Tensor, gate: Tensor) -> None:
    if y.numel():
        m, c = at.shape[-1], y.shape[2]
        rows, columns = _tile(c)
        grid = (triton.cdiv(m, rows), triton.cdiv(c, columns), len(y))
        _add[grid](
            x, at, y, gate, m, c, *x.stride(), *_stride(at), *y.stride(), *gate.stride(), ROWS=rows, COLUMNS=columns
        )


def _tile(c: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two."""
    columns = min(triton.next_power_of_2(c), TILE)
    return min(TILE // columns, 64), columns


def _stride(at: Tensor) -> tuple[int, int]:
    """Of an index (M,) or (B, M)."""
    return (0, at.stride(0)) if at.ndim == 1 else (at.stride(0), at.stride(1))


@triton.jit
def _places(at, sample, m, c, at_b, at_m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this tile: rows in the index (ROWS, 1), where they point, columns (1, COLUMNS), and which of them exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = tl.load(at + sample * at_b + row * at_m, mask=row < m, other=0)
    return row.to(tl.int64), place, column, (row < m) & (column < c)


@triton.jit
def _take(x, at, out, m, c, x_b, x_s, x_c, at_b, at_m, out_b, out_m, out_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(2).to(tl.int64)
    row, place, column, there = _places(at, sample, m, c, at_b, at_m, ROWS, COLUMNS)
    tile = tl.load(x + sample * x_b + place * x_s + column * x_c, mask=there)
    tl.store(out + sample * out_b + row * out_m + column * out_c, tile, mask=there)


@triton.jit
def _put(stored, at, rows, m, c, s_b, s_s, s_c, at_b, at_m, r_b, r_m, r_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(2).to(tl.int64)
    row, place, column, there = _places(at, sample, m, c, at_b, at_m, ROWS, COLUMNS)
    tile = tl.load(rows + sample * r_b + row * r_m + column * r_c, mask=there)
    tl.store(stored + sample * s_b + place * s_s + column * s_c, tile.to(stored.dtype.element_ty), mask=there)


@triton.jit
def _add(
    x, at, y, gate, m, c, x_b, x_s, x_c, at_b, at_m, y_b, y_m, y_c, g_b, g_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    sample = tl.program_id(2).to(tl.int64)
    row, place, column, there = _places(at, sample, m, c, at_b, at_m, ROWS, COLUMNS)
    tile = tl.load(y + sample * y_b + row * y_m + column * y_c, mask=there, other=0).to(tl.float32)
    weight = tl.load(gate + sample * g_b + column * g_c, mask=column < c, other=0).to(tl.float32)
    target = x + sample * x_b + place * x_s + column * x_c
    old = tl.load(target, mask=there, other=0).to(tl.float32)
    tl.store(target, (old + weight * tile).to(x.dtype.element_ty), mask=there)


@triton.jit
def _modulate(
    x, at, shift, scale, out, m, c, eps, x_b, x_s, x_c, at_b, at_m, shift_b, shift_c, scale_b, scale_c, out_b, out_m,
    out_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile has whole rows, so mean and variance are of two passes over what is in registers."""
    sample = tl.program_id(2).to(tl.int64)
    row, place, column, there = _places(at, sample, m, c, at_b, at_m, ROWS, COLUMNS)
    values = tl.load(x + sample * x_b + place * x_s + column * x_c, mask=there, other=0).to(tl.float32)
    centred = tl.where(there, values - (tl.sum(values, 1) / c)[:, None], 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)[:, None]
    weight = tl.load(scale + sample * scale_b + column * scale_c, mask=column < c, other=0).to(tl.float32)
    bias = tl.load(shift + sample * shift_b + column * shift_c, mask=column < c, other=0).to(tl.float32)
    result = normal * (1 + weight) + bias
    tl.store(out + sample * out_b + row * out_m + column * out_c, result.to(out.dtype.element_ty), mask=there)

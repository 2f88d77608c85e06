"""Cells of the token grid: one destination in each, every other token a source (the 2-d partition of ToMe-SD)."""

from __future__ import annotations

import torch
from torch import Tensor


def destinations(
    h: int, w: int, sy: int, sx: int, offset: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Choose one destination in each complete `sy` x `sx` cell of an `h` x `w` grid (ToMe-SD, arXiv 2303.17604).

    Rows and columns left over at the bottom and on the right belong to no cell: their tokens are sources.

    Args:
        h, w: token grid; positions are row-major, i * w + j.
        sy, sx: cell size in tokens.
        offset: (D,) int64 with D = (h // sy) * (w // sx), the place dy * sx + dx of each cell's destination in its
            cell, cells in row-major order; None takes the top-left token.
        device: where to build the result when `offset` is None; otherwise it is built beside `offset`.

    Returns:
        (D,) int64 positions, in the order of the cells.

    Raises:
        ValueError: the grid holds no complete cell, or `offset` does not have one entry a cell.
    """
    if min(h, w, sy, sx) < 1 or h < sy or w < sx:
        raise ValueError(f"a grid of {h} x {w} tokens holds no complete cell of {sy} x {sx}")
    rows, cols = h // sy, w // sx
    if offset is not None:
        if offset.shape != (rows * cols,):
            raise ValueError(f"offset needs shape ({rows * cols},): one entry a cell, got {tuple(offset.shape)}")
        device = offset.device
    corner = torch.arange(rows, device=device)[:, None] * (sy * w) + torch.arange(cols, device=device) * sx
    if offset is None:
        return corner.flatten()
    return corner.flatten() + torch.div(offset, sx, rounding_mode="floor") * w + offset % sx


def split(dst: Tensor, n: int) -> Tensor:
    """List the positions in [0, n) that are not in `dst`, ascending: the sources.

    Args:
        dst: (D,) int64 positions, each at most once.
        n: number of tokens.

    Returns:
        (n - D,) int64.
    """
    mask = torch.ones(n, dtype=torch.bool, device=dst.device).index_fill(0, dst, False)
    return compact(mask, n - dst.shape[0])


def compact(mask: Tensor, count: int) -> Tensor:
    """List where `mask` is true, ascending, when the count is known: `nonzero` without its dynamic shape and sync.

    Args:
        mask: (..., N) bool with exactly `count` true entries a row.
        count: number of true entries a row.

    Returns:
        (..., count) int64.
    """
    # The k-th true entry is where the running count reaches k.
    wanted = torch.arange(1, count + 1, device=mask.device).expand(*mask.shape[:-1], count)
    return torch.searchsorted(mask.cumsum(-1), wanted.contiguous())

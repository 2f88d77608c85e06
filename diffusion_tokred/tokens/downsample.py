"""Downsampling of the token grid (ToDo): fewer tokens by place, with no matching and nothing to undo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("nearest", "nearest-exact", "area", "bilinear")


def pooled_grid(h: int, w: int, factor: int) -> tuple[int, int]:
    """Size of an `h` x `w` grid after pooling by `factor`: floor division.

    Raises:
        ValueError: a side of the result would be 0.
    """
    if factor < 1 or h < factor or w < factor:
        raise ValueError(f"cannot pool a grid of {h} x {w} tokens by {factor}: need 1 <= factor <= {min(h, w)}")
    return h // factor, w // factor


def positions(h: int, w: int, factor: int, mode: str, device: torch.device | str | None = None) -> Tensor:
    """Positions that nearest downsampling keeps, by the formulas of `torch.nn.functional.interpolate`.

    Args:
        h, w: token grid; positions are row-major, i * w + j.
        factor: pooling factor, a side; the result has the grid of `pooled_grid`.
        mode: "nearest" keeps row floor(i * h / h'), "nearest-exact" row floor((i + 0.5) * h / h'); columns alike.
        device: where to build the result.

    Returns:
        (h' * w',) int64, ascending.

    Raises:
        ValueError: another mode (the others average, and have no positions), or no grid is left.
    """
    if mode not in MODES[:2]:
        raise ValueError(f"mode {mode!r} has no positions: use one of {', '.join(MODES[:2])}")
    rows, cols = pooled_grid(h, w, factor)
    return (_kept(h, rows, mode, device)[:, None] * w + _kept(w, cols, mode, device)).flatten()


def downsample(x: Tensor, h: int, w: int, factor: int, mode: str = "nearest") -> Tensor:
    """Downsample tokens on their grid (ToDo, arXiv 2402.13573): (B, h * w, C) -> (B, h' * w', C).

    The values are those of `torch.nn.functional.interpolate` to the size of `pooled_grid`, without aligned corners and
    without antialiasing.

    Args:
        x: (B, h * w, C) tokens, row-major.
        h, w: token grid.
        factor: pooling factor, a side.
        mode: "nearest", "nearest-exact", "area" (mean of the window) or "bilinear".

    Raises:
        ValueError: an unknown mode, no grid is left, or `x` does not have h * w tokens.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
    b, n, c = x.shape
    rows, cols = pooled_grid(h, w, factor)
    if n != h * w:
        raise ValueError(f"a grid of {h} x {w} has {h * w} tokens, got {n}")
    if mode in MODES[:2]:
        if h % factor or w % factor:
            return x.index_select(1, positions(h, w, factor, mode, x.device))
        at = factor // 2 if mode == "nearest-exact" else 0
        return x.view(b, h, w, c)[:, at::factor, at::factor].reshape(b, rows * cols, c)
    image = x.view(b, h, w, c).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(rows, cols), mode=mode)
    return image.flatten(2).transpose(1, 2)


def _kept(old: int, new: int, mode: str, device: torch.device | str | None) -> Tensor:
    """Indices that nearest sampling keeps on one axis: (new,) int64.

    In integers, so exact. (`interpolate` computes them in float32 for float32 and below, and for a few sizes that do
    not divide, such as 106 -> 26, it lands one row lower than its own formula. In float64 it agrees with this.)
    """
    i = torch.arange(new, device=device)
    return i * old // new if mode == "nearest" else (2 * i + 1) * old // (2 * new)

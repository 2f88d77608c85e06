"""Regions of the picture on the token grid: which tokens a mask touches, what weights come to, and what is left."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def touched(mask: Tensor, grid: tuple[int, int], frames: int = 1) -> Tensor:
    """Which tokens a mask touches: those that share some area with a pixel of it.

    Mask and grid cover the same picture, whatever their sizes: token (i, j) covers the rows [i / h, (i + 1) / h) and
    the columns [j / w, (j + 1) / w) of it, and a pixel likewise.

    Args:
        mask: (H, W) bool.
        grid: (h, w) in tokens; of a video, `frames` pictures one below another.

    Returns:
        (h * w,) bool, row-major.
    """
    # The windows of adaptive pooling, from floor(i H / h) to ceil((i + 1) H / h), are the pixels that share area.
    return _on_grid(F.adaptive_max_pool2d, mask.float(), grid, frames) > 0


def weighed(weights: Tensor, grid: tuple[int, int], frames: int = 1) -> Tensor:
    """Weights of pixels (H, W) as weights of tokens: the mean over the pixels that share area with a token, (h * w,)
    float32. Arguments as in `touched`."""
    return _on_grid(F.adaptive_avg_pool2d, weights.float(), grid, frames)


def mergeable(protected: Tensor, grid: tuple[int, int], sy: int, sx: int) -> int:
    """How many tokens can be merged away, whichever of a cell's is its destination, if the protected ones are neither
    sources nor destinations (`tokens.match`): the least over the rows of `protected` (R, h * w).

    Each cell may spend one of its free tokens as a destination; one cell at least must be free of protected tokens, or
    there may be no destination.
    """
    h, w = grid
    rows, columns = h // sy * sy, w // sx * sx
    free = (~protected).view(-1, h, w)
    cells = free[:, :rows, :columns].unflatten(2, (-1, sx)).unflatten(1, (-1, sy)).sum((2, 4)).flatten(1)
    outside = free.sum((1, 2)) - cells.sum(1)
    most = (cells - 1).clamp_min(0).sum(1) + outside
    return int(most.where((cells == sy * sx).any(1), 0).min())


def lifted(scores: Tensor, weights: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
    """Scores (R, N), large means compute, with what a user says of the tokens.

    Args:
        weights: (1 or R, N); the result is the share of tokens of lower score, in [0, 1) (of equal ones the first is
            the higher), plus the weight: a token of weight 1 goes before all of weight 0.
        protected: (1 or R, N) bool; these get infinity, or the largest integer.
    """
    if weights is not None:
        scores = ranked(scores.flip(-1)).flip(-1) + weights
    if protected is None:
        return scores
    most = float("inf") if scores.is_floating_point() else torch.iinfo(scores.dtype).max
    return torch.where(protected, torch.full_like(scores[:1, :1], most), scores)


def ranked(scores: Tensor) -> Tensor:
    """Scores as shares of the tokens that are below: (R, N) in [0, 1), so that scores of any kind can be added."""
    order = scores.argsort(dim=-1, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32).expand_as(order)
    return torch.empty_like(place).scatter_(-1, order, place) / scores.shape[-1]


def room(n: int, need: int, align: int = 1) -> int:
    """A number of tokens, of `n`, that has room for `need`: one of sixteen sizes, multiples of `align`, or all. (Few
    sizes, so that few graphs are compiled when a mask changes.)"""
    step = -(-n // (16 * align)) * align
    return min(-(-need // step) * step, n)


def ratio_of(n: int, m: int) -> float:
    """The ratio at which `m` tokens of `n` are computed: n - int(n * ratio) == m, in floating point too."""
    ratio = (n - m) / n
    return ratio if int(n * ratio) == n - m else math.nextafter(ratio, 1.0)


def _on_grid(pool: object, picture: Tensor, grid: tuple[int, int], frames: int) -> Tensor:
    assert callable(pool)
    tokens: Tensor = pool(picture[None], (grid[0] // frames, grid[1]))[0]
    return tokens.repeat(frames, 1).flatten()

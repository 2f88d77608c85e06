"""Selection of rows: the k best of each sample, tied over guidance halves; taking rows out and putting them back."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import largest, rows_at, scatter_rows

__all__ = ["rows_at", "scatter_rows", "tie", "top", "untie"]


def top(scores: Tensor, k: int) -> Tensor:
    """Choose the `k` largest scores of each sample; of equal ones the first. The same on every device.

    Args:
        scores: (B, N); nan counts as the least.
        k: in [0, N].

    Returns:
        (B, k) int64 positions, ascending.

    Raises:
        ValueError: `k` is not in [0, N].
    """
    b, n = scores.shape
    if not 0 <= k <= n:
        raise ValueError(f"cannot choose {k} of {n} tokens")
    if k == 0 or k == n:
        return torch.arange(k, device=scores.device).repeat(b, 1)
    return largest(scores, k)


def tie(scores: Tensor, halves: int) -> Tensor:
    """Mean of the scores over the equal parts of a batch, such as [uncond; cond]: (B, N) -> (B / halves, N).

    ToCa (arXiv 2410.05317) lets both share their rows: sample i of each part then gets the same ones, by `untie`.

    Raises:
        ValueError: `halves` does not divide B.
    """
    b, n = scores.shape
    if halves < 1 or b % halves:
        raise ValueError(f"a batch of {b} does not have {halves} equal parts")
    return scores if halves == 1 else scores.view(halves, b // halves, n).mean(0)


def untie(rows: Tensor, halves: int) -> Tensor:
    """Repeat what a part of the batch has for all `halves` parts: (B / halves, ...) -> (B, ...)."""
    return rows if halves == 1 else rows.repeat(halves, *[1] * (rows.ndim - 1))

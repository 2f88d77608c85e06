"""Selection of rows: the k best of each sample, tied over guidance halves; taking rows out and putting them back."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import compact


def top(scores: Tensor, k: int) -> Tensor:
    """Choose the `k` largest scores of each sample; of equal ones the first. The same on every device.

    `topk` alone breaks ties as the device likes, and sorting everything is slow: only the k-th largest *value* is
    taken from it, which ties do not change. All above it are in, and of those equal to it the first that fit.

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
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    least = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return compact(above | (equal & (equal.cumsum(-1) <= room)), k)


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


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at`, (M,), (1, M) or (B, M), of sequences (B, S, C): (B, M, C)."""
    at = _shared(at)
    return x.index_select(1, at) if at.ndim == 1 else x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))


def scatter_rows(stored: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Overwrite the rows `at`, (M,), (1, M) or (B, M), of `stored` (B, S, C), in place, by `rows` (B, M, C).

    `rows` is cast to `stored`'s dtype. Each position at most once a sample. Returns `stored`.
    """
    at, rows = _shared(at), rows.to(stored.dtype)
    if at.ndim == 1:
        return stored.index_copy_(1, at, rows)
    return stored.scatter_(1, at[:, :, None].expand_as(rows), rows)


def _shared(at: Tensor) -> Tensor:
    """(1, M) -> (M,): indices for all samples."""
    return at[0] if at.ndim == 2 and at.shape[0] == 1 else at

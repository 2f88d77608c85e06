"""Where the k largest scores are: selection."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import compact
from .operators import on, operator

MOST = 16384  # scores of a sample that a kernel holds in registers
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` largest scores (B, N) of each sample, ascending, (B, k) int64; of equal ones the first.

    nan counts as the least; 0 < k < N. The kernel finds the k-th largest value bit by bit, and writes the positions in
    one pass: no sort. It holds a sample at once, so samples of more than 16,384 scores, or in float64 or integers, take
    the plain version.
    """
    if on(scores) and scores.shape[1] <= MOST and scores.dtype in _TYPES:
        found: Tensor = torch.ops.tokred.top(scores, k)
        return found
    return top(scores, k)


def top(scores: Tensor, k: int) -> Tensor:
    # `topk` alone breaks ties as the device likes, and sorting everything is slow: only the k-th largest *value* is
    # taken from it, which ties do not change. All above it are in, and of those equal to it the first that fit.
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    least = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return compact(above | (equal & (equal.cumsum(-1) <= room)), k)


def _fake(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)


operator(top, _fake)

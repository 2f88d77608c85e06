"""The kernel of `selection`. One program has all scores of a sample in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def top(scores: Tensor, k: int) -> Tensor:
    b, n = scores.shape
    out = torch.empty(b, k, dtype=torch.int64, device=scores.device)
    if b and k:
        size = triton.next_power_of_2(n)
        _top[(b,)](scores, out, n, k, *scores.stride(), SIZE=size, num_warps=min(16, max(4, size // 1024)))
    return out


@triton.jit
def _top(scores, out, n, k, s_b, s_n, SIZE: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    value = tl.load(scores + sample * s_b + place * s_n, mask=place < n, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))  # nan is the least
    # Whole numbers in the order of the values. Of those that are equal the first are chosen, so places past the end,
    # which come last, never are.
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)  # -0 is 0
    key = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    # The largest number that k keys reach is the k-th largest key: found from its highest bit down.
    least = tl.full((), 0, tl.uint32)
    for step in range(32):
        larger = least | (tl.full((), 1, tl.uint32) << (31 - step))
        least = tl.where(tl.sum((key >= larger).to(tl.int32), 0) >= k, larger, least)
    above, equal = key > least, key == least
    room = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    target = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + sample * k + target, place.to(tl.int64), mask=chosen)

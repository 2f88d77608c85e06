"""The kernel of `matching`: a matrix product whose scores never leave the registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def best(x: Tensor, dst: Tensor, src: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    b, s = x.shape[0], src.shape[0]
    values = torch.empty(b, s, dtype=torch.float32, device=x.device)
    places = torch.empty(b, s, dtype=torch.int64, device=x.device)
    if b and s:
        half = x.dtype != torch.float32
        _best[(triton.cdiv(s, 64), b)](
            x, dst, src, x if scale is None else scale, values, places, x.shape[2], dst.shape[0], s, *x.stride(),
            *((0, 0) if scale is None else scale.stride()[:2]), HAS_SCALE=scale is not None,
            WIDEN=x.dtype == torch.bfloat16 and not x.is_cuda, SOURCES=64, TARGETS=64, COLUMNS=64 if half else 32,
        )  # fmt: skip
    return values, places


@triton.jit
def _best(
    x, dst, src, scale, values, places, c, d, s, x_b, x_n, x_c, scale_b, scale_n, HAS_SCALE: tl.constexpr,
    WIDEN: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """SOURCES sources of one sample against all destinations, TARGETS at a time."""
    sample = tl.program_id(1).to(tl.int64)
    source = tl.program_id(0) * SOURCES + tl.arange(0, SOURCES)
    rows = x + sample * x_b + tl.load(src + source, mask=source < s, other=0)[:, None] * x_n
    top = tl.full((SOURCES,), float("-inf"), tl.float32)
    place = tl.zeros((SOURCES,), tl.int32)
    for first in range(0, d, TARGETS):
        target = first + tl.arange(0, TARGETS)
        position = tl.load(dst + target, mask=target < d, other=0)
        others = x + sample * x_b + position[None, :] * x_n
        scores = tl.zeros((SOURCES, TARGETS), tl.float32)
        for start in range(0, c, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            left = tl.load(rows + column[None, :] * x_c, mask=column[None, :] < c, other=0)
            right = tl.load(others + column[:, None] * x_c, mask=column[:, None] < c, other=0)
            if WIDEN:  # Triton's interpreter takes bfloat16 for whole numbers here
                left, right = left.to(tl.float32), right.to(tl.float32)
            scores = tl.dot(left, right, scores, input_precision="ieee")
        if HAS_SCALE:
            factor = tl.load(scale + sample * scale_b + position * scale_n, mask=target < d, other=0)
            scores *= factor.to(tl.float32)[None, :]
        scores = tl.where(target[None, :] < d, scores, float("-inf"))
        here, which = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        better = here > top  # the first of equal ones stays
        place = tl.where(better, first + which, place)
        top = tl.where(better, here, top)
    out = sample * s + source
    tl.store(values + out, top, mask=source < s)
    tl.store(places + out, place.to(tl.int64), mask=source < s)

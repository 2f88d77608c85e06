"""Which destination each source is most like: the inner part of matching."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import on, operator

_SCORES_PER_CHUNK = 2**26  # bounds the score matrix that the plain version holds at one time (256 MiB in fp32)


def nearest(
    x: Tensor, dst: Tensor, src: Tensor, scale: Tensor | None = None, closed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each source's largest dot product with a destination, and which that is (ToMe, arXiv 2210.09461).

    The kernel streams over the destinations and keeps the best one so far: it writes no scores, sums half types in
    float32, and takes the first of equal ones. The plain version writes as many scores at one time as a bound allows.

    Args:
        x: (B, N, C) tokens; of float32 or float64 for the plain version.
        dst: (D,) int64 positions of the destinations.
        src: (S,) int64 positions of the sources.
        scale: (B, N, 1), what each token counts as a destination; None for 1.
        closed: (1 or B, D) bool, destinations that are not to be chosen. The kernel does not know of these: the plain
            version looks among the others.

    Returns:
        Values (B, S) and places in `dst` (B, S) int64.
    """
    if closed is not None:
        return _search(x if x.dtype == torch.float64 else x.float(), dst, src, scale, closed)
    if on(x) and x.dtype != torch.float64:
        values, places = torch.ops.tokred.best(x, dst, src, scale)
        return values, places
    return best(x, dst, src, scale)


def best(x: Tensor, dst: Tensor, src: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _search(x, dst, src, scale)


def _search(
    x: Tensor, dst: Tensor, src: Tensor, scale: Tensor | None, closed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    targets = x.index_select(1, dst)
    if scale is not None:
        targets = targets * scale.index_select(1, dst)
    rows = max(1, _SCORES_PER_CHUNK // (x.shape[0] * targets.shape[1]))
    with torch.autocast(x.device.type, enabled=False):  # it would lower the precision of the scores
        found = [_open(x.index_select(1, part) @ targets.mT, closed).max(-1) for part in torch.split(src, rows)]
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)


def _open(scores: Tensor, closed: Tensor | None) -> Tensor:
    return scores if closed is None else scores.masked_fill(closed[:, None], float("-inf"))


def _fake(x: Tensor, dst: Tensor, src: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], src.shape[0])
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.new_empty(shape, dtype=torch.float32 if half else x.dtype), x.new_empty(shape, dtype=torch.int64)


operator(best, _fake)

"""Bipartite soft matching: which source tokens merge into which destinations."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import nearest, on
from .merge import Merge
from .regions import ranked

_HALF = (torch.float16, torch.bfloat16)


def match(
    x: Tensor,
    dst: Tensor,
    src: Tensor,
    r: int,
    halves: int = 1,
    weights: Tensor | None = None,
    protected: Tensor | None = None,
) -> Merge:
    """Merge the `r` sources that are most like a destination, each into its best one (ToMe, arXiv 2210.09461).

    Similarity is the cosine, in float32 at least. A token of zero norm has similarity 0 to all. Equal similarities
    are resolved arbitrarily.

    Args:
        x: (B, N, C) tokens to compare.
        dst: (D,) int64 positions of the destinations, shared by the batch.
        src: (S,) int64 positions of the sources; `dst` and `src` together hold each of the N positions once.
        r: number of sources merged, in [0, S]; M = N - r tokens remain.
        halves: the batch is this many equal parts, such as [uncond; cond], that share one matching: the similarity of
            two tokens is the mean of it over the parts. Sample i of each part gets the same indices.
        weights: (1 or B / halves, N); with these the sources merged are not the most similar ones, but those with the
            largest `ranked(similarity) - weight`.
        protected: (1 or B / halves, N) bool, tokens that are neither merged nor merged into. There must be `r` sources
            without them, and a destination (`tokens.regions.mergeable`).

    Returns:
        A `Merge` of B rows.

    Raises:
        ValueError: `r` is not in [0, S], `dst` and `src` do not add up to N, or `halves` does not divide B.
    """
    b, n, c = x.shape
    s, d = src.shape[0], dst.shape[0]
    if s + d != n:
        raise ValueError(f"dst and src must hold each of the {n} tokens once, got {d} + {s} positions")
    if not 0 <= r <= s:
        raise ValueError(f"cannot merge {r} tokens: this grid has {s} sources (of {n} tokens), so 0 <= r <= {s}")
    if halves < 1 or b % halves:
        raise ValueError(f"a batch of {b} does not have {halves} equal parts")
    if x.dtype in _HALF and (halves > 1 or not on(x)):  # the kernel sums half types in float32 itself
        x = x.float()
    closed = None if protected is None else protected[:, dst]
    scale = _inverse_norm(x)
    if halves == 1:
        # A source's own norm does not change which destination is best: scale S scores, not S x C values.
        score, best = nearest(x, dst, src, scale, closed)
        score = score * scale[:, src, 0]
    else:
        # The mean of cosines is, up to a factor, the dot product of the unit tokens of all parts laid end to end.
        x = (x * scale).view(halves, b // halves, n, c).permute(1, 2, 0, 3).reshape(b // halves, n, halves * c)
        score, best = nearest(x, dst, src, None, closed)
    if weights is not None:
        score = ranked(score) - weights[:, src]
    if protected is not None:
        score = score.masked_fill(protected[:, src], float("-inf"))
    top = score.topk(r, dim=-1, sorted=False).indices
    representative = torch.arange(n, device=x.device).repeat(b // halves, 1)
    representative.scatter_(1, src[top], dst[best.gather(1, top)])
    return Merge(representative if halves == 1 else representative.repeat(halves, 1), n - r)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / norm of each token, (B, N, 1); finite for a token of no length, which stays zero when scaled."""
    kind = torch.float32 if x.dtype in _HALF else x.dtype
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind)
    return norm.clamp_min(torch.finfo(kind).tiny).reciprocal()

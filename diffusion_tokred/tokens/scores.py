"""Scores of tokens: (B, N), not negative, and the larger a score, the more a row is worth computing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Attention weights held at one time: on a CPU what its caches hold, elsewhere 256 MiB in fp32.
_WEIGHTS_ON_CPU, _WEIGHTS = 2**21, 2**26


def received(q: Tensor, k: Tensor, scale: float | None = None, chunk: int | None = None, share: float = 1.0) -> Tensor:
    """Attention that each key receives: mean over the heads, sum over the queries (s1 of ToCa, arXiv 2410.05317).

    The softmax is in float32 at least, a chunk of the queries at a time: Sq x Sk weights are never held together.

    Args:
        q, k: (B, H, Sq, D) and (B, H, Sk, D), as the attention sees them: normalised, rotated.
        scale: factor of the logits; None: 1 / sqrt(D).
        chunk: queries at a time; None: as many as fit a fixed memory.
        share: in (0, 1], share of the queries that are asked: every round(1 / share)-th. The sum is scaled up to all.

    Returns:
        (B, Sk) in float32 at least; a row adds up to Sq.

    Raises:
        ValueError: `share` or `chunk` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is the share of the queries asked, in (0, 1], got {share:g}")
    n = q.shape[2]
    stride = min(round(1 / share), n)
    q = q[:, :, stride // 2 :: stride]
    keys = _wide(k).mT
    total = keys.new_zeros(*k.shape[:2], 1, k.shape[2])
    with torch.autocast(q.device.type, enabled=False):
        for part in q.split(_rows(q, k, chunk), 2):
            weights = _logits(part, keys, scale).softmax(-1)
            # The sum over the queries as a product: along that axis, a CPU's sum strides through memory.
            total = total + weights.new_ones(1, part.shape[2]) @ weights
    return total.mean((1, 2)) * (n / q.shape[2])


def entropy(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    average: str = "entropy",
) -> Tensor:
    """Entropy, in nats, of each query's attention over the keys of a prompt (s2 of ToCa, arXiv 2410.05317).

    With average="entropy" the mean of the heads' entropies, H = log-sum-exp - expected logit, which takes no logarithm
    of a probability; with "map" the entropy of the heads' mean weights, as in ToCa's release: larger, by how much the
    heads disagree. The release adds 1e-7 to each weight inside the logarithm; here 0 log 0 = 0.

    Args:
        q, k: (B, H, Sq, D) and (B, H, Sk, D).
        mask: which keys there are: bool (true: seen) or added to the logits; (B, Sk), (B, 1, Sk) or (B, H or 1, 1, Sk).
            Where it hides all keys of a sample, none counts as hidden.
        scale: factor of the logits; None: 1 / sqrt(D).
        chunk: queries at a time; None: as many as fit a fixed memory.
        average: "entropy" or "map".

    Returns:
        (B, Sq) in float32 at least, in [0, log Sk].

    Raises:
        ValueError: an unknown `average`, or `chunk` is out of range.
    """
    if average not in ("entropy", "map"):
        raise ValueError(f"average is 'entropy' or 'map', got {average!r}")
    keys, bias, found = _wide(k).mT, _bias(mask, _wide(k).dtype), []
    with torch.autocast(q.device.type, enabled=False):
        for part in q.split(_rows(q, k, chunk), 2):
            logits = _logits(part, keys, scale)
            logits = logits if bias is None else logits + bias
            if average == "map":
                found.append(torch.special.entr(logits.softmax(-1).mean(1)).sum(-1))
                continue
            # A shift of the logits changes no entropy, and from their maximum on nothing overflows.
            logits = logits - logits.amax(-1, keepdim=True)
            odds = logits.exp()
            total = odds.sum(-1)
            found.append((total.log() - (odds * logits).sum(-1) / total).mean(1))
    return torch.cat(found, 1)


def norms(rows: Tensor) -> Tensor:
    """Score rows of small norm high: the largest of the norms minus a row's own (v-norm of DuCa, arXiv 2412.18911).

    A row's norm is the sum over the heads of L2 norms. DuCa's score is the sum of 1 - norm, which is negative for
    almost all rows, so that a bonus in proportion to it is a penalty. This one differs by a constant of the sample:
    same order, same distances, never negative.

    Args:
        rows: (B, H, N, D), the values of an attention.

    Returns:
        (B, N) in float32 at least; 0 for the row of the largest norm.
    """
    total = torch.linalg.vector_norm(_wide(rows), dim=-1).sum(1)
    return total.amax(-1, keepdim=True) - total


def normalise(scores: Tensor) -> Tensor:
    """Scale the scores of each sample, (B, N), to an L2 norm of 1 over its tokens; zeros stay zeros."""
    return F.normalize(scores, dim=-1, eps=torch.finfo(scores.dtype).tiny)


def bonus(scores: Tensor, grid: tuple[int, int], cell: int, beta: float) -> Tensor:
    """Raise the largest score s of each cell to s + beta s, so that choices spread (s4 of ToCa, arXiv 2410.05317).

    Where `cell` does not divide a side, the last cells are smaller. Of equal scores the first gets the bonus.

    Args:
        scores: (B, h * w), row-major; not negative, or the bonus is a penalty.
        grid: (h, w) in tokens.
        cell: side of a cell in tokens.
        beta: the bonus; the paper's releases have 0.6 (DiT, cells of 2) and 0.4 (PixArt, cells of 4).

    Raises:
        ValueError: `cell` is not positive, or `scores` does not have h * w tokens.
    """
    (h, w), (b, n) = grid, scores.shape
    if cell < 1 or n != h * w:
        raise ValueError(f"need cells of 1 or more and {h} x {w} = {h * w} tokens, got cells of {cell} and {n} tokens")
    image = F.pad(scores.view(b, h, w), (0, -w % cell, 0, -h % cell), value=float("-inf"))
    # (B, rows of cells, columns of cells, cell * cell), the places of a cell row-major.
    cells = image.unfold(1, cell, cell).unfold(2, cell, cell).flatten(3)
    best = cells.argmax(-1)
    y = torch.arange(h, device=scores.device)[:, None]
    x = torch.arange(w, device=scores.device)
    mine = best[:, torch.div(y, cell, rounding_mode="floor"), torch.div(x, cell, rounding_mode="floor")]
    return torch.where((mine == y % cell * cell + x % cell).flatten(1), scores + beta * scores, scores)


def change(output: Tensor, before: Tensor) -> Tensor:
    """How far each token moved: L2 norm over channels of `output - before`, (B, N, C) both (CAT, arXiv 2502.00433).

    Returns:
        (B, N) in float32 at least.
    """
    return torch.linalg.vector_norm(_wide(output) - _wide(before), dim=-1)


def deviation(output: Tensor) -> Tensor:
    """Unbiased standard deviation over the channels of each token (RAS, arXiv 2502.10389): (B, N, C) -> (B, N).

    In float32 at least. RAS takes it over the channels of a latent pixel, and the mean over the pixels of a patch.

    Raises:
        ValueError: fewer than two channels.
    """
    if output.shape[-1] < 2:
        raise ValueError(f"a deviation needs two channels or more, got {output.shape[-1]}")
    return _wide(output).std(-1)


def _wide(x: Tensor) -> Tensor:
    """Float32 for half types; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _rows(q: Tensor, k: Tensor, chunk: int | None) -> int:
    """Queries at a time."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of queries, 1 or more, got {chunk}")
    limit = _WEIGHTS_ON_CPU if q.device.type == "cpu" else _WEIGHTS
    return chunk or max(1, limit // (q.shape[0] * q.shape[1] * k.shape[2]))


def _logits(q: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """(B, H, M, D) and (B, H, D, Sk) -> (B, H, M, Sk)."""
    return (_wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ keys


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to logits, (B, H or 1, 1, Sk), finite: 0 times it is 0."""
    if mask is None:
        return None
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least)
    return mask.to(dtype).clamp_min(least).reshape(mask.shape[0], -1, 1, mask.shape[-1])
